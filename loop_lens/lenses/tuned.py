"""The tuned lens per iteration and layer: an affine translator before the logit lens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.lenses.base import Lens
from loop_lens.lenses.logit import is_normed, to_logits
from loop_lens.measuring.files import read_file, write_file
from loop_lens.unrolling.sites import Firing, Site


class TunedLens(nn.Module, Lens):
    """Translators before the logit lens: ``logits = W_U norm(x + A x + b)``, a pair (A, b) per site.

    Attributes:
        sites: Keys of the translators, see `key`.
        rank: Rank of A: None for a full matrix, 0 for no A.
        shared: Whether iterations share their layer's translator.
        model_id: Fingerprint of the model that it was trained for; empty for any model.
        report: What training measured, one row per site; empty if it was not trained.

    Source:
        Belrose et al., arXiv 2303.08112.

    Example:
        >>> from loop_lens.lenses import TunedLens
        >>> lens = TunedLens(["loop.3.blocks.1.hook_resid_post"], model.cfg.d_model, rank=0)
        >>> loop_lens.lens(model, prompt, kind=lens, sites=lens.sites).top_ids.shape
        torch.Size([1, 1, 11, 5])
        >>> TunedLens.load(lens.save("lens.safetensors")).rank
        0
    """

    kind = "tuned"

    def __init__(
        self,
        sites: Sequence[str],
        d_model: int,
        *,
        rank: int | None = None,
        shared: bool = False,
        model_id: str = "",
    ) -> None:
        super().__init__()
        if rank is not None and not 0 <= rank <= d_model:
            raise ValueError(f"rank must be None or 0 to d_model={d_model}, got {rank}")
        self.sites, self.rank, self.shared = tuple(sites), rank, shared
        self.d_model, self.model_id = d_model, model_id
        self.report = pd.DataFrame()
        n = len(self.sites)
        self.bias = nn.Parameter(torch.zeros(n, d_model))
        if rank is None:
            self.weight = nn.Parameter(torch.zeros(n, d_model, d_model))
        elif rank:
            self.down = nn.Parameter(torch.randn(n, rank, d_model) * d_model**-0.5)
            self.up = nn.Parameter(torch.zeros(n, d_model, rank))

    def key(self, site: Site) -> str:
        """What a site's translator goes by: ``loop.3.blocks.1.hook_resid_post``; shared, without the 3."""
        return translator_key(site, shared=self.shared)

    def translate(self, stream: Float[Tensor, "*rest d_model"], site: Site) -> Float[Tensor, "*rest d_model"]:
        """A site's stream in the basis of the final layer."""
        index = self.sites.index(self.key(site))
        x = stream.to(self.bias.dtype)
        out = x + self.bias[index]
        if self.rank is None:
            out = out + x @ self.weight[index].T
        elif self.rank:
            out = out + (x @ self.down[index].T) @ self.up[index].T
        return out.to(stream.dtype)

    def reset(self, key: str) -> None:
        """Make a translator the identity."""
        for name, parameter in self.named_parameters():
            if name != "down":
                parameter.data[self.sites.index(key)].zero_()

    def read(
        self, stream: Float[Tensor, "*rest d_model"], site: Site, model: HookedLoopedTransformer
    ) -> Float[Tensor, "*rest vocab"]:
        """Logits of a stream, translated."""
        return to_logits(model, self.translate(stream, site), normed=is_normed(model, site))

    def require(self, model: HookedLoopedTransformer, sites: Sequence[Site]) -> None:
        """It must have been trained for the model and the sites."""
        super().require(model, sites)
        require_model(self.model_id, self.d_model, model, "this tuned lens was trained")
        missing = [site.flat for site in sites if self.key(site) not in self.sites]
        if missing:
            raise ValueError(
                f"this tuned lens has no translator for {missing[0]} (nor {len(missing) - 1} others): it has "
                f"{', '.join(self.sites[:4])}, ... Pass sites= to lens(), or train with them"
            )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file."""
        about: dict[str, Any] = {
            name: getattr(self, name) for name in ("sites", "d_model", "rank", "shared", "model_id")
        }
        about["report"] = self.report.to_dict("list")
        return write_file(path, type(self).__name__, self.state_dict(), about)

    @classmethod
    def load(cls, path: str | Path) -> TunedLens:
        """Read a file that `save` wrote.

        Raises:
            UnreadableError: If it is another kind of file, or damaged.
        """
        with read_file(path, cls.__name__) as (tensors, about):
            report = pd.DataFrame(about.pop("report"))
            lens = cls(**about)
            lens.load_state_dict(tensors)
            lens.report = report
            return lens.requires_grad_(False)


def translator_key(site: Site, *, shared: bool) -> str:
    """The key of a site's translator in a `TunedLens`."""
    place, hook = site.place, site.flat.rsplit(".", 1)[-1]
    if not shared:
        return f"{place.prefix or 'model'}.{hook}"
    layer = f".blocks.{place.layer}" if isinstance(place, Firing) else ""
    return f"{place.segment}{layer}.{hook}"


def fingerprint(model: HookedLoopedTransformer) -> str:
    """Tells one model's weights from another's: a hash of sizes and of a few numbers of each parameter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.native_state().items()):
        sample = tensor.detach().flatten()[:4].float().cpu().tolist()
        digest.update(f"{name}{tuple(tensor.shape)}{[round(x, 4) for x in sample]}".encode())
    return digest.hexdigest()[:16]


def require_model(model_id: str, d_model: int, model: HookedLoopedTransformer, what: str) -> None:
    """Raise ValueError unless a fitted lens belongs to a model."""
    if d_model != model.cfg.d_model:
        raise ValueError(f"{what} for d_model={d_model}, but this model has d_model={model.cfg.d_model}")
    if model_id and model_id != fingerprint(model):
        raise ValueError(f"{what} for another model: the weights differ")
