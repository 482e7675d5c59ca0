"""Slots: classes put over a module's own, which see its calls."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from loop_lens.unrolling.kv import past_length

SLOT_ATTRIBUTES = ("_unroller", "_slot")
"""What a slot keeps on the module that it is put over."""


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
