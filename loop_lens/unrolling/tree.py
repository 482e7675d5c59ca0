"""The tree of segments from which a schedule is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from loop_lens.unrolling.numbers import whole

Iteration = int | tuple[int, ...] | None
"""An iteration of a loop: an int, a tuple (outermost first) in a nested loop, None outside loops."""


@dataclass(frozen=True)
class Blocks:
    """A run of physical blocks, each with weights of its own.

    Attributes:
        name: Name of the run; at the top level of a schedule it is also the segment's name.
        size: Number of blocks, at least 0.

    Example:
        >>> from loop_lens.unrolling import Blocks
        >>> Blocks("prelude", 2)
        Blocks(name='prelude', size=2)
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

    Example:
        >>> from loop_lens.unrolling import Blocks, Loop
        >>> inner = Loop("L", 2, Blocks("L", 4))
        >>> Loop("H", 3, inner, Blocks("H", 4)).times
        3
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
        times = whole(times, f"recurrences of the loop {name!r}", 1)
        if sum(isinstance(part, Blocks) for part in body) > 1:
            raise ValueError(f"the loop {name!r} has more than one run of blocks: nest or merge them")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "times", times)
        object.__setattr__(self, "body", body)
        object.__setattr__(self, "sites", tuple(sites))


@dataclass(frozen=True, init=False)
class Segments:
    """Segments that run one after the other: the root of a schedule.

    Attributes:
        parts: The segments in firing order.
        sites: Hook points that the model has once per forward, outside its blocks.

    Example:
        >>> from loop_lens.unrolling import Blocks, Loop, Schedule, Segments
        >>> tree = Segments(Blocks("prelude", 2), Loop("loop", 3, Blocks("core", 4)))
        >>> len(Schedule(tree))
        14
    """

    parts: tuple[Blocks | Loop, ...]
    sites: tuple[str, ...]

    def __init__(self, *parts: Blocks | Loop, sites: Iterable[str] = ()) -> None:
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "sites", tuple(sites))


class UnknownNameError(KeyError):
    """A hook name that the model does not have; the message lists what there is.

    Example:
        >>> try:
        ...     model.name("resid_post", iteration=9, layer=0)
        ... except loop_lens.UnknownNameError as error:
        ...     print(error)
        iteration 9 does not exist: iterations loop 0-7 ...
    """

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


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
