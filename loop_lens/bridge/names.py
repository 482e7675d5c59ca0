"""From a kind of site, as measurements and interventions name it, to the sites of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.unrolling.sites import Site, act_name, has_key_value_heads
from loop_lens.unrolling.tree import UnknownNameError

_BETWEEN = {"state": "state_in", "injection": "injected"}


@dataclass(frozen=True, eq=False)
class InjectionSite(Site):
    """The injection alone at a ``hook_injected``: what is replaced there goes into the state as it is."""


def hook_of(model: HookedLoopedTransformer, kind: str) -> tuple[str, bool]:
    """The hook that a kind of site means, and whether it lies between blocks.

    Raises:
        UnknownNameError: If the model has no such site.
    """
    hook = _BETWEEN.get(kind, kind)
    own = hook if hook.startswith("hook_") else f"hook_{hook}"
    between = model.schedule.hooks_between
    if own in between:
        return hook, True
    known = model.registry.names[model.schedule[0].block].canonical
    if kind in _BETWEEN or act_name(hook, 0) not in known:
        own_sites = sorted(name.removeprefix("hook_") for name in between)
        raise UnknownNameError(
            f"the site {kind!r} does not exist in this model: between blocks there are "
            f"{', '.join(own_sites)}; {model.registry.describe_hooks(model.schedule[0].block)}"
        )
    return hook, False


def find_sites(
    model: HookedLoopedTransformer,
    kind: str,
    *,
    iteration: Any = None,
    layer: Any = None,
    segment: str | None = None,
) -> list[Site]:
    """The sites of a kind, at the iterations and layers asked for.

    Args:
        model: The model.
        kind: A hook's short name, ``"state"`` (what enters an iteration) or ``"injection"``.
        iteration: As for `HookedLoopedTransformer.names`.
        layer: As there.
        segment: As there; the innermost loop by default.

    Raises:
        UnknownNameError: If there are none such.
    """
    hook, between = hook_of(model, kind)
    if between:
        if layer is not None:
            raise ValueError(f"the site {kind!r} lies between blocks: it has no layers")
        if f"hook_{hook.removeprefix('hook_')}" in model.schedule.sites:
            names = [f"hook_{hook.removeprefix('hook_')}"]
        else:
            names = model.names(hook, iteration=iteration, segment=segment)
    else:
        segment = segment or model.schedule.innermost_loop
        names = model.names(hook, iteration=iteration, layer=layer, segment=segment)
    found = [model.locate(name) for name in names]
    if kind == "injection":
        return [InjectionSite(site.place, site.hook, site.schedule, site.goes_by) for site in found]
    return found


def n_heads(model: HookedLoopedTransformer, hook: str) -> int:
    """Number of heads that a hook's values have."""
    if has_key_value_heads(hook):
        return int(getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads)
    return int(model.cfg.n_heads)
