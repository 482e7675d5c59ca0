"""The forms that prompts come in, told apart without a model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

TAKEN = (
    "text or tokens: a text, ids [pos] or [prompt pos], a tokenizer's output, chat messages, or an iterable, "
    "column or data set of these"
)

_COLUMNS = {"input_ids": Tensor, "messages": list, "text": str}  # the first one that a row has is read
_NOT_PROMPTS: Any = (bytes, bytearray, memoryview, Set, Tensor, Mapping, str)
_NOTHING: Any = object()


@dataclass(frozen=True)
class Form:
    """One prompt as it was given.

    Attributes:
        content: A text, ids [pos], or the messages of one conversation.
        mask: Which ids are tokens rather than padding [pos], where that was given.
    """

    content: str | Tensor | list[Any]
    mask: Tensor | None = None


def forms_of(prompts: Any, name: str) -> Iterator[Form]:
    """The prompts that an argument holds, one by one; iterables are read no further than asked for.

    Args:
        prompts: What a user gave.
        name: The argument's name, for messages.

    Raises:
        TypeError: If it holds anything but text or tokens; says what.
        ValueError: If a mask does not fit its ids.
    """
    at_once = _without_iterating(prompts, name)
    if at_once is not None:
        yield from at_once
        return
    if not _is_listing(prompts):
        raise TypeError(f"{name} must be {TAKEN}; got {_described(prompts)}")
    rest: Iterator[Any] = iter(prompts)
    first = next(rest, _NOTHING)
    if first is _NOTHING:
        return
    if _is_id(first) or _is_message(first):  # what follows belongs to the same prompt
        whole = _one([first, *rest])
        if whole is None:
            kind = "ids" if _is_id(first) else "chat messages"
            raise TypeError(f"{name} must be {TAKEN}; got {kind} and other things in one list")
        yield Form(whole)
        return
    for i, item in enumerate(itertools.chain([first], rest)):
        within = _without_iterating(item, name, i)
        if within is None and _is_listing(item):
            items = list(item)
            whole = _one(items) if items else torch.empty(0, dtype=torch.long)
            within = None if whole is None else iter([Form(whole)])
        if within is None:
            raise TypeError(
                f"prompt {i} of {name} is neither text nor tokens but {_described(item)}: {name} must be {TAKEN}"
            )
        yield from within


def count_prompts(prompts: Any) -> int | None:
    """Number of prompts, as `read_prompts` takes them; None where only reading them tells.

    Example:
        >>> from loop_lens.prompts import count_prompts
        >>> count_prompts(prompts), count_prompts("a b c"), count_prompts([1, 2, 3])
        (2, 1, 1)
        >>> count_prompts({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]]})
        2
        >>> count_prompts(iter(prompts)) is None
        True
    """
    if _one(prompts) is not None:
        return 1
    columns = _columns(prompts)
    if columns is not None:
        column = next((columns[c] for c in _COLUMNS if columns.get(c) is not None), None)
        return count_prompts(column if isinstance(prompts, Mapping) or column is None else list(column))
    if isinstance(prompts, list | tuple):
        several = (Mapping, Tensor, np.ndarray)
        counts = [count_prompts(p) if isinstance(p, several) else 1 for p in prompts]
        return None if None in counts else sum(c or 0 for c in counts)
    if isinstance(prompts, Tensor | np.ndarray | Sequence) or hasattr(prompts, "num_rows"):
        return len(prompts)
    return None


def _without_iterating(value: Any, name: str, i: int | None = None) -> Iterator[Form] | None:
    """The prompts of a value that is one prompt, a matrix of ids, a row, or columns; None for the rest."""
    whole = _one(value)
    if whole is not None:
        return iter([Form(whole)])
    columns = None if _is_message(value) else _columns(value)
    if columns is not None:
        return _rows(columns, name, i)
    array = _array(value)
    return map(Form, array) if array is not None and array.ndim == 2 else None


def _rows(columns: Mapping[str, Any], name: str, i: int | None = None) -> Iterator[Form]:
    """The prompts of a row, or of columns."""
    column = next((c for c in _COLUMNS if columns.get(c) is not None), None)
    if column is None:
        which = name if i is None else f"row {i} of {name}"
        raise TypeError(
            f"{which} has the columns {', '.join(map(str, columns))}: give one called 'text', 'input_ids' or "
            "'messages', or the column itself"
        )
    content = columns[column]
    wrong = f"the column {column!r} of {name} holds"
    if isinstance(content, Mapping):
        raise TypeError(f"{wrong} {_described(content)}")
    given = columns.get("attention_mask") if column == "input_ids" else None
    masks = iter(given if isinstance(given, Iterable) and _one(content) is None else [given])
    for form in forms_of(content, name):
        if not isinstance(form.content, _COLUMNS[column]):
            raise TypeError(f"{wrong} {_described(form.content)}")
        if given is not None:
            form = replace(form, mask=_mask(next(masks, _NOTHING), form.content, name))
        yield form
    if given is not None and next(masks, _NOTHING) is not _NOTHING:
        raise ValueError(f"the attention_mask of {name} has more rows than its input_ids")


def _mask(given: Any, ids: Any, name: str) -> Tensor:
    """A row of an attention mask, as booleans."""
    if given is _NOTHING:
        raise ValueError(f"the attention_mask of {name} has fewer rows than its input_ids")
    try:
        mask = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the attention_mask of {name} holds {_described(given)} for a row") from error
    mask = mask[0] if mask.ndim == 2 and len(mask) == 1 else mask
    if mask.shape != ids.shape:
        raise ValueError(
            f"the attention_mask of {name} has the shape {tuple(mask.shape)} where input_ids have "
            f"{tuple(ids.shape)}: give one number per token"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"the attention_mask of {name} holds other numbers than 0 (padding) and 1 (a token)")
    return mask.bool().cpu()


def _one(value: Any) -> str | Tensor | list[Any] | None:
    """The content of a value that is exactly one prompt, else None."""
    if isinstance(value, str):
        return str(value)
    array = _array(value)
    if array is not None:
        return array if array.ndim == 1 else None
    if isinstance(value, list | tuple | range) and len(value):
        if all(map(_is_id, value)):
            return torch.tensor([int(v) for v in value])
        if all(map(_is_message, value)):
            return list(value)
    return None


def _array(value: Any) -> Tensor | None:
    """Ids in a tensor or array, of any shape; what is empty has no type to be wrong."""
    if isinstance(value, np.ndarray) and (
        value.dtype.kind in "iu" or (value.dtype.kind == "f" and not value.size)
    ):
        value = torch.from_numpy(value.astype(np.int64))
    if not isinstance(value, Tensor):
        return None
    whole_numbers = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return value.detach().long() if whole_numbers or not value.numel() else None


def _is_listing(value: Any) -> bool:
    """Whether iterating over a value gives prompts in order: a tensor's rows are told apart elsewhere."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "UO" and value.ndim > 0
    return isinstance(value, Iterable) and not isinstance(value, _NOT_PROMPTS)


def _is_id(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and _array(value) is not None
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and not any(c in value for c in _COLUMNS)


def _columns(value: Any) -> Mapping[str, Any] | None:
    """A mapping, or a table whose columns are had by name (pandas, polars)."""
    if isinstance(value, Mapping):
        return value
    names = getattr(value, "columns", None)
    if names is None or not hasattr(value, "__getitem__"):
        return None
    return {c: value[c] for c in names if isinstance(c, str)}


def _described(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return f"a {str(value.dtype).removeprefix('torch.')} {kind} {list(value.shape)}"
    if _is_message(value):
        return "one chat message alone, where a conversation is a list of them"
    if isinstance(value, list | tuple) and value:
        return f"a {type(value).__name__} that begins with {_described(value[0])}"
    return "None" if value is None else f"a {type(value).__name__}" + (" alone" if _is_id(value) else "")
