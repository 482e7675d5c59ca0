"""Tied clones: copies of a module tree that share its weights, run its torch hooks, and notice when it changes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from itertools import chain
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from loop_lens.unrolling.slots import SLOT_ATTRIBUTES, own_class

Module = TypeVar("Module", bound=nn.Module)
Copies = dict[int, Any]

HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
_WEIGHTS = ("_parameters", "_buffers")
_LIVE = frozenset((*HOOK_TABLES, *_WEIGHTS, *SLOT_ATTRIBUTES, "_modules"))


class FollowedHooks(MutableMapping[Any, Any], dict[Any, Any]):  # pyright: ignore[reportGeneralTypeIssues]
    """A clone's torch hooks: those of the module that it was cloned from, whenever they came, then its own.

    torch demands a dict; nothing is kept in it.

    Attributes:
        followed: The table of the original, as it is at any time.
        own: What was registered on the clone itself.
    """

    __slots__ = ("__weakref__", "followed", "own")

    def __init__(self, followed: Mapping[Any, Any], own: Mapping[Any, Any]) -> None:
        self.followed, self.own = followed, OrderedDict(own or ())

    def __reduce__(self) -> Any:
        return type(self), (self.followed, self.own)

    def __len__(self) -> int:
        return len(self.followed) + len(self.own)

    def __iter__(self) -> Iterator[Any]:
        return chain(self.followed, self.own)

    def __getitem__(self, key: Any) -> Any:
        return self.own[key] if key in self.own else self.followed[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.own[key] = value

    def __delitem__(self, key: Any) -> None:
        del self.own[key]

    def clear(self) -> None:
        """Take the clone's own hooks out."""
        self.own.clear()

    def move_to_end(self, key: Any, last: bool = True) -> None:
        """Let one of the clone's own hooks run last, or first, among them."""
        self.own.move_to_end(key, last)


def own_hooks(table: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The hooks of a table that were registered on this very module."""
    return table.own if isinstance(table, FollowedHooks) else table


def tied_clone(module: Module, *, follow: bool = False) -> Module:
    """Copy a module tree that keeps the very parameters and buffers of the original.

    The copies of each submodule share its dictionaries of parameters and buffers, not only the
    tensors in them: whatever replaces a parameter later (a dtype move, a folded norm,
    ``load_state_dict(assign=True)``) replaces it for all clones at once. Each copy has modules,
    hooks and plain containers of its own, and what is bound to a module of the tree (a ``forward``
    set on the instance) is bound to its copy; all else that the tree refers to (configurations,
    functions, modules outside of it) is shared. Slots are left behind.

    Args:
        module: The original, or a clone of it.
        follow: Whether torch hooks of the original run in the clone as well, whenever they are
            registered or removed. A clone of a clone follows what that one follows.

    Example:
        >>> from loop_lens.unrolling import tied_clone
        >>> linear = torch.nn.Linear(2, 2)
        >>> clone = tied_clone(linear)
        >>> clone is linear, clone.weight is linear.weight
        (False, True)
    """
    inside = list(module.modules())
    copies: Copies = {id(m): own_class(m).__new__(own_class(m)) for m in inside}
    for original in inside:
        copied = vars(copies[id(original)])
        for key, value in vars(original).items():
            if key in _WEIGHTS:
                copied[key] = value
            elif type(value) is FollowedHooks:
                copied[key] = FollowedHooks(value.followed, value.own)
            elif follow and key in HOOK_TABLES:
                copied[key] = FollowedHooks(value, {})
            elif key not in SLOT_ATTRIBUTES:
                copied[key] = with_copies(value, copies)
    return copies[id(module)]


def with_forward(module: Module, forward: Callable[..., Any]) -> Module:
    """A module that computes something else inside all that is put around its class's forward.

    That is its torch hooks, and functions set in the forward's place on the instance that call it, such as
    accelerate's.
    """
    view: Any = type(module).__new__(type(module))
    own: Any = type(module).forward

    def inside(_: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    copies: Copies = {id(module): view, id(own): inside}
    around = vars(module).get("forward", MethodType(own, module))
    vars(view).update(vars(module) | {"forward": with_copies(around, copies)})
    if "_old_forward" in vars(module):  # accelerate's wrapper looks it up on the module
        vars(view)["_old_forward"] = with_copies(vars(module)["_old_forward"], copies)
    return view


def with_copies(value: Any, copies: Copies) -> Any:
    """A value whose containers are new and whose modules are the copies, where there are any."""
    rebuild = _REBUILD.get(type(value))
    return copies.get(id(value), value) if rebuild is None else rebuild(value, copies)


def _mapping(value: Any, copies: Copies) -> Any:
    kind = type(value)
    return kind((key, with_copies(item, copies)) for key, item in value.items()) if value else kind()


def _container(value: Any, copies: Copies) -> Any:
    kind = type(value)
    return kind(with_copies(item, copies) for item in value) if value else kind()


def _method(value: MethodType, copies: Copies) -> Any:
    owner = copies.get(id(value.__self__))
    return value if owner is None else MethodType(with_copies(value.__func__, copies), owner)


def _partial(value: partial[Any], copies: Copies) -> Any:
    new = partial(
        with_copies(value.func, copies), *_container(value.args, copies), **_mapping(value.keywords, copies)
    )
    vars(new).update(_mapping(vars(value), copies))
    return new


def _function(value: FunctionType, copies: Copies) -> Any:
    """A function that closes over the copies, or has them as defaults, if it has modules of the tree."""
    if id(value) in copies:
        return copies[id(value)]
    if not (value.__closure__ or value.__defaults__ or value.__kwdefaults__):
        return value
    copies[id(value)] = value  # it may close over itself
    cells = tuple(_cell(cell, copies) for cell in value.__closure__ or ())
    defaults = tuple(_held(item, copies) for item in value.__defaults__ or ())
    by_name = {key: _held(item, copies) for key, item in (value.__kwdefaults__ or {}).items()}
    before = (*(value.__closure__ or ()), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    if all(new is old for new, old in zip((*cells, *defaults, *by_name.values()), before, strict=True)):
        return value
    new = FunctionType(value.__code__, value.__globals__, value.__name__, defaults, cells)
    new.__kwdefaults__ = by_name
    vars(new).update(_mapping(vars(value), copies))
    copies[id(value)] = new
    return new


def _cell(cell: CellType, copies: Copies) -> CellType:
    try:
        content = cell.cell_contents
    except ValueError:  # not filled yet
        return cell
    new = _held(content, copies)
    return cell if new is content else CellType(new)


def _held(value: Any, copies: Copies) -> Any:
    """What a function holds: containers stay shared, since it may write to them."""
    return value if type(value) in _CONTAINERS else with_copies(value, copies)


_CONTAINERS = (dict, OrderedDict, list, tuple, set)
_PLAIN: tuple[type, ...] = (bool, int, float, complex, str, set, torch.dtype, torch.device)
_REBUILD: dict[type, Callable[[Any, Copies], Any]] = {
    dict: _mapping,
    OrderedDict: _mapping,
    list: _container,
    tuple: _container,
    set: _container,
    MethodType: _method,
    partial: _partial,
    FunctionType: _function,
}


class Shape:
    """What a module tree consists of, and the values its modules hold, beside weights and torch hooks.

    Args:
        root: The root of the tree.
    """

    def __init__(self, root: nn.Module) -> None:
        self.parts = [
            (m, own_class(m), dict(m._modules), {k: _snapshot(v) for k, v in _attributes(m).items()})
            for m in root.modules()
        ]

    def changed_values(self) -> list[tuple[nn.Module, str]] | None:
        """Which values (numbers, text, tensors, modes) were set since this was asked last.

        None if anything else changed: a module was put in, taken out or given another class or function,
        an attribute is new or gone.
        """
        changed: list[tuple[nn.Module, str]] = []
        for module, kind, children, then in self.parts:
            now = _attributes(module)
            if own_class(module) is not kind or module._modules != children or now.keys() != then.keys():
                return None
            for key, value in now.items():
                if value is then[key] or _same(then[key], value):
                    continue
                if not (_is_value(then[key]) and _is_value(value)):
                    return None
                then[key] = _snapshot(value)
                changed.append((module, key))
        return changed


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key not in _LIVE}


def _snapshot(value: Any) -> Any:
    return with_copies(value, {}) if type(value) in _CONTAINERS else value


def _same(then: Any, now: Any) -> bool:
    """Whether a value is what it was, containers compared by what they hold."""
    if type(then) is not type(now):
        return False
    if isinstance(now, dict):
        return then.keys() == now.keys() and all(_same(then[key], item) for key, item in now.items())
    if isinstance(now, list | tuple):
        return len(then) == len(now) and all(map(_same, then, now))
    return then is now or (isinstance(now, _PLAIN) and then == now)


def _is_value(value: Any) -> bool:
    return value is None or isinstance(value, (Tensor, *_PLAIN))
