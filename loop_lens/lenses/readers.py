"""From a stream to logits: what each kind of lens does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.bridge.names import find_sites
from loop_lens.unrolling.sites import Site
from loop_lens.unrolling.tree import UnknownNameError

Kind = Literal["logit", "native", "coda", "tuned", "jacobian"]
LENS_KINDS: tuple[Kind, ...] = ("logit", "native", "coda", "tuned", "jacobian")


class Transport(Protocol):
    """What carries a site's stream to where the final norm can read it.

    Attributes:
        ends_normed: Whether what it gives has been through the final norm, None for as at the site.
    """

    ends_normed: bool | None

    def carry(self, stream: Tensor, spot: Site, model: HookedLoopedTransformer) -> Tensor:
        """The stream [... d_model] of a site, carried."""
        ...

    def require(self, model: HookedLoopedTransformer, spots: Sequence[Site]) -> None:
        """Raise ValueError unless it was made for this model and these sites."""
        ...


Reader = Callable[[Tensor, Site], Tensor]
"""From a site's stream [batch pos d_model] to logits [batch pos vocab] of the chosen positions."""


def reader(
    model: HookedLoopedTransformer, kind: str, positions: Sequence[int], transport: Transport | None
) -> Reader:
    """How a kind of lens reads a model.

    Raises:
        ValueError: If the kind has no meaning for this model, or lacks its transport.
    """
    where = list(positions)
    if kind not in LENS_KINDS:
        raise ValueError(f"kind {kind!r} is unknown: choose one of {', '.join(LENS_KINDS)}")
    if kind in ("tuned", "jacobian"):
        if transport is None:
            makes = "fit_tuned_lens" if kind == "tuned" else "fit_jacobian_lens"
            raise ValueError(f"kind={kind!r} needs lens=, what loop_lens.lenses.{makes} returns")
        normed = transport.ends_normed
        return lambda stream, at: read_stream(
            model,
            transport.carry(stream[:, where], at, model),
            normed=is_normed(model, at) if normed is None else normed,
        )
    if transport is not None:
        raise ValueError(f"kind={kind!r} takes no lens=: it reads with the model's own weights")
    if kind == "logit":
        return lambda stream, at: read_stream(model, stream[:, where], normed=is_normed(model, at))
    if kind == "native" and not model.body.reads_iterations:
        raise ValueError(
            "kind='native' has no meaning for this model: nobody trained it to be read out after an iteration. "
            "kind='coda' runs its last layers from there, kind='logit' skips them"
        )
    first = coda_start(model)
    if first is None:
        return lambda stream, at: read_stream(
            model, model.body.enter_coda(stream)[:, where], normed=is_normed(model, at)
        )
    return lambda stream, at: run_coda(model, stream, first)[:, where]


def coda_start(model: HookedLoopedTransformer) -> int | None:
    """Index of the coda's first firing, None without a coda."""
    loop = model.schedule.main_loop
    last = max(b.last for b in model.schedule.boundaries if b.segment == loop)
    return last + 1 if last + 1 < len(model.schedule) else None


def run_coda(model: HookedLoopedTransformer, state: Tensor, first: int) -> Tensor:
    """Logits [batch pos vocab] of the model's end, run from a state [batch pos d_model]."""
    return model(model.body.enter_coda(state), start_at_layer=first)


def is_normed(model: HookedLoopedTransformer, at: Site) -> bool:
    """Whether a site's stream has been through the final norm already."""
    between = at.between and at.short == "state_out"
    return between and model.body.ends_normed


def read_stream(model: HookedLoopedTransformer, stream: Tensor, *, normed: bool) -> Tensor:
    """Logits [... vocab] of a stream [... d_model], by the model's own final norm and unembedding.

    What ``transformer_lens.tools.analysis.logit_readout`` reads, without its statistics: a lens over
    hundreds of sites takes its own in one pass.
    """
    if not normed:
        stream = model.ln_final(stream)
    logits = unembedding(model)(stream)
    return model.adapter.apply_output_logits_transform(logits)


def unembedding(model: HookedLoopedTransformer) -> Any:
    """The unembedding itself, apart from its hook points."""
    return getattr(model.unembed, "original_component", None) or model.unembed


def sites_of(model: HookedLoopedTransformer, kind: str, sites: str | Sequence[str] | None) -> list[Site]:
    """The sites that a lens reads, in firing order.

    Raises:
        UnknownNameError: If a site does not exist.
        ValueError: If the kind cannot read a site.
    """
    after_iterations = kind in ("native", "coda")
    loop = model.schedule.main_loop
    if sites is None:
        sites = "state_out" if after_iterations else "resid_post"
    if not isinstance(sites, str):
        found = [model.locate(name) for name in sites]
    elif sites in ("state_out", "state_in"):
        segment = loop if after_iterations else None
        found = find_sites(model, sites, segment=segment)
    else:
        try:
            found = [model.locate(name) for name in model.names(sites)]
        except UnknownNameError:
            found = [model.locate(sites)]
    if not found:
        raise ValueError("sites is empty: give a kind of site, or hooks' names")
    for one in found:
        if one.layout != "stream":
            raise ValueError(f"{one.flat} is not a stream [batch pos d_model]: a lens cannot read it")
        if after_iterations and not (one.between and one.segment == loop and one.short == "state_out"):
            raise ValueError(
                f"kind={kind!r} reads the state after an iteration, {loop}.<t>.hook_state_out, not {one.flat}"
            )
    return found


@torch.no_grad()
def final_logits(model: HookedLoopedTransformer, tokens: Tensor, positions: Sequence[int]) -> Tensor:
    """The model's own logits [batch pos vocab] at some positions."""
    logits: Any = model(tokens)
    return logits[:, list(positions)]
