"""The blocks and hook points of a looped model, made when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

from loop_lens.schedule import Boundary, Firing, Location, Schedule, UnknownNameError

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


@dataclass(frozen=True)
class BlockNames:
    """The hook names within one physical block.

    Attributes:
        canonical: Every name, aliases included, with the name that its hook point goes by.
    """

    canonical: dict[str, str]

    @cached_property
    def points(self) -> tuple[str, ...]:
        """The names that hook points go by, each once."""
        return tuple(dict.fromkeys(self.canonical.values()))


class HookRegistry(MutableMapping[str, HookPoint]):
    """All hook points by name: both spellings are found, the flat one is listed.

    Args:
        blocks: The firings' bridges.
        names: Hook names within each physical block.
        fixed: Hook points outside the blocks.
    """

    def __init__(self, blocks: FiringBlocks, names: list[BlockNames], fixed: dict[str, HookPoint]) -> None:
        self.blocks, self.names, self.fixed = blocks, names, fixed
        self.sites: dict[str, HookPoint] = {}
        self._located: tuple[Schedule, dict[str, Location]] = (blocks.schedule, {})

    @property
    def schedule(self) -> Schedule:
        """The schedule in force."""
        return self.blocks.schedule

    def locate(self, name: str) -> Location:
        """The firing (or boundary) and the hook's own name.

        Raises:
            UnknownNameError: If there is no such hook; says what there is.
        """
        schedule, located = self._located
        if schedule is not self.schedule:
            located = {}
            self._located = (self.schedule, located)
        if name not in located:
            located[name] = self._locate(name)
        return located[name]

    def _locate(self, name: str) -> Location:
        try:
            location = self.schedule.locate(name)
        except UnknownNameError as error:
            raise UnknownNameError(f"{error}; {self.describe_hooks(0)}") from None
        place, hook = location
        if isinstance(place, Firing) and hook not in self.names[place.block].canonical:
            raise UnknownNameError(
                f"{name!r} does not exist: {self.describe_hooks(place.block)}; {self.schedule.describe()}"
            )
        return location

    def describe_hooks(self, block: int) -> str:
        """The hooks within a block, in words."""
        return f"a block has the hooks {', '.join(sorted(self.names[block].canonical))}"

    def flat(self, name: str) -> str:
        """The flat spelling of a name, or the name itself outside blocks.

        Raises:
            UnknownNameError: If there is no such hook.
        """
        if name in self.fixed:
            return name
        place, hook = self.locate(name)
        return f"blocks.{place.index}.{hook}" if isinstance(place, Firing) else name

    def canonical(self, name: str) -> str:
        """The name that a hook point goes by, from any of its names.

        Raises:
            UnknownNameError: If there is no such hook.
        """
        if name in self.fixed:
            return self.fixed[name].name or name
        place, hook = self.locate(name)
        if isinstance(place, Boundary):
            return name
        return f"blocks.{place.index}.{self.names[place.block].canonical[hook]}"

    def spellings(self) -> Iterator[tuple[str, str]]:
        """Every listed name with its other spelling (itself, where it has one only)."""
        for name in self.fixed:
            yield name, name
        for firing in self.schedule:
            for hook in self.names[firing.block].canonical:
                yield f"blocks.{firing.index}.{hook}", f"{firing.prefix}.{hook}"
        for name in self.schedule.sites:
            yield name, name

    def __getitem__(self, name: str) -> HookPoint:
        if name in self.fixed:
            return self.fixed[name]
        place, hook = self.locate(name)
        if isinstance(place, Boundary):
            return self._site(name)
        return self.blocks.open(place).point(hook)

    def _site(self, name: str) -> HookPoint:
        if name not in self.sites:
            self.sites[name] = HookPoint()
            self.sites[name].name = name
        return self.sites[name]

    def __setitem__(self, name: str, value: HookPoint) -> None:
        self.fixed[name] = value

    def __delitem__(self, name: str) -> None:
        del self.fixed[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.spellings())

    def __len__(self) -> int:
        inside = sum(len(self.names[firing.block].canonical) for firing in self.schedule)
        return len(self.fixed) + inside + len(self.schedule.sites)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        if name in self.fixed:
            return True
        try:
            self.locate(name)
        except UnknownNameError:
            return False
        return True

    def copy(self) -> dict[str, HookPoint]:
        """All listed names with their hook points; opens every block."""
        return dict(self)

    def existing(self) -> Iterator[HookPoint]:
        """The hook points made so far: only these can have hooks."""
        seen: set[int] = set()
        points = [*self.fixed.values(), *self.sites.values()]
        for block in self.blocks.opened.values():
            points += [m for m in block.bridge.modules() if isinstance(m, HookPoint)]
        for point in points:
            if id(point) not in seen:
                seen.add(id(point))
                yield point


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
