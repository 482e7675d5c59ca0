"""The order in which a looped model's blocks fire, and the name of every site.

A schedule is a tree of segments. It is made from a configuration before anything runs, holds no
tensors, and is the only place that knows how (segment, iteration, layer) maps to a firing's index.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from loop_lens.unrolling.numbers import plain, whole
from loop_lens.unrolling.sites import Boundary, Firing, Site, between_name
from loop_lens.unrolling.tree import Blocks, Iteration, Loop, Segments, UnknownNameError, _loops, _runs

_FLAT = re.compile(r"blocks\.(\d+)\.(.+)")
_LOOPED = re.compile(r"(.+\.blocks\.\d+)\.(.+)")


@dataclass(frozen=True)
class Schedule:
    """The firings of one forward, in order.

    Args:
        tree: The segments.

    Example:
        >>> from loop_lens.unrolling import Blocks, Loop, Schedule, Segments
        >>> core = Loop("loop", 3, Blocks("core", 2))
        >>> print(Schedule(Segments(Blocks("prelude", 1), core, Blocks("coda", 1))))
        prelude  1 block             firing  0
        loop     3 x 2 blocks        firings 1-6
        coda     1 block             firing  7
    """

    tree: Segments
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
        """Name of the innermost loop.

        Raises:
            ValueError: If there is none, or if several lie equally deep.
        """
        if not self.loops:
            raise ValueError("this schedule has no loop")
        depths = {name: sum(self._encloses(outer, name) for outer in self.loops) for name in self.loops}
        deepest = [name for name, depth in depths.items() if depth == max(depths.values())]
        if len(deepest) > 1:
            raise ValueError(
                f"this schedule has several innermost loops, {', '.join(deepest)}: say which by segment="
            )
        return deepest[0]

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
    def repeats(self) -> dict[int, int]:
        """The firings that are not their block's first, by index, with their place among these."""
        first = {indices[0] for indices in self.visits if indices}
        return {f.index: k for k, f in enumerate(f for f in self._firings if f.index not in first)}

    @cached_property
    def sites(self) -> dict[str, Site]:
        """All sites between blocks by name, in no particular order."""
        whole = Boundary(None, None, "", 0, len(self) - 1)
        every = [Site(whole, hook, self) for hook in self.tree.sites]
        for boundary in self._boundaries:
            every += [Site(boundary, hook, self) for hook in self.loops[boundary.segment or ""].sites]
        return {site.name: site for site in every}

    @cached_property
    def hooks_between(self) -> tuple[str, ...]:
        """The hooks that exist between blocks, each once: ``hook_state_in``, ``hook_prelude_out``, ..."""
        inside = [hook for loop in self.loops.values() for hook in loop.sites]
        return tuple(dict.fromkeys([*self.tree.sites, *inside]))

    def fired_before(self, site: Site) -> int:
        """How many firings are over when a site is reached."""
        place = site.place
        if isinstance(place, Firing):
            return place.index
        if place.segment is None:
            return self._boundaries[0].first if self._boundaries else 0
        if site.hook not in ("hook_state_in", "hook_injected"):
            return place.last + 1
        body = self.loops[place.segment].body
        if site.hook == "hook_injected" and any(isinstance(part, Loop) for part in body):
            own = [f.index for f in self if f.segment == place.segment]
            return next(i for i in own if self[i].iteration == place.iteration)
        return place.first

    def boundary(self, segment: str, iteration: Iteration) -> Boundary:
        """One iteration of a loop, seen from outside its blocks.

        Raises:
            UnknownNameError: If there is none such.
        """
        found = self._boundary(segment, plain(iteration))
        if found is None:
            raise UnknownNameError(
                f"iteration {iteration} of {segment!r} does not exist: {self._describe_iterations(segment)}"
            )
        return found

    def _boundary(self, segment: str, iteration: Iteration) -> Boundary | None:
        here = (b for b in self._boundaries if b.segment == segment and b.iteration == iteration)
        return next(here, None)

    def between(self, hook: str, segment: str, iteration: Iteration) -> Site:
        """A site between blocks.

        Args:
            hook: Its name, ``"state_in"`` or ``"hook_state_in"``.
            segment: Its loop; ignored, as the iteration, by what exists once per forward.
            iteration: The iteration.

        Raises:
            UnknownNameError: If there is none such.
        """
        name = between_name(hook)
        place = self._boundary(segment, plain(iteration))
        for known in (name, place and f"{place.prefix}.{name}"):
            if known in self.sites:
                return self.sites[known]
        raise UnknownNameError(
            f"{hook!r} of {segment!r}, iteration {iteration}, does not exist as a site between blocks "
            f"(and no layer was given): {self.describe()}"
        )

    def find(self, segment: str, iteration: Iteration, layer: int) -> Firing:
        """The firing at (segment, iteration, layer).

        Raises:
            UnknownNameError: If there is none; the message says what there is.
        """
        self.require_segment(segment)
        iteration, layer = plain(iteration), whole(layer, "layer")
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

    def site(self, name: str) -> Site:
        """The site of a name, in either spelling.

        Whether the place has a hook of that name is for the model to say: a schedule knows blocks
        and the sites between them, not what is inside a block.

        Raises:
            UnknownNameError: If no firing or boundary has this name.
        """
        if name in self.sites:
            return self.sites[name]
        if match := _FLAT.fullmatch(name):
            index = int(match[1])
            if index >= len(self):
                raise UnknownNameError(
                    f"{name!r} does not exist: there are blocks {_range(len(self))}; {self.describe()}"
                )
            return Site(self._firings[index], match[2], self)
        match = _LOOPED.fullmatch(name)
        if match and match[1] in self.by_prefix:
            return Site(self.by_prefix[match[1]], match[2], self)
        raise UnknownNameError(f"{name!r} does not exist: {self.describe()}")

    def describe(self) -> str:
        """One sentence that says which segments, iterations, layers and sites there are."""
        parts = [
            f"{segment} has layers {_range(size)}"
            + (f" and {self._describe_iterations(segment)}" if segment in self.loops else "")
            for segment, size in self.segments.items()
        ]
        own = sorted(self.hooks_between)
        return "; ".join(parts) + (f"; between blocks: {', '.join(own)}" if own else "")

    def _describe_iterations(self, segment: str) -> str:
        if segment not in self.loops:
            return f"the segment {segment!r} is outside the loop (iteration=None)"
        path = [n for n in self.loops if self._encloses(n, segment)]
        return "iterations " + " x ".join(f"{n} {_range(self.loops[n].times)}" for n in path)

    def _encloses(self, outer: str, inner: str) -> bool:
        return outer == inner or any(loop.name == inner for loop in _loops(self.loops[outer].body))

    def with_times(self, **times: int) -> Schedule:
        """The same schedule with other numbers of iterations, by loop name.

        Raises:
            UnknownNameError: If there is no such loop.
            ValueError: If a number is no whole number of at least 1.
        """
        for name, n in times.items():
            if name not in self.loops:
                raise UnknownNameError(f"loop {name!r} does not exist: there are {', '.join(self.loops)}")
            times[name] = whole(n, f"recurrences of the loop {name!r}", 1)
        if all(self.loops[name].times == n for name, n in times.items()):
            return self

        def change(part: Blocks | Loop) -> Blocks | Loop:
            if isinstance(part, Blocks):
                return part
            body = [change(inner) for inner in part.body]
            return Loop(part.name, times.get(part.name, part.times), *body, sites=part.sites)

        return _made(Segments(*(change(part) for part in self.tree.parts), sites=self.tree.sites))


@lru_cache(maxsize=32)
def _made(tree: Segments) -> Schedule:
    """One schedule a tree, so that going back to a number of iterations finds the names again."""
    return Schedule(tree)


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
