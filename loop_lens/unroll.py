"""Tied clones and slots: every firing of a shared block gets an identity of its own.

A `Slot` stands where a physical block stands and sees each of its calls. An `Unroller` knows the
schedule, so it can tell the k-th call of a block from the others and hand it to whoever wants to
run that firing differently. Nothing here depends on transformer-lens.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask

from loop_lens.schedule import Firing, Schedule

CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What transformers calls the key-value cache: 5.24 renamed it."""

Module = TypeVar("Module", bound=nn.Module)
Bare = Callable[..., Any]
Executor = Callable[["Run", Firing, Bare, tuple[Any, ...], dict[str, Any]], Any]


class Observer(Protocol):
    """Whoever watches the values between blocks."""

    def wants(self, site: str) -> bool:
        """Whether anyone would see this site's value."""
        ...

    def see(self, site: str, value: Tensor) -> Tensor:
        """Look at a value; what is returned goes on in its place."""
        ...


def tied_clone(module: Module) -> Module:
    """Copy a module tree that keeps the very parameters and buffers of the original.

    The copies of each submodule share its dictionaries of parameters and buffers, not only the
    tensors in them: whatever replaces a parameter later (a dtype move, a folded norm,
    ``load_state_dict(assign=True)``) replaces it for all clones at once. Each copy has modules,
    hooks and plain containers of its own; all else that the tree refers to (configurations,
    functions, modules outside of it) is shared. Slots are left behind.
    """
    inside = list(module.modules())
    copies: dict[int, Any] = {id(m): _own_class(m).__new__(_own_class(m)) for m in inside}
    for original in inside:
        copied = copies[id(original)].__dict__
        for key, value in original.__dict__.items():
            if key in ("_parameters", "_buffers"):
                copied[key] = value
            elif key not in ("_unroller", "_slot"):
                copied[key] = _with_copies(value, copies)
    return copies[id(module)]


def _with_copies(value: Any, copies: dict[int, Any]) -> Any:
    """A value whose containers are new and whose modules are the copies, where there are any."""
    kind: Any = type(value)
    if kind is dict or kind is OrderedDict:
        return kind((key, _with_copies(item, copies)) for key, item in value.items()) if value else kind()
    if kind is list or kind is tuple or kind is set:
        return kind(_with_copies(item, copies) for item in value) if value else kind()
    return copies.get(id(value), value)


@dataclass
class Run:
    """One forward in one thread.

    Attributes:
        calls: How often each physical block was called so far.
        start: Firings before this one are not run: the input passes through them.
        stop: The firing at which the forward ends, if any.
        residual: What enters the firing ``start`` instead of its input, if anything.
        rows: Which prompt each row of the batch belongs to [batch], None where row i is prompt i.
        offset: Positions before this forward's first, in its key-value cache.
        notes: Whatever an unroller's subclass keeps during one forward.
    """

    calls: list[int]
    start: int = 0
    stop: int | None = None
    residual: Tensor | None = None
    rows: Tensor | None = None
    offset: int = 0
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


def _renamed(name: str, loop: str, order: tuple[int, ...]) -> str:
    head, _, rest = name.partition(".")
    if head != loop:
        return name
    t, _, tail = rest.partition(".")
    return f"{loop}.{order[int(t)]}.{tail}"


class FiringCountError(RuntimeError):
    """A block was called more often in one forward than the schedule says."""


class Unroller:
    """Tells the firings of a model's blocks apart while its own forward runs.

    The trunk is the module whose forward calls the blocks. Counting starts anew whenever it is
    entered, in each thread for itself, so an aborted forward leaves nothing behind; gradient
    checkpointing inside a block does not count twice, since it repeats what is below the slot.

    Args:
        trunk: Module whose ``forward`` runs the loop.
        blocks: The physical blocks in the schedule's order.
        schedule: What fires when.
        cache_slots: Give each firing a slot of its own in the key-value cache. Off for models
            that number the slots themselves.
    """

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
        self.trunk, self.blocks, self.schedule = trunk, list(blocks), schedule
        self.cache_slots = cache_slots
        self.order: Order | None = None
        self.executor: Executor | None = None
        self.observer: Observer | None = None
        self._local = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Unroller:
        new = copy.copy(self)
        memo[id(self)] = new
        for key, value in self.__dict__.items():
            new.__dict__[key] = threading.local() if key == "_local" else copy.deepcopy(value, memo)
        return new

    def install(self) -> None:
        """Put slots over the blocks and the trunk. Parameters, names and hooks stay as they are.

        Raises:
            ValueError: If the model is unrolled already.
        """
        if isinstance(self.trunk, _Slot):
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
        runs: list[Run] = getattr(self._local, "runs", [])
        return runs[-1] if runs else None

    @contextmanager
    def forward(self, offset: int = 0) -> Generator[Run, None, None]:
        """Count the calls in this context as one forward. The trunk's slot enters it by itself."""
        runs: list[Run] = self._local.__dict__.setdefault("runs", [])
        window = self._local.__dict__.pop("window", {})
        run = Run([0] * len(self.blocks), offset=offset, **window)
        runs.append(run)
        try:
            yield run
        finally:
            runs.pop()

    @contextmanager
    def window(
        self,
        start: int = 0,
        stop: int | None = None,
        residual: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Generator[None, None, None]:
        """Run only the firings ``start`` to ``stop`` (excluded) in the next forward of this thread."""
        self._local.window = {"start": start, "stop": stop, "residual": residual, "rows": rows}
        try:
            yield
        finally:
            self._local.__dict__.pop("window", None)

    def call(self, slot: int, bare: Bare, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the next firing of a physical block. Outside a forward, the block itself."""
        run = self.run
        if run is None:
            return bare(*args, **kwargs)
        visit = run.calls[slot]
        visits = self.executed.visits[slot]
        if visit >= len(visits):
            raise FiringCountError(
                f"block {slot} was called more than {len(visits)} times in one forward, "
                "but the schedule has no more firings of it: give the schedule that the model runs"
            )
        run.calls[slot] += 1
        return self.fire(run, self.executed[visits[visit]], bare, args, kwargs)

    @property
    def executed(self) -> Schedule:
        """What runs: the schedule, unless iterations run in another order than named."""
        return self.schedule if self.order is None else self.order.executed

    def fire(
        self, run: Run, firing: Firing, bare: Bare, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one firing: skipped, bare, or by whoever runs firings differently."""
        if firing.index < run.start:
            return hidden_states(args, kwargs)
        if firing.index == run.start and run.residual is not None:
            args, kwargs = with_hidden_states(run.residual, args, kwargs)
        if self.cache_slots:
            # Architectures pass the cache under different names, some by position.
            args = tuple(self._slotted(value, firing) for value in args)
            kwargs = {key: self._slotted(value, firing) for key, value in kwargs.items()}
        if self.executor is None:
            return bare(*args, **kwargs)
        named = firing if self.order is None else self.order.named[firing.index]
        return self.executor(run, named, bare, args, kwargs)

    def wants(self, site: str) -> bool:
        """Whether the observer would see this site's value in the forward under way."""
        run = self.run
        site = site if self.order is None else self.order.name(site)
        if self.observer is None or run is None or not self.observer.wants(site):
            return False
        # What comes before the first firing that runs is computed from a stand-in.
        return run.residual is None or self.schedule.fired_before(site) > run.start

    def site(self, name: str, value: Tensor) -> Tensor:
        """Pass a value between blocks to the observer, who may replace it."""
        if self.observer is None or not self.wants(name):
            return value
        return self.observer.see(name if self.order is None else self.order.name(name), value)

    def _slotted(self, value: Any, firing: Firing) -> Any:
        return self._cache_slot(value, firing) if isinstance(value, Cache) else value

    def _cache_slot(self, cache: Cache, firing: Firing) -> CacheSlot:
        visits = self.executed.visits[firing.block]
        if firing.index == visits[0]:
            return CacheSlot(cache, firing.block, firing.block)
        later = self._later_slots.get(firing.index, 0)
        return CacheSlot(cache, len(self.blocks) + later, firing.block)

    @property
    def _later_slots(self) -> dict[int, int]:
        known: tuple[Schedule, dict[int, int]] | None = self.__dict__.get("_slot_table")
        if known is None or known[0] is not self.executed:
            first = {visits[0] for visits in self.executed.visits if visits}
            later = (firing.index for firing in self.executed if firing.index not in first)
            known = (self.executed, {index: k for k, index in enumerate(later)})
            self.__dict__["_slot_table"] = known
        return known[1]


class LoopBody(Unroller):
    """An unroller that also knows what its model's loop means.

    Attributes:
        block_path: Where transformer-lens finds the blocks, from the model's root.
        non_additive_because: Why the stream is not the sum of its components, None where it is.
        fold_unsound_because: Why norms cannot be folded into weights, None where they can.
    """

    block_path: str
    non_additive_because: str | None = None
    fold_unsound_because: str | None = None

    def set_times(self, **times: int) -> None:
        """Change the numbers of iterations, by loop name."""
        self.schedule = self.schedule.with_times(**times)

    @contextmanager
    def reordered(self, order: tuple[int, ...]) -> Generator[None, None, None]:
        """Run the outermost loop's iterations in another order; see `Order`."""
        if self.order is not None:
            raise RuntimeError("the iterations run in another order already: leave that context first")
        names = self.schedule
        loop = names.main_loop
        self.set_times(**{loop: len(order)})
        executed, self.schedule = self.schedule, names
        self.order = Order.of(names, executed, order)
        try:
            yield
        finally:
            self.order = None
            self.set_times(**{loop: names.loops[loop].times})
            self.schedule = names

    def require_resumable(self, start: int, prelude_out: Tensor | None) -> dict[str, Any]:
        """What the model's forward needs besides the residual to begin at the firing ``start``.

        Raises:
            ValueError: If the residual alone does not determine the rest.
        """
        return {}

    def resume_at(self, firing: int) -> int | None:
        """The last firing up to ``firing`` from which a forward can be resumed, None for none."""
        return firing

    @property
    def injects(self) -> bool:
        """Whether iterations are given the prelude's output again."""
        return False

    def injection(self, state: Tensor, injected: Tensor, prelude_out: Tensor) -> Tensor:
        """What was injected into ``state``, given what came of it; all [batch pos d_model].

        Raises:
            ValueError: If the model has no injection.
        """
        raise ValueError("this model's loop has no injection: the state is all that enters an iteration")

    def inject(self, state: Tensor, e: Tensor) -> Tensor:
        """The state [batch pos d_model] after the injection of e [batch pos d_model]."""
        return state + e

    @property
    def ends_normed(self) -> bool:
        """Whether what leaves an iteration of the outermost loop has been through the final norm."""
        return False

    @property
    def reads_iterations(self) -> bool:
        """Whether the model was made to be read out after any iteration."""
        return False

    def enter_coda(self, state: Tensor) -> Tensor:
        """What enters the coda, or the final norm, when the loop ends with a state [batch pos d_model].

        Raises:
            ValueError: If that takes more than the state.
        """
        return state

    @property
    def initial_state(self) -> Any:
        """What the state before the first iteration is made from, None where there is no choice."""
        return None

    def set_initial_state(self, value: Any) -> None:
        """Choose the state before the first iteration."""
        warnings.warn("initial_state is ignored: this model's loop starts from its own input", stacklevel=3)


class CacheSlot:
    """A key-value cache seen by one firing: whatever layer the block asks for, it gets its own.

    The first firing of a block has the slot that the plain model would use; the others follow
    behind the plain model's slots.
    """

    def __init__(self, cache: Any, slot: int, like: int) -> None:
        self._cache, self._slot, self._like = cache, slot, like

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Add keys and values to the firing's slot, as ``transformers.Cache.update``."""
        layers = self._cache.layers
        replicates = getattr(self._cache, "layer_class_to_replicate", None) is not None
        while not replicates and len(layers) <= self._slot:
            layers.append(_fresh_layer(layers[self._like]))
        return self._cache.update(keys, values, self._slot, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the firing's slot."""
        return 0 if self._slot >= len(self._cache.layers) else self._cache.get_seq_length(self._slot)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _fresh_layer(layer: Any) -> Any:
    window = getattr(layer, "sliding_window", None)
    if type(layer).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
        raise ValueError(
            f"a looped model needs a cache that can grow by layers, got one of {type(layer).__name__}: "
            "use transformers.DynamicCache"
        )
    return type(layer)() if window is None else type(layer)(sliding_window=window)


class _Slot(nn.Module):
    """Base of the classes that are put over a module's own class."""

    _unroller: Unroller
    _slot: int


class BlockSlot(_Slot):
    """A physical block whose calls go through the unroller."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._unroller.call(self._slot, super().__call__, args, kwargs)


class TrunkSlot(_Slot):
    """The module whose forward calls the blocks."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._unroller.forward(past_length(args, kwargs)):
            return super().__call__(*args, **kwargs)


def put_slot(module: nn.Module, slot: type[_Slot], unroller: Unroller, index: int) -> None:
    """Put a slot's class over a module's own. Its parameters, hooks and names stay as they are."""
    own = type(module)
    namespace = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    module.__class__ = type(own.__name__, (slot, own), namespace)
    module.__dict__["_unroller"], module.__dict__["_slot"] = unroller, index


def take_slot(module: nn.Module) -> None:
    """Give a module its own class back."""
    if not isinstance(module, _Slot):
        return
    slotted: Any = module
    slotted.__class__ = _own_class(module)
    del module.__dict__["_unroller"], module.__dict__["_slot"]


def _own_class(module: nn.Module) -> type[nn.Module]:
    """A module's class without a slot over it."""
    if not isinstance(module, _Slot):
        return type(module)
    return next(c for c in type(module).__mro__[1:] if not issubclass(c, _Slot))


def past_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Positions in the key-value cache that a call passes, under whatever name; 0 without one."""
    caches = (value for value in (*kwargs.values(), *args) if isinstance(value, Cache))
    return next((int(cache.get_seq_length()) for cache in caches), 0)


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The stream that enters a block, however its caller passes it."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    return kwargs["hidden_states"]


def with_hidden_states(
    value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with another stream entering the block."""
    if args and isinstance(args[0], Tensor):
        return (value, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": value}


def map_output(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Apply a function to the stream that leaves a block, a tensor or the first of a tuple."""
    if isinstance(output, tuple):
        return (function(output[0]), *output[1:])
    return function(output)


def output_stream(output: Any) -> Tensor:
    """The stream that leaves a block."""
    return output[0] if isinstance(output, tuple) else output


def common_parent(model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
    """The innermost module that contains all blocks and has a forward of its own."""
    names = {id(module): name for name, module in model.named_modules()}
    missing = [block for block in blocks if id(block) not in names]
    if missing:
        raise ValueError(f"{type(missing[0]).__name__} is not a submodule of {type(model).__name__}")
    paths = [names[id(block)].split(".") for block in blocks]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    if len(blocks) == 1:
        shared = shared[:-1]
    while shared and isinstance(model.get_submodule(".".join(shared)), nn.ModuleList | nn.ModuleDict):
        shared.pop()
    return model.get_submodule(".".join(shared)) if shared else model
