"""What ``run_with_cache`` keeps: which hook points fire, and which of them were asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from loop_lens.bridge.registry import HookRegistry
from loop_lens.unrolling.numbers import whole
from loop_lens.unrolling.schedule import Schedule

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
Bounds = tuple[int | None, int | None]
"""The firing to start at and the one to stop before, None for the first and past the last."""

_GATES = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


@dataclass(frozen=True)
class Selection:
    """Hook points to keep.

    Attributes:
        names: Each hook point's own name, with all names that were asked for.
        gated: The own names of hook points asked for that a flag keeps from firing.
        strict: Whether nothing but the names asked for is to be cached, as where a predicate rejects others.
    """

    names: dict[str, list[str]]
    gated: list[str]
    strict: bool = False

    def spread(self, tensors: dict[str, Tensor]) -> None:
        """What is cached once, under the name that hook functions see, is found under all its names."""
        for own, names in self.names.items():
            for suffix in ("", "_grad"):
                if own + suffix in tensors:
                    tensors.update((name + suffix, tensors[own + suffix]) for name in names)
                    if self.strict and own not in names:
                        del tensors[own + suffix]

    def asked(self, names_filter: NamesFilter) -> list[str]:
        """Every name asked for of the hook points to keep, also as it was spelt, without their own names."""
        spelt = [names_filter] if isinstance(names_filter, str) else names_filter
        names = [name for names in self.names.values() for name in names]
        names += spelt if isinstance(spelt, list | tuple) else []
        return [name for name in dict.fromkeys(names) if name not in self.names]

    def warn_unfired(self, tensors: dict[str, Tensor]) -> None:
        """Warn of hook points that did not fire."""
        unfired = [name for name in self.names if name not in tensors]
        if unfired:
            warnings.warn(
                f"{len(unfired)} hook point(s) did not fire in this forward and are not in the cache: "
                f"{', '.join(unfired[:3])}. This architecture's attention or MLP does not pass through them.",
                stacklevel=3,
            )


class Selector:
    """Selects hook points of a bridge by name.

    Args:
        bridge: The bridge.
    """

    def __init__(self, bridge: TransformerBridge) -> None:
        self.bridge = bridge
        self._everything: tuple[HookRegistry, Schedule, tuple[bool, ...], Selection] | None = None

    @property
    def registry(self) -> HookRegistry:
        """The bridge's hook points."""
        return self.bridge._hook_registry  # type: ignore[return-value]

    def select(self, names_filter: NamesFilter, bounds: Bounds) -> Selection:
        """What a filter selects among the firings from start to stop.

        Everything there is in a whole forward is selected once, then remembered.
        """
        if names_filter is not None or bounds != (None, None):
            return self._select(names_filter, bounds)
        registry, schedule = self.registry, self.registry.schedule
        flags = tuple(getattr(self.bridge.cfg, flag, False) for flag in _GATES)
        known = self._everything
        if known is None or known[0] is not registry or known[1] is not schedule or known[2] != flags:
            known = self._everything = (registry, schedule, flags, self._select(None, bounds))
        return known[3]

    def _select(self, names_filter: NamesFilter, bounds: Bounds) -> Selection:
        names: dict[str, list[str]] = {}
        for name in dict.fromkeys(self.named(names_filter)):
            if self.fires(name, bounds):
                names.setdefault(self.registry.canonical(name), []).append(name)
        gated = [name for name in names if self.bridge._gated_hook_reason(name) is not None]
        for name in gated:
            del names[name]
        return Selection(names, gated, strict=callable(names_filter))

    def named(self, names_filter: NamesFilter) -> list[str]:
        """The flat names that a filter asks for."""
        if names_filter is None:
            return list(self.registry)
        if isinstance(names_filter, str):
            return [self.registry.flat(names_filter)]
        if callable(names_filter):
            return self.registry.matching(names_filter)
        return [self.registry.flat(name) for name in names_filter]

    def fires(self, name: str, bounds: Bounds) -> bool:
        """Whether a site fires when only the firings from start to stop run."""
        start, stop = bounds
        if start is None and stop is None:
            return True
        if name in self.registry.fixed:
            late = name.startswith(("ln_final", "unembed", "hook_unembed"))
            early = self.bridge._is_embedding_stage_hook(name)
            return (stop is None or not late) and (start is None or not early)
        site = self.registry.locate(name)
        before = site.fired_before
        if site.between:
            return (start is None or before > start) and (stop is None or before <= stop)
        return (start is None or before >= start) and (stop is None or before < stop)


def firing_at(what: str, index: Any, n: int, last: int) -> int | None:
    """A bound of a forward through n firings, counted from the first; None for none.

    Raises:
        ValueError: If it is no whole number, or no firing is there.
    """
    if index is None:
        return None
    k = whole(index, what)
    if not -n <= k <= last:
        raise ValueError(
            f"{what}={k} does not exist: there are firings 0-{n - 1}, or -{n} to -1 from the end"
        )
    return n + k if k < 0 else k


def as_asked(tensors: dict[str, Tensor], names_filter: Any, registry: HookRegistry) -> dict[str, Tensor]:
    """Cached tensors also under the very spellings that a filter asked for."""
    names: Iterable[str] = [names_filter] if isinstance(names_filter, str) else names_filter
    if isinstance(names, list | tuple):
        spelt = ((name, registry.flat(name)) for name in names)
        tensors.update((name, tensors[flat]) for name, flat in spelt if flat in tensors)
    return tensors
