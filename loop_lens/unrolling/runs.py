"""What a forward runs (`Plan`), one forward in one thread (`Run`), and iterations in another order (`Order`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.sites import Firing


@dataclass
class Run:
    """One forward in one thread.

    Attributes:
        calls: How often each physical block was called so far.
        plan: What it runs, whatever the model is set to meanwhile.
        start: Firings before this one are not run: the input passes through them.
        stop: The firing at which the forward ends, if any.
        residual: What enters the firing ``start`` instead of its input, if anything.
        rows: Which prompt each row of the batch belongs to [batch], None where row i is prompt i.
        offset: Positions before this forward's first, in its key-value cache.
        fired: Firings so far.
        seen: Names of the sites between blocks passed so far, as they run.
        notes: Whatever an unroller's subclass keeps during one forward.

    Example:
        >>> with model.body.forward() as run:
        ...     run.calls  # of the prelude's, the core's two and the coda's block
        [0, 0, 0, 0]
    """

    calls: list[int]
    plan: Plan
    start: int = 0
    stop: int | None = None
    residual: Tensor | None = None
    rows: Tensor | None = None
    offset: int = 0
    fired: int = 0
    seen: set[str] = field(default_factory=set[str])
    notes: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Order:
    """Iterations of the outermost loop that run in another order than they are named in.

    Attributes:
        executed: The schedule of what runs.
        named: The firing, by its own name, of each firing that runs.
        loop: The outermost loop.
        order: The iterations' names, in the order in which they run.
    """

    executed: Schedule
    named: tuple[Firing, ...]
    loop: str
    order: tuple[int, ...]

    @classmethod
    def of(cls, names: Schedule, executed: Schedule, order: tuple[int, ...]) -> Order:
        """Match what runs with the names that it keeps."""
        loop = names.main_loop
        prefixes = [_renamed(firing.prefix, loop, order) for firing in executed]
        return cls(executed, tuple(names.by_prefix[prefix] for prefix in prefixes), loop, order)

    def name(self, site: str) -> str:
        """The name of a site between blocks, from where it runs."""
        return _renamed(site, self.loop, self.order)


@dataclass(frozen=True)
class Plan:
    """What a forward runs, and under which names.

    Attributes:
        schedule: The firings by name.
        order: Where iterations run in another order than they are named in.
    """

    schedule: Schedule
    order: Order | None = None

    @property
    def executed(self) -> Schedule:
        """What runs: the schedule, unless iterations run in another order."""
        return self.schedule if self.order is None else self.order.executed


def _renamed(name: str, loop: str, order: tuple[int, ...]) -> str:
    head, _, rest = name.partition(".")
    if head != loop:
        return name
    t, _, tail = rest.partition(".")
    return f"{loop}.{order[int(t)]}.{tail}"
