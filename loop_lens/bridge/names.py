"""From what callers write to the sites of a model: hooks by name, kinds of site, hooks in scope."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from transformer_lens.hook_points import HookPoint

from loop_lens.bridge.registry import HookRegistry
from loop_lens.unrolling.body import LoopBody
from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.sites import Firing, Site, act_name, between_name, has_key_value_heads, pick
from loop_lens.unrolling.tree import Iteration, UnknownNameError

Select = int | slice | Iterable[int] | None
Hook = tuple[str | Callable[[str], bool], Callable[..., Any]]

_BETWEEN = {"state": "state_in", "injection": "injected"}
# By registry, since a hook may run another model.
_SCOPES: ContextVar[dict[int, dict[str, HookPoint]] | None] = ContextVar("hook points in scope", default=None)


class Looped(Protocol):
    """What names and caches ask of a model; a `HookedLoopedTransformer` has it."""

    cfg: Any
    body: LoopBody

    @property
    def registry(self) -> HookRegistry:
        """All hook points by name."""
        ...

    @property
    def schedule(self) -> Schedule:
        """The firings of one forward."""
        ...


@dataclass(frozen=True, eq=False)
class InjectionSite(Site):
    """The injection alone at a ``hook_injected``: what is replaced there goes into the state as it is."""


def find_site(
    model: Looped,
    hook: str,
    *,
    iteration: Iteration = None,
    layer: int | None = None,
    segment: str | None = None,
) -> Site:
    """One site, as `HookedLoopedTransformer.name` is asked for it."""
    segment = model.schedule.innermost_loop if segment is None else segment
    model.schedule.require_segment(segment)
    if layer is None:
        return model.schedule.between(hook, segment, iteration)
    try:
        firing = model.schedule.find(segment, iteration, layer)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error}; {model.registry.describe_hooks(0, hook)}") from None
    return _inside(model, firing, hook)


def select_sites(
    model: Looped,
    hook: str,
    *,
    iteration: Select = None,
    layer: Select = None,
    segment: str | None = None,
) -> list[Site]:
    """Sites of one hook at many places, as `HookedLoopedTransformer.names` is asked for them."""
    schedule = model.schedule
    if between_name(hook) in schedule.hooks_between:
        loop = segment or schedule.innermost_loop
        picked = pick("iteration", iteration, schedule.iterations(loop))
        return list(dict.fromkeys(schedule.between(hook, loop, t) for t in picked))
    if segment is None and iteration is None and layer is None:
        return [_inside(model, firing, hook) for firing in schedule]
    segment = segment or schedule.innermost_loop
    schedule.require_segment(segment)
    layers = pick("layer", layer, list(range(schedule.segments[segment])))
    iterations = pick("iteration", iteration, schedule.iterations(segment))
    return [find_site(model, hook, iteration=t, layer=i, segment=segment) for t in iterations for i in layers]


def _inside(model: Looped, firing: Firing, hook: str) -> Site:
    return model.registry.locate(f"{firing.prefix}.{act_name(hook, firing.index)}")


def hook_of(model: Looped, kind: str) -> tuple[str, bool]:
    """The hook that a kind of site means, and whether it lies between blocks.

    Raises:
        UnknownNameError: If the model has no such site.
    """
    hook = _BETWEEN.get(kind, kind)
    between = model.schedule.hooks_between
    if between_name(hook) in between:
        return hook, True
    block = model.schedule[0].block
    if kind in _BETWEEN or act_name(hook, 0) not in model.registry.names[block].canonical:
        own_sites = sorted(name.removeprefix("hook_") for name in between)
        raise UnknownNameError(
            f"the site {kind!r} does not exist in this model: between blocks there are "
            f"{', '.join(own_sites)}; {model.registry.describe_hooks(block, kind)}"
        )
    return hook, False


def find_sites(
    model: Looped, kind: str, *, iteration: Any = None, layer: Any = None, segment: str | None = None
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
    if not between:
        segment = segment or model.schedule.innermost_loop
        return select_sites(model, hook, iteration=iteration, layer=layer, segment=segment)
    if layer is not None:
        raise ValueError(f"the site {kind!r} lies between blocks: it has no layers")
    if between_name(hook) in model.schedule.sites:
        return [model.schedule.sites[between_name(hook)]]
    sites = select_sites(model, hook, iteration=iteration, segment=segment)
    if kind == "injection":
        return [InjectionSite(site.place, site.hook, site.schedule) for site in sites]
    return sites


def n_heads(model: Looped, hook: str) -> int:
    """Number of heads that a hook's values have."""
    if has_key_value_heads(hook):
        return int(getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads)
    return int(model.cfg.n_heads)


class SeenPoint:
    """A hook point as a hook function is shown it: under the name that was asked for, with its iteration.

    Attributes:
        name: The name asked for, in its spelling; where none was, the point's own.
        iteration: The iteration of its loop, None outside loops.

    Example:
        >>> seen = []
        >>> note = lambda value, hook: seen.append((hook.name, hook.iteration))
        >>> _ = model.run_with_hooks(prompt, fwd_hooks=[("loop.3.blocks.1.hook_resid_post", note)])
        >>> seen
        [('loop.3.blocks.1.hook_resid_post', 3)]
    """

    __slots__ = ("_asked", "_point", "iteration")

    def __init__(self, point: Any, asked: str | None, iteration: Iteration) -> None:
        for name, value in (("_point", point), ("_asked", asked), ("iteration", iteration)):
            object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        return self._asked or self._point.name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._point, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._point, name, value)


class Shown:
    """A hook function that is shown its hook point as a `SeenPoint`."""

    def __init__(
        self, registry: HookRegistry, function: Callable[..., Any], name: str, asked: str | None
    ) -> None:
        self.function, self.asked = function, asked
        self.iteration = None if name in registry.fixed else registry.locate(name).iteration

    def __call__(self, value: Any, hook: Any) -> Any:
        return self.function(value, hook=SeenPoint(hook, self.asked, self.iteration))

    def __repr__(self) -> str:
        # transformer-lens asks for it with every hook, and a partial's own shows whole tensors.
        return f"Shown({getattr(self.function, '__qualname__', type(self.function).__name__)})"


def resolve(bridge: Any, hooks: Iterable[Hook], api: str) -> list[Any]:
    """Pairs of a flat name and a `Shown` function, one for each hook point.

    Those that a flag keeps from firing are left out, with a warning, where a predicate accepts them.
    """
    registry: HookRegistry = bridge.registry
    resolved: list[Any] = []
    gated: list[str] = []
    for name, function in hooks:
        if isinstance(name, str):
            resolved.append((registry.flat(name), Shown(registry, function, name, name)))
            continue
        for own in dict.fromkeys(map(registry.canonical, registry.matching(name))):
            if bridge._gated_hook_reason(own) is None:
                resolved.append((own, Shown(registry, function, own, own)))
            else:
                gated.append(own)
    bridge._warn_gated_skipped(api, gated, stacklevel=4)
    return resolved


@contextmanager
def in_scope(registry: HookRegistry, names: Iterable[str]) -> Generator[None, None, None]:
    """Let transformer-lens see these hook points alone: it walks all that it sees."""
    scope: dict[str, HookPoint] = {}
    for name in names:
        point = registry[name]
        scope[name] = point
        scope.setdefault(point.name or name, point)
    token = _SCOPES.set({**(_SCOPES.get() or {}), id(registry): scope})
    try:
        yield
    finally:
        _SCOPES.reset(token)


def visible(registry: HookRegistry) -> Mapping[str, HookPoint]:
    """The hook points in scope, all of them outside any."""
    return (_SCOPES.get() or {}).get(id(registry), registry)
