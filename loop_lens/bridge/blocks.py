"""`FiringBlocks`: the bridges of a model's firings, each made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import nn
from transformer_lens.hook_points import HookPoint

from loop_lens.unrolling.clones import own_hooks
from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.sites import Firing
from loop_lens.unrolling.unroller import Unroller

HookTable = Mapping[Any, Any]


@dataclass
class OpenBlock:
    """The bridge of one firing, and what tells whether anyone hooked it.

    Hooks that it follows, those of the model's own modules, do not count: the bare module runs them too.

    Attributes:
        bridge: A transformer-lens ``BlockBridge`` over a tied clone of the physical block.
        block: Index of the physical block.
        ends: The hook dictionaries of its input and output.
        inside: Those of everything else within.
        baseline: Dictionaries that are never empty, with their size when nobody hooked anything.
        points: The hook points looked up so far, by their names within the block.
        index: The index of the firing whose flat names it has.
    """

    bridge: Any
    block: int
    ends: list[HookTable] = field(init=False)
    inside: list[HookTable] = field(init=False, default_factory=list[HookTable])
    baseline: list[tuple[HookTable, int]] = field(init=False, default_factory=list[tuple[HookTable, int]])
    points: dict[str, HookPoint] = field(init=False, default_factory=dict[str, HookPoint])
    index: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.ends = [t for point in (self.bridge.hook_in, self.bridge.hook_out) for t in _hook_tables(point)]
        self.watch()

    def watch(self) -> None:
        """Look at the hooks of all modules that are within by now."""
        known = {id(table) for table in (*self.ends, *self.inside, *(table for table, _ in self.baseline))}
        others = [t for m in self.bridge.modules() for t in _hook_tables(m) if id(t) not in known]
        self.inside += [table for table in others if not table]
        self.baseline += [(table, len(table)) for table in others if table]

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


class GoneHookPoint(HookPoint):
    """A hook point whose block was let go: a hook here would never run."""

    def add_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse."""
        raise RuntimeError(
            f"the block of {self.name!r} was let go when the number of iterations went down: ask the model for the "
            "hook point by its name again"
        )


class _FirstFirings(Mapping[str, nn.Module]):
    """What torch walks: the bridge of each physical block's first firing, under that firing's index.

    So every weight is met as often as in an ordinary bridge. Any other firing is found by its index.
    """

    def __init__(self, blocks: FiringBlocks) -> None:
        self.blocks = blocks

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.isdecimal() and int(name) < len(self.blocks)

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self:
            raise KeyError(name)
        return self.blocks[int(name)]

    def __iter__(self) -> Iterator[str]:
        return map(str, sorted(indices[0] for indices in self.blocks.schedule.visits if indices))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class FiringBlocks(nn.ModuleList):
    """``model.blocks``: one bridge per firing.

    Bridges are kept by (iteration, layer), so they and their hooks stay where they are while the
    number of iterations changes; those of iterations that no longer run wait for their return if hooked.
    To torch it is a list of the physical blocks, each by its first firing.

    Args:
        body: What knows the firings.
        make: Makes the bridge of a firing.
        name: Gives a bridge and its hook points the flat names of a firing.
    """

    def __init__(
        self, body: Unroller, make: Callable[[Firing], nn.Module], name: Callable[[Firing, Any], None]
    ) -> None:
        super().__init__()
        self.body, self.make, self.name = body, make, name
        self._modules: Any = _FirstFirings(self)
        self.opened: dict[str, OpenBlock] = {}

    @property
    def schedule(self) -> Schedule:
        """The firings of a forward that begins here."""
        return self.body.schedule

    def open(self, firing: Firing) -> OpenBlock:
        """The bridge of a firing, under the firing's flat names."""
        block = self.opened.get(firing.prefix)
        if block is None:  # of two threads that make one, both get the first
            block = self.opened.setdefault(firing.prefix, OpenBlock(self.make(firing), firing.block))
        if block.index != firing.index:
            self.name(firing, block.bridge)
            block.index = firing.index
        return block

    def give_back(self) -> None:
        """Let go of the bridges of iterations that no longer run, except hooked ones."""
        for prefix, block in list(self.opened.items()):
            if prefix not in self.schedule.by_prefix and not (block.hooked_inside or block.hooked_ends):
                del self.opened[prefix]
                for module in block.bridge.modules():
                    if isinstance(module, HookPoint):
                        module.__class__ = GoneHookPoint

    def train(self, mode: bool = True) -> Self:
        """Set training mode on the bridges made so far."""
        self.training = mode
        for block in self.opened.values():
            block.bridge.train(mode)
        return self

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
        own_hooks(module._forward_hooks),
        own_hooks(module._backward_hooks),
        own_hooks(module._forward_pre_hooks),
        own_hooks(module._backward_pre_hooks),
    )
