"""Tied clones and slots: a physical block's calls are seen, and its firings have modules of their own."""

from __future__ import annotations

import copy
from collections import OrderedDict
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from torch import nn

from loop_lens.unrolling.kv import past_length

Module = TypeVar("Module", bound=nn.Module)


def tied_clone(module: Module) -> Module:
    """Copy a module tree that keeps the very parameters and buffers of the original.

    The copies of each submodule share its dictionaries of parameters and buffers, not only the
    tensors in them: whatever replaces a parameter later (a dtype move, a folded norm,
    ``load_state_dict(assign=True)``) replaces it for all clones at once. Each copy has modules,
    hooks and plain containers of its own; all else that the tree refers to (configurations,
    functions, modules outside of it) is shared. Slots are left behind.

    Example:
        >>> from loop_lens.unrolling import tied_clone
        >>> linear = torch.nn.Linear(2, 2)
        >>> clone = tied_clone(linear)
        >>> clone is linear, clone.weight is linear.weight
        (False, True)
    """
    inside = list(module.modules())
    copies: dict[int, Any] = {id(m): own_class(m).__new__(own_class(m)) for m in inside}
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


class Caller(Protocol):
    """Who runs what slots intercept: an `Unroller`."""

    def call(self, slot: int, bare: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the next firing of a physical block."""
        ...

    def forward(self, offset: int = 0) -> AbstractContextManager[Any]:
        """Count the calls in this context as one forward."""
        ...

    def require_complete(self, run: Any) -> None:
        """Raise unless a forward that ended by itself ran all of its schedule."""
        ...


class Slot(nn.Module):
    """Base of the classes that are put over a module's own class."""

    _unroller: Caller
    _slot: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an opened model is not pickled: save it with model.save_pretrained(folder), and open it with "
            "loop_lens.boot(folder) in the other process"
        )


class BlockSlot(Slot):
    """A physical block whose calls go through the unroller."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._unroller.call(self._slot, super().__call__, args, kwargs)


class TrunkSlot(Slot):
    """The module whose forward calls the blocks."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._unroller.forward(past_length(args, kwargs)) as run:
            out = super().__call__(*args, **kwargs)
            self._unroller.require_complete(run)
            return out


def put_slot(module: nn.Module, slot: type[Slot], unroller: Caller, index: int) -> None:
    """Put a slot's class over a module's own. Its parameters, hooks and names stay as they are."""
    own = type(module)
    namespace = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    module.__class__ = type(own.__name__, (slot, own), namespace)
    slotted: Any = module
    slotted._unroller, slotted._slot = unroller, index


def take_slot(module: nn.Module) -> None:
    """Give a module its own class back."""
    if not isinstance(module, Slot):
        return
    slotted: Any = module
    slotted.__class__ = own_class(module)
    del slotted._unroller, slotted._slot


def own_class(module: nn.Module) -> type[nn.Module]:
    """A module's class without a slot over it."""
    if not isinstance(module, Slot):
        return type(module)
    return next(c for c in type(module).__mro__[1:] if not issubclass(c, Slot))
