"""`FiringBlocks`: the bridges of a model's firings, each made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformer_lens.hook_points import HookPoint

from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.sites import Firing

HookTable = Mapping[Any, Any]


@dataclass
class OpenBlock:
    """The bridge of one firing, and what tells whether anyone hooked it.

    Attributes:
        bridge: A transformer-lens ``BlockBridge`` over a tied clone of the physical block.
        ends: The hook dictionaries of its input and output.
        inside: Those of everything else within.
        baseline: Dictionaries that are never empty, with their size when nobody hooked anything.
        points: The hook points looked up so far, by their names within the block.
    """

    bridge: Any
    ends: list[HookTable] = field(init=False)
    inside: list[HookTable] = field(init=False)
    baseline: list[tuple[HookTable, int]] = field(init=False)
    points: dict[str, HookPoint] = field(init=False, default_factory=dict[str, HookPoint])

    def __post_init__(self) -> None:
        self.ends = [t for point in (self.bridge.hook_in, self.bridge.hook_out) for t in _hook_tables(point)]
        ids = {id(table) for table in self.ends}
        others = [t for m in self.bridge.modules() for t in _hook_tables(m) if id(t) not in ids]
        self.inside = [table for table in others if not table]
        self.baseline = [(table, len(table)) for table in others if table]

    def point(self, hook: str) -> HookPoint:
        """The hook point of this name within the block."""
        if hook not in self.points:
            self.points[hook] = hook_point(self.bridge, hook)
        return self.points[hook]

    @property
    def hooked_inside(self) -> bool:
        """Whether anything but the block's input and output has a hook."""
        return any(self.inside) or any(len(table) > size for table, size in self.baseline)

    @property
    def hooked_ends(self) -> bool:
        """Whether the block's input or output has a hook."""
        return any(self.ends)


class FiringBlocks(nn.ModuleList):
    """``model.blocks``: one bridge per firing.

    Bridges are kept by (iteration, layer), so they and their hooks stay where they are while the
    number of iterations changes; those of iterations that no longer run wait for their return.

    Args:
        schedule: The firings.
        make: Makes the bridge of a firing.
    """

    def __init__(self, schedule: Schedule, make: Callable[[Firing], nn.Module]) -> None:
        super().__init__()
        self.schedule, self.make = schedule, make
        self.opened: dict[str, OpenBlock] = {}

    def open(self, firing: Firing) -> OpenBlock:
        """The bridge of a firing."""
        block = self.opened.get(firing.prefix)
        if block is None:
            block = self.opened[firing.prefix] = OpenBlock(self.make(firing))
        return block

    def reschedule(self, schedule: Schedule) -> list[tuple[Firing, nn.Module]]:
        """Follow a new schedule. Returns the open bridges whose index changed."""
        before, after = self.schedule.by_prefix, schedule.by_prefix
        self.schedule = schedule
        return [
            (after[prefix], block.bridge)
            for prefix, block in self.opened.items()
            if prefix in after and (prefix not in before or after[prefix].index != before[prefix].index)
        ]

    def __len__(self) -> int:
        return len(self.schedule)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self.open(firing).bridge for firing in self.schedule)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return nn.ModuleList(self.open(firing).bridge for firing in list(self.schedule)[index])
        return self.open(self.schedule[index]).bridge

    def __repr__(self) -> str:
        return f"FiringBlocks({len(self)} firings, {len(self.opened)} opened)"


def hook_point(bridge: Any, path: str) -> HookPoint:
    """The hook point at a dotted path below a block's bridge."""
    for part in path.split("."):
        bridge = getattr(bridge, part)
    return bridge


def _hook_tables(module: nn.Module) -> tuple[HookTable, ...]:
    return (
        module._forward_hooks,
        module._backward_hooks,
        module._forward_pre_hooks,
        module._backward_pre_hooks,
    )
