"""What a lens is: it reads the stream at a site, and says logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.unrolling.sites import Site
from loop_lens.unrolling.tree import UnknownNameError


class Lens(ABC):
    """Reads the stream at a site as logits.

    A lens of one's own derives from this class, defines `read`, and is passed to `loop_lens.lens` as ``kind=``.

    Attributes:
        kind: Its name in results.
        default_sites: The kind of site that it reads where none is asked for.

    Example:
        >>> from loop_lens.lenses import Lens, LogitLens
        >>> class HalfLens(LogitLens):
        ...     kind = "half"
        ...
        ...     def read(self, stream, site, model):
        ...         return super().read(stream, site, model) / 2
        >>> loop_lens.lens(model, prompt, kind=HalfLens()).kind
        'half'
    """

    kind: ClassVar[str]
    default_sites: ClassVar[str] = "resid_post"

    @abstractmethod
    def read(
        self, stream: Float[Tensor, "*rest d_model"], site: Site, model: HookedLoopedTransformer
    ) -> Float[Tensor, "*rest vocab"]:
        """Logits of a stream at a site; [prompt pos d_model] of all positions if it `reads_across` them."""

    def reads_across(self, model: HookedLoopedTransformer) -> bool:
        """Whether a position's logits depend on the stream at others, too."""
        return False

    def read_at(
        self,
        stream: Float[Tensor, "prompt pos d_model"],
        where: Any,
        site: Site,
        model: HookedLoopedTransformer,
    ) -> Float[Tensor, "token vocab"]:
        """Logits of some positions.

        Args:
            stream: The stream of all positions.
            where: What picks positions from [prompt pos]: a mask, or a pair of indices.
            site: The site.
            model: The model.
        """
        if self.reads_across(model):
            return self.read(stream, site, model)[where]
        return self.read(stream[where], site, model)

    def says_output(self, site: Site, model: HookedLoopedTransformer) -> bool:
        """Whether what it reads at a site must be the model's own output, which `loop_lens.lens` then checks."""
        return False

    def segment(self, model: HookedLoopedTransformer) -> str | None:
        """The segment whose sites it reads, None for those of all."""
        return None

    def require(self, model: HookedLoopedTransformer, sites: Sequence[Site]) -> None:
        """Raise ValueError unless it can read these sites of this model."""
        for site in sites:
            if site.layout != "stream":
                raise ValueError(f"{site.flat} is not a stream [prompt pos d_model]: a lens cannot read it")


def require_output(
    read: Float[Tensor, "token vocab"], own: Float[Tensor, "token vocab"], site: Site, kind: str
) -> None:
    """Raise ValueError unless logits that a lens read at a site are the model's own, up to 32 roundings."""
    off = float((read - own).abs().max() / own.abs().max().clamp_min(1e-30))
    if off > max(1e-3, 32 * torch.finfo(own.dtype).eps, 32 * torch.finfo(read.dtype).eps):
        raise ValueError(
            f"the {kind} lens does not say at {site.name} what the model says after it (off by {off:.2g} of the "
            "largest logit): more than this state enters what follows the loop, so it has no meaning for the model"
        )


def sites_of(model: HookedLoopedTransformer, lens: Lens, asked: str | Sequence[str] | None) -> list[Site]:
    """The sites that a lens is to read: a kind of site, hooks' names, or the lens's default.

    Raises:
        UnknownNameError: If a site does not exist.
        ValueError: If there are none, or the lens cannot read one.
    """
    asked = lens.default_sites if asked is None else asked
    if isinstance(asked, str):
        try:
            asked = model.names(asked, segment=lens.segment(model))
        except UnknownNameError:
            asked = [asked]
    sites = [model.locate(name) for name in asked]
    if not sites:
        raise ValueError("sites is empty: give a kind of site, or hooks' names")
    lens.require(model, sites)
    return sites
