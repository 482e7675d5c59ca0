"""Where a value is: `Site`, the one word for a hook point of one firing or between firings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

from loop_lens.unrolling.numbers import plain
from loop_lens.unrolling.tree import Iteration, UnknownNameError

Layout = Literal["stream", "heads", "pattern"]
"""stream [batch pos ...], heads [batch pos head d_head], pattern [batch head query key]."""

_HEADS = ("q", "k", "v", "z", "rot_q", "rot_k", "result", "q_normed", "k_normed")
_KEY_VALUE_HEADS = ("k", "v", "rot_k", "k_normed")
_PATTERNS = ("pattern", "attn_scores")


@dataclass(frozen=True)
class Firing:
    """One execution of a physical block in one forward.

    Attributes:
        index: Place in firing order, from 0; the ``layer`` of transformer-lens' flat names.
        segment: Name of the segment that it belongs to (``prelude``, ``loop``, ``coda``, ``H``, ``L``).
        iteration: Iteration of its loop, see `Iteration`.
        layer: Layer within the segment, from 0.
        block: The physical block that runs, as its place among all physical blocks.
        prefix: The loop spelling of its name, e.g. ``loop.3.blocks.2``.

    Example:
        >>> firing = model.schedule[8]
        >>> firing.segment, firing.iteration, firing.layer, firing.prefix
        ('loop', 3, 1, 'loop.3.blocks.1')
    """

    index: int
    segment: str
    iteration: Iteration
    layer: int
    block: int
    prefix: str


@dataclass(frozen=True)
class Boundary:
    """One iteration of a loop seen from outside its blocks, or (with no segment) the whole forward.

    Attributes:
        segment: Name of the loop, None for sites that exist once per forward.
        iteration: The iteration, see `Iteration`.
        prefix: What its sites' names begin with, e.g. ``loop.3``; empty for the whole forward.
        first: Index of the first firing inside.
        last: Index of the last firing inside.

    Example:
        >>> boundary = model.schedule.boundaries[3]
        >>> boundary.prefix, boundary.first, boundary.last
        ('loop.3', 7, 8)
    """

    segment: str | None
    iteration: Iteration
    prefix: str
    first: int
    last: int


class Places(Protocol):
    """What a site asks of the schedule that it belongs to."""

    def find(self, segment: str, iteration: Iteration, layer: int) -> Firing:
        """The firing there."""
        ...

    def boundary(self, segment: str, iteration: Iteration) -> Boundary:
        """The iteration there, seen from outside its blocks."""
        ...

    def fired_before(self, site: Site) -> int:
        """How many firings are over when a site is reached."""
        ...


@dataclass(frozen=True, eq=False)
class Site:
    """One hook point of one forward: the place, the hook there, and how its values are indexed.

    A site is made from text once, by `Schedule.site` or `HookedLoopedTransformer.locate`; from then on it
    answers for itself. It unpacks as, and equals, the pair ``(place, hook)``.

    Attributes:
        place: The firing, or the boundary between firings.
        hook: The hook's own name there, e.g. ``attn.hook_pattern`` or ``hook_state_in``.
        schedule: The schedule that it belongs to.
        goes_by: The name within the block that the hook point itself has, where ``hook`` is an alias of it.

    Example:
        >>> from loop_lens.unrolling import Blocks, Loop, Schedule, Segments
        >>> schedule = Schedule(Segments(Blocks("prelude", 2), Loop("loop", 3, Blocks("core", 4))))
        >>> site = schedule.site("blocks.8.attn.hook_pattern")
        >>> site.name, site.layout, site.iteration, site.layer
        ('loop.1.blocks.2.attn.hook_pattern', 'pattern', 1, 2)
        >>> site.at(2).flat, site.sibling("resid_post").name
        ('blocks.12.attn.hook_pattern', 'loop.1.blocks.2.hook_resid_post')
    """

    place: Firing | Boundary
    hook: str
    schedule: Places = field(repr=False)
    goes_by: str = field(default="", repr=False)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.place, self.hook))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, Site | tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.place, self.hook))

    @cached_property
    def name(self) -> str:
        """The loop spelling: ``loop.3.blocks.2.hook_resid_post``, ``loop.3.hook_state_in``."""
        return f"{self.place.prefix}.{self.hook}" if self.place.prefix else self.hook

    @cached_property
    def flat(self) -> str:
        """transformer-lens' spelling, ``blocks.16.hook_resid_post``; the only one between blocks."""
        return f"blocks.{self.place.index}.{self.hook}" if isinstance(self.place, Firing) else self.name

    @cached_property
    def canonical(self) -> str:
        """The flat spelling of the one name, among a hook point's aliases, that the hook point goes by."""
        if isinstance(self.place, Firing) and self.goes_by:
            return f"blocks.{self.place.index}.{self.goes_by}"
        return self.flat

    @cached_property
    def short(self) -> str:
        """transformer-lens' short name of the hook: ``pattern``, ``resid_post``, ``state_in``."""
        return short_name(self.hook)

    @cached_property
    def layout(self) -> Layout:
        """How the values are indexed."""
        return layout_of(self.hook)

    @property
    def between(self) -> bool:
        """Whether it lies between blocks."""
        return isinstance(self.place, Boundary)

    @property
    def segment(self) -> str | None:
        """The segment it belongs to, None for what exists once per forward."""
        return self.place.segment

    @property
    def iteration(self) -> Iteration:
        """The iteration of its loop, None outside loops."""
        return self.place.iteration

    @property
    def layer(self) -> int | None:
        """The layer within its segment, None between blocks."""
        return self.place.layer if isinstance(self.place, Firing) else None

    @property
    def fired_before(self) -> int:
        """How many firings are over when the site is reached."""
        return self.schedule.fired_before(self)

    @property
    def start(self) -> int:
        """The last firing from which a forward must start to pass here; -1 for before all firings."""
        return self.place.index if isinstance(self.place, Firing) else self.fired_before - 1

    def sibling(self, hook: str) -> Site:
        """Another hook at the same place.

        Args:
            hook: A short name (``"resid_pre"``, ``"state_in"``) or a full one within the place.
        """
        if isinstance(self.place, Firing):
            return Site(self.place, act_name(hook, self.place.index), self.schedule)
        return Site(self.place, between_name(hook), self.schedule)

    def at(self, iteration: Iteration) -> Site:
        """The same hook at another iteration of its loop.

        Raises:
            UnknownNameError: If there is no such iteration.
        """
        place = self.place
        if place.segment is None:
            raise UnknownNameError(f"{self.name} exists once per forward: it has no iterations")
        moved = (
            self.schedule.find(place.segment, iteration, place.layer)
            if isinstance(place, Firing)
            else self.schedule.boundary(place.segment, iteration)
        )
        return Site(moved, self.hook, self.schedule, self.goes_by)


def short_name(hook: str) -> str:
    """A hook's name without what stands before it: ``attn.hook_pattern`` is ``pattern``."""
    return hook.rsplit(".", 1)[-1].removeprefix("hook_")


def between_name(hook: str) -> str:
    """The full name of a hook between blocks, given with or without its ``hook_``."""
    return hook if hook.startswith("hook_") else f"hook_{hook}"


def layout_of(hook: str) -> Layout:
    """How the values of a hook are indexed, from its name within the block."""
    short = short_name(hook)
    if short in _HEADS:
        return "heads"
    return "pattern" if short in _PATTERNS else "stream"


def has_key_value_heads(hook: str) -> bool:
    """Whether a hook's values have one head per key-value head, fewer than the queries' under GQA."""
    return short_name(hook) in _KEY_VALUE_HEADS


def act_name(name: str, layer: int) -> str:
    """A hook's own name within its block, from transformer-lens' short names or as it is."""
    if name.rsplit(".", 1)[-1].startswith("hook_"):
        return name
    from transformer_lens.utilities import get_act_name  # a schedule alone needs no torch

    flat = get_act_name(name, layer)
    prefix = f"blocks.{layer}."
    return flat.removeprefix(prefix) if flat.startswith(prefix) else name


def pick(what: str, chosen: Any, every: list[Any]) -> list[Any]:
    """What was chosen of everything there is: all for None, a slice of it, one, or several.

    Args:
        what: What is chosen from, ``"iteration"`` or ``"layer"``.
        chosen: None, a slice, one of ``every``, or several.
        every: Everything there is, in order.

    Raises:
        UnknownNameError: If something chosen does not exist.
        ValueError: If nothing is chosen.
    """
    if chosen is None:
        return every
    given, chosen = chosen, plain(chosen)
    if isinstance(chosen, slice):
        wanted = every[chosen]
    else:
        wanted = (
            [chosen] if isinstance(chosen, int) or (isinstance(chosen, tuple) and chosen) else list(chosen)
        )
    if not wanted:
        raise ValueError(f"{given!r} chooses no {what}: there are {every[0]} to {every[-1]}, and None is all")
    missing = [item for item in wanted if item not in every]
    if missing:
        raise UnknownNameError(f"{what} {missing[0]} does not exist: there are {every[0]} to {every[-1]}")
    return wanted
