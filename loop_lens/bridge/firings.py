"""The blocks and hook points of a looped model, made when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.sites import Firing

Materialize = Callable[[Firing], nn.Module]


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
    ends: list[Mapping[Any, Any]] = field(init=False)
    inside: list[Mapping[Any, Any]] = field(init=False)
    baseline: list[tuple[Mapping[Any, Any], int]] = field(init=False)
    points: dict[str, HookPoint] = field(init=False, default_factory=dict[str, HookPoint])

    def __post_init__(self) -> None:
        ends = (self.bridge.hook_in, self.bridge.hook_out)
        self.ends = [table for point in ends for table in _hook_tables(point)]
        ids = {id(table) for table in self.ends}
        tables = [t for m in self.bridge.modules() for t in _hook_tables(m) if id(t) not in ids]
        self.inside = [table for table in tables if not table]
        self.baseline = [(table, len(table)) for table in tables if table]

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


def _hook_tables(module: nn.Module) -> tuple[Mapping[Any, Any], ...]:
    return (
        module._forward_hooks,
        module._backward_hooks,
        module._forward_pre_hooks,
        module._backward_pre_hooks,
    )


class FiringBlocks(nn.ModuleList):
    """``model.blocks``: one bridge per firing, each made when it is first asked for.

    Bridges are kept by (iteration, layer), so they and their hooks stay where they are while the
    number of iterations changes; those of iterations that no longer run wait for their return.
    """

    def __init__(self, schedule: Schedule, materialize: Materialize) -> None:
        super().__init__()
        self.__dict__["opened"] = {}
        self.__dict__["_materialize"] = materialize
        self.schedule = schedule

    opened: dict[str, OpenBlock]

    def open(self, firing: Firing) -> OpenBlock:
        """The bridge of a firing."""
        block = self.opened.get(firing.prefix)
        if block is None:
            materialize: Materialize = self.__dict__["_materialize"]
            block = self.opened[firing.prefix] = OpenBlock(materialize(firing))
        return block

    def reschedule(self, schedule: Schedule) -> list[tuple[Firing, nn.Module]]:
        """Follow a new schedule. Returns the open bridges whose index changed."""
        moved = [
            (schedule.by_prefix[prefix], block.bridge)
            for prefix, block in self.opened.items()
            if prefix in schedule.by_prefix
            and (
                prefix not in self.schedule.by_prefix
                or schedule.by_prefix[prefix].index != self.schedule.by_prefix[prefix].index
            )
        ]
        self.schedule = schedule
        return moved

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


class StreamHookPoint(HookPoint):
    """A hook point on a branch's input that stands for the stream itself.

    ``hook_resid_mid`` is where the stream enters the MLP's norm, and the residual connection goes
    past it: a value that a hook returns there would reach the MLP alone. This one writes it into the
    stream, as transformer-lens' in-place setters do. Gradients stay those of the branch.
    """

    def __call__(self, x: Any) -> Any:
        """Pass the stream through the hooks."""
        shown = super().__call__(x)
        if shown is x or not self.fwd_hooks or torch.equal(shown, x):
            return shown
        return x.copy_(shown)


def hook_point(bridge: Any, path: str) -> HookPoint:
    """The hook point at a dotted path below a block's bridge."""
    found = bridge
    for part in path.split("."):
        found = getattr(found, part)
    return found
