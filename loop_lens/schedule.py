"""The order in which a looped model's blocks fire, and the name of every site.

A schedule is a tree of segments. It is made from a configuration before anything runs, holds no
tensors, and is the only place that knows how (segment, iteration, layer) maps to a firing's index.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

Iteration = int | tuple[int, ...] | None
"""An iteration of a loop: an int, a tuple (outermost first) in a nested loop, None outside loops."""

_FLAT = re.compile(r"blocks\.(\d+)\.(.+)")
_LOOPED = re.compile(r"(.+\.blocks\.\d+)\.(.+)")


@dataclass(frozen=True)
class Blocks:
    """A run of physical blocks, each with weights of its own.

    Attributes:
        name: Name of the run; at the top level of a schedule it is also the segment's name.
        size: Number of blocks, at least 0.
    """

    name: str
    size: int

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"a run of blocks cannot have {self.size} blocks: give 0 or more")


@dataclass(frozen=True, init=False)
class Loop:
    """A body of segments that runs ``times`` times with the same weights.

    Attributes:
        name: The loop's name, and its segment's.
        times: Number of iterations, at least 1.
        body: At most one run of blocks, and any loops nested in this one, in firing order.
        sites: Hook points that this loop has once per iteration, between its blocks.
    """

    name: str
    times: int
    body: tuple[Blocks | Loop, ...]
    sites: tuple[str, ...]

    def __init__(
        self,
        name: str,
        times: int,
        *body: Blocks | Loop,
        sites: Iterable[str] = ("hook_state_in", "hook_state_out"),
    ) -> None:
        if times < 1:
            raise ValueError(f"recurrences must be at least 1, got {times} for the loop {name!r}")
        if sum(isinstance(part, Blocks) for part in body) > 1:
            raise ValueError(f"the loop {name!r} has more than one run of blocks: nest or merge them")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "times", times)
        object.__setattr__(self, "body", body)
        object.__setattr__(self, "sites", tuple(sites))


@dataclass(frozen=True, init=False)
class Sequence:
    """Segments that run one after the other: the root of a schedule.

    Attributes:
        parts: The segments in firing order.
        sites: Hook points that the model has once per forward, outside its blocks.
    """

    parts: tuple[Blocks | Loop, ...]
    sites: tuple[str, ...]

    def __init__(self, *parts: Blocks | Loop, sites: Iterable[str] = ()) -> None:
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "sites", tuple(sites))


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
        prefix: What its sites' names begin with, e.g. ``loop.3``.
        first: Index of the first firing inside.
        last: Index of the last firing inside.
    """

    segment: str | None
    iteration: Iteration
    prefix: str
    first: int
    last: int


class Location(NamedTuple):
    """Where a name points: the firing, or the boundary between firings, and the hook's own name."""

    place: Firing | Boundary
    hook: str


class UnknownNameError(KeyError):
    """A hook name that the model does not have; the message lists what there is."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


@dataclass(frozen=True)
class Schedule:
    """The firings of one forward, in order.

    Args:
        tree: The segments.

    Example:
        >>> core = Loop("loop", 3, Blocks("core", 2))
        >>> print(Schedule(Sequence(Blocks("prelude", 1), core, Blocks("coda", 1))))
        prelude  1 block             firing  0
        loop     3 x 2 blocks        firings 1-6
        coda     1 block             firing  7
    """

    tree: Sequence
    _firings: tuple[Firing, ...] = field(init=False, repr=False, compare=False)
    _boundaries: tuple[Boundary, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        first_block: dict[str, int] = {}
        for run in _runs(self.tree.parts):
            if run.name in first_block:
                raise ValueError(f"two runs of blocks are called {run.name!r}: names must differ")
            first_block[run.name] = sum(r.size for r in _runs(self.tree.parts) if r.name in first_block)
        firings: list[Firing] = []
        boundaries: list[Boundary] = []

        def fire(run: Blocks, segment: str, path: tuple[int, ...], prefix: str) -> None:
            for layer in range(run.size):
                block = first_block[run.name] + layer
                name = f"{prefix}.blocks.{layer}"
                firings.append(Firing(len(firings), segment, _iteration(path), layer, block, name))

        def walk(loop: Loop, path: tuple[int, ...], outer: str) -> None:
            for t in range(loop.times):
                here, prefix, first = (*path, t), f"{outer}{loop.name}.{t}", len(firings)
                slot = len(boundaries)
                for part in loop.body:
                    if isinstance(part, Blocks):
                        fire(part, loop.name, here, prefix)
                    else:
                        walk(part, here, f"{prefix}.")
                boundary = Boundary(loop.name, _iteration(here), prefix, first, len(firings) - 1)
                boundaries.insert(slot, boundary)

        for part in self.tree.parts:
            if isinstance(part, Blocks):
                fire(part, part.name, (), part.name)
            else:
                walk(part, (), "")
        object.__setattr__(self, "_firings", tuple(firings))
        object.__setattr__(self, "_boundaries", tuple(boundaries))

    def __len__(self) -> int:
        return len(self._firings)

    def __iter__(self) -> Iterator[Firing]:
        return iter(self._firings)

    def __getitem__(self, index: int) -> Firing:
        if not -len(self) <= index < len(self):
            raise IndexError(f"firing {index} does not exist: there are firings 0-{len(self) - 1}")
        return self._firings[index]

    def __str__(self) -> str:
        return "\n".join(self._lines(self.tree.parts, "", 1))

    def _lines(self, parts: Iterable[Blocks | Loop], indent: str, repeats: int) -> Iterator[str]:
        for part in parts:
            if isinstance(part, Blocks):
                if part.size == 0:
                    continue
                what, segment = _plural(part.size, "block"), part.name
            else:
                runs = [_plural(p.size, "block") for p in part.body if isinstance(p, Blocks)]
                loops = [p.name for p in part.body if isinstance(p, Loop)]
                what, segment = f"{part.times} x {' + '.join([*loops, *runs])}", part.name
            own = [f.index for f in self._firings if f.segment == segment]
            nested = isinstance(part, Loop) and any(isinstance(p, Loop) for p in part.body)
            span = _span(own, scattered=repeats > 1 or nested)
            yield f"{indent + segment:<9}{what:<20}{span}".rstrip()
            if isinstance(part, Loop):
                inner = [p for p in part.body if isinstance(p, Loop)]
                yield from self._lines(inner, indent + "  ", repeats * part.times)

    @property
    def n_blocks(self) -> int:
        """Number of physical blocks."""
        return sum(run.size for run in _runs(self.tree.parts))

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        """Every iteration of every loop, in the order in which they begin."""
        return self._boundaries

    @cached_property
    def loops(self) -> dict[str, Loop]:
        """The loops by name, outermost first."""
        return {loop.name: loop for loop in _loops(self.tree.parts)}

    @cached_property
    def segments(self) -> dict[str, int]:
        """Number of layers of each segment that has any, in firing order."""
        sizes: dict[str, int] = {}
        for firing in self._firings:
            sizes[firing.segment] = max(sizes.get(firing.segment, 0), firing.layer + 1)
        return sizes

    @cached_property
    def main_loop(self) -> str:
        """Name of the outermost loop: what ``recurrences`` counts."""
        if not self.loops:
            raise ValueError("this schedule has no loop")
        return next(iter(self.loops))

    @cached_property
    def innermost_loop(self) -> str:
        """Name of the innermost loop."""
        if not self.loops:
            raise ValueError("this schedule has no loop")
        return list(self.loops)[-1]

    def iterations(self, segment: str) -> list[Iteration]:
        """All iterations of a segment in firing order; ``[None]`` outside loops."""
        if segment in self.loops:
            return [b.iteration for b in self._boundaries if b.segment == segment]
        return [None]

    @cached_property
    def by_prefix(self) -> dict[str, Firing]:
        """Firings by their loop name's prefix."""
        return {firing.prefix: firing for firing in self._firings}

    @cached_property
    def visits(self) -> tuple[tuple[int, ...], ...]:
        """For each physical block, the indices of its firings in order."""
        found: list[list[int]] = [[] for _ in range(self.n_blocks)]
        for firing in self._firings:
            found[firing.block].append(firing.index)
        return tuple(tuple(indices) for indices in found)

    @cached_property
    def sites(self) -> dict[str, Boundary]:
        """Names of all sites between blocks, each with its boundary, in no particular order."""
        whole = Boundary(None, None, "", 0, len(self) - 1)
        sites = dict.fromkeys(self.tree.sites, whole)
        for boundary in self._boundaries:
            for site in self.loops[boundary.segment or ""].sites:
                sites[f"{boundary.prefix}.{site}"] = boundary
        return sites

    def fired_before(self, site: str) -> int:
        """How many firings are over when a site between blocks is reached."""
        boundary = self.sites[site]
        if boundary.segment is None:
            loops = [b.first for b in self._boundaries]
            return loops[0] if loops else 0
        before_blocks = site.endswith((".hook_state_in", ".hook_injected"))
        if not before_blocks:
            return boundary.last + 1
        body = self.loops[boundary.segment].body
        if site.endswith(".hook_injected") and any(isinstance(part, Loop) for part in body):
            own = [f.index for f in self if f.segment == boundary.segment]
            return next(i for i in own if self[i].iteration == boundary.iteration)
        return boundary.first

    def find(self, segment: str, iteration: Iteration, layer: int) -> Firing:
        """The firing at (segment, iteration, layer).

        Raises:
            UnknownNameError: If there is none; the message says what there is.
        """
        self.require_segment(segment)
        n_layers = self.segments.get(segment, 0)
        if not 0 <= layer < n_layers:
            raise UnknownNameError(
                f"layer {layer} does not exist: the segment {segment!r} has layers {_range(n_layers)} "
                f"({self.describe()})"
            )
        for firing in self._at[segment, layer]:
            if firing.iteration == iteration:
                return firing
        raise UnknownNameError(
            f"iteration {iteration} does not exist: {self._describe_iterations(segment)} ({self.describe()})"
        )

    @cached_property
    def _at(self) -> dict[tuple[str, int], list[Firing]]:
        found: dict[tuple[str, int], list[Firing]] = {}
        for firing in self._firings:
            found.setdefault((firing.segment, firing.layer), []).append(firing)
        return found

    def require_segment(self, segment: str) -> None:
        """Raise `UnknownNameError` unless the schedule has this segment."""
        if segment not in self.segments and segment not in self.loops:
            names = ", ".join(dict.fromkeys([*self.segments, *self.loops]))
            raise UnknownNameError(f"segment {segment!r} does not exist: there are {names}")

    def locate(self, name: str) -> Location:
        """Split a name, in either spelling, into its place and the hook's own name.

        Whether the place has a hook of that name is for the model to say: a schedule knows blocks
        and the sites between them, not what is inside a block.

        Raises:
            UnknownNameError: If no firing or site has this name.
        """
        if name in self.sites:
            return Location(self.sites[name], name.rsplit(".", 1)[-1])
        if match := _FLAT.fullmatch(name):
            index = int(match[1])
            if index >= len(self):
                raise UnknownNameError(
                    f"{name!r} does not exist: there are blocks {_range(len(self))}; {self.describe()}"
                )
            return Location(self._firings[index], match[2])
        match = _LOOPED.fullmatch(name)
        if match and match[1] in self.by_prefix:
            return Location(self.by_prefix[match[1]], match[2])
        raise UnknownNameError(f"{name!r} does not exist: {self.describe()}")

    def describe(self) -> str:
        """One sentence that says which segments, iterations, layers and sites there are."""
        parts = [
            f"{segment} has layers {_range(size)}"
            + (f" and {self._describe_iterations(segment)}" if segment in self.loops else "")
            for segment, size in self.segments.items()
        ]
        own = sorted({name.rsplit(".", 1)[-1] for name in self.sites})
        return "; ".join(parts) + (f"; between blocks: {', '.join(own)}" if own else "")

    def _describe_iterations(self, segment: str) -> str:
        if segment not in self.loops:
            return f"the segment {segment!r} is outside the loop (iteration=None)"
        path = [n for n in self.loops if self._encloses(n, segment)]
        return "iterations " + " x ".join(f"{n} {_range(self.loops[n].times)}" for n in path)

    def _encloses(self, outer: str, inner: str) -> bool:
        return outer == inner or any(loop.name == inner for loop in _loops(self.loops[outer].body))

    def with_times(self, **times: int) -> Schedule:
        """The same schedule with other numbers of iterations, by loop name."""
        for name, n in times.items():
            if name not in self.loops:
                raise UnknownNameError(f"loop {name!r} does not exist: there are {', '.join(self.loops)}")
            if n < 1:
                raise ValueError(f"recurrences must be at least 1, got {n} for the loop {name!r}")

        def change(part: Blocks | Loop) -> Blocks | Loop:
            if isinstance(part, Blocks):
                return part
            body = [change(inner) for inner in part.body]
            return Loop(part.name, times.get(part.name, part.times), *body, sites=part.sites)

        return Schedule(Sequence(*(change(part) for part in self.tree.parts), sites=self.tree.sites))


def _runs(parts: Iterable[Blocks | Loop]) -> Iterator[Blocks]:
    for part in parts:
        if isinstance(part, Blocks):
            yield part
        else:
            yield from _runs(part.body)


def _loops(parts: Iterable[Blocks | Loop]) -> Iterator[Loop]:
    for part in parts:
        if isinstance(part, Loop):
            yield part
            yield from _loops(part.body)


def _iteration(path: tuple[int, ...]) -> Iteration:
    return None if not path else path[0] if len(path) == 1 else path


def _range(size: int) -> str:
    return "none" if size == 0 else "0" if size == 1 else f"0-{size - 1}"


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _span(indices: list[int], *, scattered: bool) -> str:
    if not indices:
        return ""
    if len(indices) == 1:
        return f"firing  {indices[0]}"
    if scattered and indices[-1] - indices[0] + 1 != len(indices):
        return f"{len(indices)} firings within {indices[0]}-{indices[-1]}"
    return f"firings {indices[0]}-{indices[-1]}"


def pick(what: str, chosen: Any, every: list[Any]) -> list[Any]:
    """What was chosen of everything there is: all for None, a slice of it, one, or several.

    Args:
        what: What is chosen from, ``"iteration"`` or ``"layer"``.
        chosen: None, a slice, one of ``every``, or several.
        every: Everything there is, in order.

    Raises:
        UnknownNameError: If something chosen does not exist.
    """
    if chosen is None:
        return every
    if isinstance(chosen, slice):
        return every[chosen]
    wanted = [chosen] if isinstance(chosen, int | tuple) else list(chosen)
    missing = [item for item in wanted if item not in every]
    if missing:
        raise UnknownNameError(f"{what} {missing[0]} does not exist: there are {every[0]} to {every[-1]}")
    return wanted
