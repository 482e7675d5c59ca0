"""Tied clones and slots: every firing of a shared block gets an identity of its own.

A `Slot` stands where a physical block stands and sees each of its calls. An `Unroller` knows the
schedule, so it can tell the k-th call of a block from the others and hand it to whoever wants to
run that firing differently. Nothing here depends on transformer-lens.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache

from loop_lens.unrolling.calls import Bare, hidden_states, with_hidden_states
from loop_lens.unrolling.kv import CacheSlot
from loop_lens.unrolling.runs import Order, Plan, Run
from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.sites import Firing
from loop_lens.unrolling.slots import BlockSlot, Slot, TrunkSlot, put_slot, take_slot

Executor = Callable[[Run, Firing, Bare, tuple[Any, ...], dict[str, Any]], Any]


class Observer(Protocol):
    """Whoever watches the values between blocks."""

    def wants(self, site: str) -> bool:
        """Whether anyone would see this site's value."""
        ...

    def see(self, site: str, value: Tensor) -> Tensor:
        """Look at a value; what is returned goes on in its place."""
        ...


class FiringCountError(RuntimeError):
    """A forward that is not what the schedule says: more or fewer firings, another order, a site left out.

    Example:
        >>> from loop_lens.unrolling import Blocks, FiringCountError, Schedule, Segments, Unroller
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2))
        >>> unroller = Unroller(net, [net[0]], Schedule(Segments(Blocks("stack", 1))))
        >>> unroller.install()
        >>> with unroller.forward():
        ...     try:
        ...         net[0](net[0](torch.ones(2)))
        ...     except FiringCountError as error:
        ...         print(error)
        block 0 was called more than 1 times in one forward, ...
    """


class _Context:
    """A plan in force within a context; None once that was left. A call's own cannot be set from outside."""

    def __init__(self, unroller: Unroller, plan: Plan, call: bool) -> None:
        self.unroller, self.call = unroller, call
        self.plan: Plan | None = plan

    def leave(self) -> None:
        self.plan = None
        _CONTEXTS.set(tuple(context for context in _CONTEXTS.get() if context.plan is not None))


# Innermost last. Of one thread or asynchronous task, as a forward is.
_CONTEXTS: ContextVar[tuple[_Context, ...]] = ContextVar("plans in force", default=())


class _Thread(threading.local):
    """What one thread runs: its forwards under way, and the window of the next one."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.window: dict[str, Any] = {}


class Unroller:
    """Tells the firings of a model's blocks apart while its own forward runs.

    The trunk is the module whose forward calls the blocks. Counting starts anew whenever it is
    entered, in each thread for itself, so an aborted forward leaves nothing behind; gradient
    checkpointing inside a block does not count twice, since it repeats what is below the slot.

    Args:
        trunk: Module whose ``forward`` runs the loop.
        blocks: The physical blocks in the schedule's order.
        schedule: What fires when, unless a context says otherwise.
        cache_slots: Give each firing a slot of its own in the key-value cache. Off for models
            that number the slots themselves.

    Attributes:
        may_end_early: Whether a forward may run fewer firings than the schedule has (adaptive halting).

    Example:
        >>> from loop_lens.unrolling import Blocks, Loop, Schedule, Segments, Unroller
        >>> class Twice(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.block = torch.nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.block(self.block(x))
        >>> net, fired = Twice(), []
        >>> unroller = Unroller(net, [net.block], Schedule(Segments(Loop("loop", 2, Blocks("core", 1)))))
        >>> def executor(run, firing, bare, args, kwargs):
        ...     fired.append(firing.prefix)
        ...     return bare(*args, **kwargs)
        >>> unroller.executor = executor
        >>> unroller.install()
        >>> _ = net(torch.ones(2))
        >>> fired
        ['loop.0.blocks.0', 'loop.1.blocks.0']
    """

    may_end_early: bool = False

    def __init__(
        self,
        trunk: nn.Module,
        blocks: Sequence[nn.Module],
        schedule: Schedule,
        *,
        cache_slots: bool = True,
    ) -> None:
        if len(blocks) != schedule.n_blocks:
            raise ValueError(
                f"the schedule names {schedule.n_blocks} physical blocks, the model has {len(blocks)}"
            )
        if len({id(block) for block in blocks}) < len(blocks):
            raise ValueError(
                "one module stands twice in the list of blocks: list it once, and let a Loop of the schedule say how "
                "often it runs"
            )
        self.trunk, self.blocks = trunk, list(blocks)
        self._base = schedule
        self.cache_slots = cache_slots
        self.executor: Executor | None = None
        self.observer: Observer | None = None
        self._thread = _Thread()
        self._extras: dict[int, int | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Unroller:
        new = memo[id(self)] = copy.copy(self)
        memo[id(self._thread)] = _Thread()  # nobody runs the copy yet
        vars(new).update(copy.deepcopy(vars(self), memo))
        new.base = self.schedule
        return new

    @property
    def base(self) -> Schedule:
        """What forwards run outside all contexts."""
        return self._base

    @base.setter
    def base(self, schedule: Schedule) -> None:
        self._base = schedule

    @property
    def plan(self) -> Plan:
        """What a forward that begins here runs: the plan of the innermost context, or the base."""
        context = self._innermost(calls=True)
        plan = None if context is None else context.plan
        return Plan(self.base) if plan is None else plan

    @property
    def schedule(self) -> Schedule:
        """The firings of a forward that begins here, by name. Setting it lasts as long as the innermost context."""
        return self.plan.schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        context = self._innermost(calls=False)
        if context is None:
            self.base = schedule
        else:
            context.plan = Plan(schedule)

    @property
    def order(self) -> Order | None:
        """The order of a forward that begins here, where it is another than iterations are named in."""
        return self.plan.order

    @contextmanager
    def within(self, plan: Plan, entered: Any = None, *, call: bool = False) -> Generator[Any, None, None]:
        """A plan for the forwards in this context, in this thread or task.

        Contexts may be left in any order: what is in force is always the innermost that was not left.

        Args:
            plan: The plan.
            entered: What ``with`` gives.
            call: Whether the context is that of one call, whose plan stays when the schedule is set meanwhile.
        """
        context = _Context(self, plan, call)
        try:
            try:
                _CONTEXTS.set((*_CONTEXTS.get(), context))
                yield entered
            finally:
                context.leave()
        finally:
            context.leave()  # again, in case an interrupt came between

    def _innermost(self, *, calls: bool) -> _Context | None:
        for context in reversed(_CONTEXTS.get()):
            if context.unroller is self and context.plan is not None and (calls or not context.call):
                return context
        return None

    def install(self) -> None:
        """Put slots over the blocks and the trunk. Parameters, names and hooks stay as they are.

        Raises:
            ValueError: If the model is unrolled already.
        """
        if isinstance(self.trunk, Slot):
            raise ValueError("this model is unrolled already: use the HookedLoopedTransformer made from it")
        for index, block in enumerate(self.blocks):
            put_slot(block, BlockSlot, self, index)
        put_slot(self.trunk, TrunkSlot, self, 0)

    def remove(self) -> None:
        """Take the slots away again."""
        for module in (self.trunk, *self.blocks):
            take_slot(module)

    @property
    def run(self) -> Run | None:
        """The forward under way in this thread, if any."""
        runs = self._thread.runs
        return runs[-1] if runs else None

    @contextmanager
    def forward(self, offset: int = 0) -> Generator[Run, None, None]:
        """Count the calls in this context as one forward. The trunk's slot enters it by itself."""
        thread = self._thread
        run = Run([0] * len(self.blocks), self.plan, offset=offset, **thread.window)
        thread.window = {}
        thread.runs.append(run)
        try:
            yield run
        finally:
            thread.runs.pop()

    @contextmanager
    def window(
        self,
        start: int = 0,
        stop: int | None = None,
        residual: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Generator[None, None, None]:
        """Run only the firings ``start`` to ``stop`` (excluded) in the next forward of this thread."""
        self._thread.window = {"start": start, "stop": stop, "residual": residual, "rows": rows}
        try:
            yield
        finally:
            self._thread.window = {}

    def call(self, slot: int, bare: Bare, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the next firing of a physical block. Outside a forward, the block itself."""
        run = self.run
        if run is None:
            return bare(*args, **kwargs)
        visit = run.calls[slot]
        executed = run.plan.executed
        visits = executed.visits[slot]
        if visit >= len(visits):
            raise FiringCountError(
                f"block {slot} was called more than {len(visits)} times in one forward, "
                "but the schedule has no more firings of it: give the schedule that the model runs"
            )
        run.calls[slot] += 1
        return self.fire(run, executed[visits[visit]], bare, args, kwargs)

    def fire(
        self, run: Run, firing: Firing, bare: Bare, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one firing: skipped, bare, or by whoever runs firings differently."""
        if firing.index != run.fired:
            raise FiringCountError(
                f"{firing.prefix} ran as number {run.fired} of this forward, and the schedule has it as number "
                f"{firing.index}: give the blocks and the schedule in the order in which the model runs them"
            )
        run.fired += 1
        if firing.index < run.start:
            return self.in_form(hidden_states(args, kwargs), firing, bare, args, kwargs)
        if firing.index == run.start and run.residual is not None:
            args, kwargs = with_hidden_states(run.residual, args, kwargs)
        if self.cache_slots:
            # Architectures pass the cache under different names, some by position.
            executed = run.plan.executed
            args = tuple(self._slotted(value, firing, executed) for value in args)
            kwargs = {key: self._slotted(value, firing, executed) for key, value in kwargs.items()}
        if self.executor is None:
            return self._note_form(firing, bare(*args, **kwargs))
        order = run.plan.order
        named = firing if order is None else order.named[firing.index]
        return self._note_form(firing, self.executor(run, named, bare, args, kwargs))

    def in_form(
        self, stream: Tensor, firing: Firing, bare: Bare, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A stream in the form in which a firing's block returns it."""
        if firing.block not in self._extras:  # it never ran, so no key-value cache holds anything yet
            free = tuple(None if isinstance(value, Cache) else value for value in args)
            named = {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                self._note_form(firing, bare(*free, **named))
        extras = self._extras[firing.block]
        return stream if extras is None else (stream, *[None] * extras)

    def _note_form(self, firing: Firing, out: Any) -> Any:
        """Remember how much a block returns beside the stream, None for a bare tensor."""
        if firing.block not in self._extras:
            self._extras[firing.block] = len(out) - 1 if isinstance(out, tuple) else None
        return out

    def require_complete(self, run: Run) -> None:
        """Raise unless a forward that ended by itself ran its schedule and passed every site that has hooks.

        Raises:
            FiringCountError: If a firing or a site that has a name never came, so that hooks there did nothing.
        """
        plan = run.plan
        if self.may_end_early:
            return
        if run.fired < len(plan.executed):
            raise FiringCountError(
                f"the forward ended after {run.fired} firings, and {plan.executed[run.fired].prefix} never ran: give "
                "the schedule that the model runs, in a body that tells the model its numbers of iterations"
            )
        for name in plan.schedule.sites if plan.order is None else ():
            if name not in run.seen and self.wants(name):
                raise FiringCountError(
                    f"{name} has hooks, and the forward never passed it: a body calls site() for every site that its "
                    "schedule names"
                )

    def wants(self, site: str) -> bool:
        """Whether the observer would see this site's value in the forward under way."""
        run = self.run
        if self.observer is None or run is None:
            return False
        order = run.plan.order
        site = site if order is None else order.name(site)
        if not self.observer.wants(site):
            return False
        # What comes before the first firing that runs is computed from a stand-in.
        return run.residual is None or run.plan.schedule.sites[site].fired_before > run.start

    def site(self, name: str, value: Tensor) -> Tensor:
        """Pass a value between blocks to the observer, who may replace it."""
        run = self.run
        if run is not None:
            run.seen.add(name)
        if self.observer is None or run is None or not self.wants(name):
            return value
        order = run.plan.order
        return self.observer.see(name if order is None else order.name(name), value)

    def _slotted(self, value: Any, firing: Firing, executed: Schedule) -> Any:
        return self._cache_slot(value, firing, executed) if isinstance(value, Cache) else value

    def _cache_slot(self, cache: Cache, firing: Firing, executed: Schedule) -> CacheSlot:
        if firing.index == executed.visits[firing.block][0]:
            return CacheSlot(cache, firing.block, firing.block)
        later = executed.repeats[firing.index]
        return CacheSlot(cache, len(self.blocks) + later, firing.block)
