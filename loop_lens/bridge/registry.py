"""All hook points of a looped model by name, in both spellings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loop_lens.bridge.blocks import FiringBlocks
from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.sites import Firing, Site
from loop_lens.unrolling.tree import UnknownNameError

_SCHEDULES = 16  # that the names found are kept of
_USUAL = (
    "hook_resid_pre",
    "hook_resid_post",
    "attn.hook_z",
    "attn.hook_pattern",
    "hook_attn_out",
    "hook_mlp_out",
)


def few(first: Iterable[str], names: Iterable[str], near: str = "", most: int = 7) -> str:
    """A few of many names in words: those near one, then some that come first, then others; and how many more."""
    names = list(names)
    shown = list(dict.fromkeys([*get_close_matches(near, names, 3), *first, *names]))
    rest = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {rest} more (model.hook_dict has all)" if rest > 0 else "")


@dataclass(frozen=True)
class BlockNames:
    """The hook names within one physical block.

    Attributes:
        canonical: Every name, aliases included, with the name that its hook point goes by.
    """

    canonical: dict[str, str]

    @classmethod
    def listed(cls, hooks: Mapping[str, HookPoint], block: int) -> BlockNames:
        """Those of one block among all hook points of a bridge over the physical blocks."""
        prefix = f"blocks.{block}."
        return cls(
            {
                name.removeprefix(prefix): (point.name or name).removeprefix(prefix)
                for name, point in hooks.items()
                if name.startswith(prefix)
            }
        )

    @cached_property
    def points(self) -> tuple[str, ...]:
        """The names that hook points go by, each once."""
        return tuple(dict.fromkeys(self.canonical.values()))


class HookRegistry(MutableMapping[str, HookPoint]):
    """All hook points by name: both spellings are found, the flat one is listed.

    It also is what the body shows the values between blocks to.

    Args:
        blocks: The firings' bridges.
        names: Hook names within each physical block.
        fixed: Hook points outside the blocks, those of the embedding and the final norm.
    """

    def __init__(self, blocks: FiringBlocks, names: list[BlockNames], fixed: dict[str, HookPoint]) -> None:
        self.blocks, self.names, self.fixed = blocks, names, fixed
        self.sites: dict[str, HookPoint] = {}
        self._located: dict[int, tuple[Schedule, dict[str, Site]]] = {}

    @property
    def schedule(self) -> Schedule:
        """The schedule in force."""
        return self.blocks.schedule

    def wants(self, site: str) -> bool:
        """Whether a site between blocks has hooks."""
        point = self.sites.get(site)
        return point is not None and bool(point._forward_hooks or point._backward_hooks)

    def see(self, site: str, value: Tensor) -> Tensor:
        """Pass a value between blocks through its hook point."""
        return self.sites[site](value.clone())  # a hook may write in place

    def locate(self, name: str) -> Site:
        """The site of a name, in either spelling.

        Raises:
            UnknownNameError: If there is no such hook; says what there is.
        """
        schedule = self.schedule
        known = self._located.get(id(schedule))
        if known is None:
            if len(self._located) >= _SCHEDULES:
                self._located = {}
            known = self._located[id(schedule)] = (schedule, {})
        located = known[1]
        if name not in located:
            located[name] = self._locate(name, schedule)
        return located[name]

    def _locate(self, name: str, schedule: Schedule) -> Site:
        try:
            site = schedule.site(name)
        except UnknownNameError as error:
            raise UnknownNameError(f"{error}; {self.describe_hooks(0, name)}") from None
        place, hook = site
        if not isinstance(place, Firing):
            return site
        known = self.names[place.block].canonical
        if hook not in known:
            raise UnknownNameError(
                f"{name!r} does not exist: {self.describe_hooks(place.block, hook)}; {schedule.describe()}"
            )
        return replace(site, goes_by=known[hook])

    def describe_hooks(self, block: int, near: str = "") -> str:
        """Some hooks within a block in words, first those whose name is near one."""
        names, near = self.names[block].canonical, re.sub(r".*\bblocks\.\d+\.", "", near)
        return f"a block has the hooks {few([n for n in _USUAL if n in names], names, near)}"

    def flat(self, name: str) -> str:
        """The flat spelling of any name, also of one outside the blocks.

        Raises:
            UnknownNameError: If there is no such hook.
        """
        return name if name in self.fixed else self.locate(name).flat

    def canonical(self, name: str) -> str:
        """The name that a hook point goes by, from any of its names, also outside the blocks.

        Raises:
            UnknownNameError: If there is no such hook.
        """
        return self.fixed[name].name or name if name in self.fixed else self.locate(name).canonical

    def spellings(self) -> Iterator[tuple[str, str]]:
        """Every listed name with its other spelling (itself, where it has one only)."""
        for name in self.fixed:
            yield name, name
        for firing in self.schedule:
            for hook in self.names[firing.block].canonical:
                yield f"blocks.{firing.index}.{hook}", f"{firing.prefix}.{hook}"
        for name in self.schedule.sites:
            yield name, name

    def matching(self, accepts: Callable[[str], bool]) -> list[str]:
        """The listed names that a predicate accepts in either spelling."""
        return [flat for flat, looped in self.spellings() if accepts(flat) or accepts(looped)]

    def __getitem__(self, name: str) -> HookPoint:
        if name in self.fixed:
            return self.fixed[name]
        site = self.locate(name)
        if isinstance(site.place, Firing):
            return self.blocks.open(site.place).point(site.hook)
        point = self.sites.get(name)
        if point is None:
            point = HookPoint()
            point.name = name
            point = self.sites.setdefault(name, point)  # of two threads that make one, both get the first
        return point

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
        points = [*self.fixed.values(), *self.sites.values()]
        for block in list(self.blocks.opened.values()):
            points += [m for m in block.bridge.modules() if isinstance(m, HookPoint)]
        return iter({id(point): point for point in points}.values())
