"""Which hook points a kind of site means, and how its values are indexed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loop_lens.bridge import HookedLoopedTransformer
from loop_lens.cache import act_name
from loop_lens.schedule import Boundary, Firing, UnknownNameError

Layout = Literal["stream", "heads", "pattern"]
"""stream [batch pos ...], heads [batch pos head d_head], pattern [batch head query key]."""

_HEADS = ("q", "k", "v", "z", "rot_q", "rot_k", "result", "q_normed", "k_normed")
_PATTERNS = ("pattern", "attn_scores")
BETWEEN = {"state": "state_in", "injection": "injected"}
"""Kinds of sites between blocks whose names differ from their hook's."""


def layout_of(hook: str) -> Layout:
    """How the values of a hook are indexed, from its name within the block."""
    short = hook.rsplit(".", 1)[-1].removeprefix("hook_")
    if short in _HEADS:
        return "heads"
    return "pattern" if short in _PATTERNS else "stream"


def hook_of(model: HookedLoopedTransformer, site: str) -> tuple[str, bool]:
    """The hook that a kind of site means, and whether it lies between blocks.

    Raises:
        UnknownNameError: If the model has no such site.
    """
    hook = BETWEEN.get(site, site)
    own = hook if hook.startswith("hook_") else f"hook_{hook}"
    between = {name.rsplit(".", 1)[-1] for name in model.schedule.sites}
    if own in between:
        return hook, True
    known = model.registry.names[model.schedule[0].block].canonical
    if site in BETWEEN or act_name(hook, 0) not in known:
        own_sites = sorted(name.removeprefix("hook_") for name in between)
        raise UnknownNameError(
            f"the site {site!r} does not exist in this model: between blocks there are "
            f"{', '.join(own_sites)}; {model.registry.describe_hooks(model.schedule[0].block)}"
        )
    return hook, False


@dataclass(frozen=True)
class Spot:
    """One hook point at which a cell of a sweep intervenes.

    Attributes:
        name: The hook point's name.
        place: Its firing, or the boundary between firings.
        layout: How its values are indexed.
        injection: Whether what is replaced is the injection alone, not the state it goes into.
    """

    name: str
    place: Firing | Boundary
    layout: Layout
    injection: bool = False

    def first_firing(self, model: HookedLoopedTransformer) -> int:
        """The last firing from which a forward must start to pass here; -1 for before all firings."""
        if isinstance(self.place, Firing):
            return self.place.index
        return model.schedule.fired_before(self.name) - 1


def spot(model: HookedLoopedTransformer, name: str, *, injection: bool = False) -> Spot:
    """The spot of a hook's name."""
    place, hook = model.locate(name)
    return Spot(model.flat_name(name), place, layout_of(hook), injection)


def spots(
    model: HookedLoopedTransformer,
    site: str,
    *,
    iteration: Any = None,
    layer: Any = None,
    segment: str | None = None,
) -> list[Spot]:
    """The spots of a kind of site, at the iterations and layers asked for.

    Raises:
        UnknownNameError: If there are none such.
    """
    hook, between = hook_of(model, site)
    if between:
        if layer is not None:
            raise ValueError(f"the site {site!r} lies between blocks: it has no layers")
        if f"hook_{hook.removeprefix('hook_')}" in model.schedule.sites:
            names: Sequence[str] = [f"hook_{hook.removeprefix('hook_')}"]
        else:
            names = model.names(hook, iteration=iteration, segment=segment)
    else:
        segment = segment or model.schedule.innermost_loop
        names = model.names(hook, iteration=iteration, layer=layer, segment=segment)
    return [spot(model, name, injection=site == "injection") for name in names]


def n_heads(model: HookedLoopedTransformer, hook: str) -> int:
    """Number of heads that a hook's values have."""
    short = hook.rsplit(".", 1)[-1].removeprefix("hook_")
    if short in ("k", "v", "rot_k", "k_normed"):
        return int(getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads)
    return int(model.cfg.n_heads)
