"""What every measured result can do: become a table, go to disk and come back."""

from __future__ import annotations

import reprlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import field, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal, Self

import pandas as pd
import torch
from torch import Tensor

from loop_lens.measuring.files import read_file, write_file

_HOW = "loop_lens.merge"


How = Literal["same", "add", "append", "max", "first"]


def merged(how: How, *, dim: int = 0, fill: float | None = None, **options: Any) -> Any:
    """A dataclass field of a `Result`, and how it merges.

    Args:
        how: ``"same"`` (both must be equal; what a plain field does), ``"add"``, ``"append"``, ``"max"`` (NaN
            counts for nothing), or ``"first"`` (the first result's is kept).
        dim: The dimension along which tensors are appended, that of the prompts.
        fill: What a shorter prompt has where only longer ones have a position: before tensors are appended,
            the dimension after ``dim`` is filled up with it.
        **options: As for `dataclasses.field`.
    """
    return field(metadata={_HOW: (how, dim, fill)}, **options)


class _Brief(reprlib.Repr):
    """Values in one line: tensors by their dtype and shape, the first few items of everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.maxtuple = self.maxlist = self.maxdict = 6
        self.maxstring = self.maxother = 60

    def repr_Tensor(self, value: Tensor, level: int) -> str:
        """A tensor."""
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"

    def repr_instance(self, x: Any, level: int) -> str:
        """Anything that has a representation of its own, a nested result too."""
        return " ".join(super().repr_instance(x, level).split())


_BRIEF, _WIDTH = _Brief(), 100


class Result:
    """Base of the frozen dataclasses that measurements return.

    A field may be a tensor, a dict of tensors by text, another `Result`, or what JSON can say
    (numbers, text, None, and tuples and dicts of them; tuples stay tuples). A field that is a `Result` merges
    as such, any other as `merged` says, or must be the same.

    Example:
        >>> from loop_lens.dynamics import Convergence, convergence
        >>> parts = [convergence(model, text, progress=False) for text in prompts]
        >>> merged = parts[0].merge(parts[1])
        >>> merged.save("convergence.safetensors")
        >>> again = Convergence.load("convergence.safetensors")
        >>> again.to_dataframe().equals(merged.to_dataframe())
        True
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__repr__ = Result.__repr__  # a dataclass writes one of its own unless the class has one
        if "to_dataframe" in vars(cls):
            setattr(cls, "to_dataframe", _with_plain_iterations(cls.to_dataframe))  # noqa: B010

    def __repr__(self) -> str:
        lines = [f"  {f.name}={_BRIEF.repr(getattr(self, f.name))}" for f in fields(self)]  # type: ignore[arg-type]
        cut = [line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3]}..." for line in lines]
        return "\n".join([f"{type(self).__name__}(", *cut, ")"])

    def merge(self, other: Self) -> Self:
        """The result on both results' prompts.

        Raises:
            ValueError: If they were measured in different ways; names what differs.
        """
        if type(self) is not type(other):
            raise ValueError(f"a {type(self).__name__} merges with its like, not with {type(other).__name__}")
        changed: dict[str, Any] = {}
        for each in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, Result) and isinstance(theirs, Result):
                changed[each.name] = mine.merge(theirs)
            elif _HOW in each.metadata:
                changed[each.name] = _merge(mine, theirs, *each.metadata[_HOW])
            else:
                require_alike(self, other, each.name)
        return replace(self, **changed)  # type: ignore[type-var]

    @abstractmethod
    def to_dataframe(self) -> pd.DataFrame:
        """The result as a tidy table; iterations of nested loops are text as in names, ``"1.2"``."""

    def to_parquet(self, path: str | Path) -> None:
        """Write the table of `to_dataframe`."""
        self.to_dataframe().to_parquet(path, index=False)

    def save(self, path: str | Path) -> None:
        """Write the whole result as one safetensors file, which `load` reads again."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        self._collect("", tensors, plain)
        write_file(path, type(self).__name__, tensors, plain)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            UnreadableError: If the file holds another kind or version of result, or is damaged.
        """
        with read_file(path, cls.__name__) as (tensors, plain):
            return cls._rebuild("", tensors, plain)

    def _collect(self, prefix: str, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        for each in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            key, value = prefix + each.name, getattr(self, each.name)
            if isinstance(value, Tensor):
                tensors[key] = value
                plain[key] = {"kind": "tensor"}
            elif isinstance(value, Result):
                plain[key] = {"kind": "result"}
                value._collect(f"{key}/", tensors, plain)
            elif isinstance(value, dict) and value and all(isinstance(v, Tensor) for v in value.values()):
                tensors.update({f"{key}/{name}": tensor for name, tensor in value.items()})
                plain[key] = {"kind": "tensors", "names": list(value)}
            else:
                plain[key] = {"kind": "plain", "value": value}

    @classmethod
    def _rebuild(cls, prefix: str, tensors: dict[str, Tensor], plain: dict[str, Any]) -> Self:
        given: dict[str, Any] = {}
        own = {prefix + each.name for each in fields(cls)}  # type: ignore[arg-type]
        if unknown := {key for key in plain if key.rpartition("/")[0] == prefix[:-1]} - own:
            raise ValueError(f"{min(unknown)!r} is no field of a {cls.__name__}")
        for each in fields(cls):  # type: ignore[arg-type]
            key = prefix + each.name
            about = plain[key]
            if about["kind"] == "tensor":
                given[each.name] = tensors[key]
            elif about["kind"] == "result":
                kind = _result_type(each.type)
                given[each.name] = kind._rebuild(f"{key}/", tensors, plain)
            elif about["kind"] == "tensors":
                given[each.name] = {name: tensors[f"{key}/{name}"] for name in about["names"]}
            else:
                given[each.name] = _with_tuples(about["value"])
        return cls(**given)


def _with_plain_iterations(table: Callable[..., pd.DataFrame]) -> Callable[..., pd.DataFrame]:
    """A table's maker whose columns hold one type each, as files of tables want it."""

    @wraps(table)
    def plain(self: Any, *args: Any, **kwargs: Any) -> pd.DataFrame:
        made = table(self, *args, **kwargs)
        for name in made.select_dtypes("object").columns:
            if any(isinstance(value, tuple) for value in made[name]):
                made[name] = [None if value is None else _dotted(value) for value in made[name]]
        return made

    return plain


def _dotted(value: Any) -> str:
    return ".".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _result_type(annotation: Any) -> type[Result]:
    name = annotation if isinstance(annotation, str) else annotation.__name__
    known = {kind.__name__: kind for kind in _subclasses(Result)}
    return known[name.split(" | ")[0]]


def _subclasses(kind: type[Result]) -> list[type[Result]]:
    return [each for direct in kind.__subclasses__() for each in (direct, *_subclasses(direct))]


def _with_tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_with_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return value


def _merge(mine: Any, theirs: Any, how: How, dim: int, fill: float | None) -> Any:
    if mine is None or theirs is None:
        return None if how == "append" else mine
    if how == "first":
        return mine
    if isinstance(mine, dict):
        return {key: _merge(value, theirs[key], how, dim, fill) for key, value in mine.items()}
    if how == "append":
        return _append(mine, theirs, dim, fill) if isinstance(mine, Tensor) else (*mine, *theirs)
    if how == "max":
        return torch.fmax(mine, theirs) if isinstance(mine, Tensor) else max(mine, theirs)
    return mine + theirs


def _append(mine: Tensor, theirs: Tensor, dim: int, fill: float | None) -> Tensor:
    if fill is not None:
        size = max(mine.shape[dim + 1], theirs.shape[dim + 1])
        mine, theirs = (_filled(values, dim + 1, size, fill) for values in (mine, theirs))
    return torch.cat([mine, theirs], dim)


def _filled(values: Tensor, dim: int, size: int, fill: float) -> Tensor:
    missing = list(values.shape)
    missing[dim] = size - values.shape[dim]
    return torch.cat([values, values.new_full(missing, fill)], dim)


def require_alike(a: Result, b: Result, *names: str) -> None:
    """Raise unless two results that are to be merged have the same of everything named."""
    for name in names:
        _require_same(name, getattr(a, name), getattr(b, name))


def _require_same(name: str, one: Any, other: Any) -> None:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key, value in one.items():
            _require_same(key, value, other[key])
        return
    same = torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other
    if not same:
        raise ValueError(f"these results do not merge: their {name} differ ({one} and {other})")
