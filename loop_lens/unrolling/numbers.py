"""Whole numbers as users bring them: Python's own, numpy's, pandas' and tensors of no dimension."""

from __future__ import annotations

import operator
from typing import Any


def whole(value: Any, what: str, least: int | None = None) -> int:
    """A whole number as Python's own.

    Args:
        value: What a user gave.
        what: What it is, for the message.
        least: The smallest number that makes sense.

    Raises:
        ValueError: If it is no whole number (a bool is none), or below ``least``.
    """
    number = None
    # torch takes tensors of one entry, and of bools, for whole numbers, too.
    if not (
        isinstance(value, bool) or getattr(value, "ndim", 0) or "bool" in str(getattr(value, "dtype", ""))
    ):
        try:
            number = operator.index(value)
        except TypeError:
            number = None
    if number is None or (least is not None and number < least):
        raise ValueError(
            f"{what} must be a whole number{'' if least is None else f' of at least {least}'}, got {value!r}"
        )
    return number


def plain(chosen: Any) -> Any:
    """What a user chose (one, a tuple, several, a slice or None), with Python's own whole numbers in it.

    Raises:
        ValueError: If a bool is among them.
    """
    if chosen is None or isinstance(chosen, slice | str):
        return chosen
    if isinstance(chosen, tuple):
        return tuple(plain(item) for item in chosen)
    if type(chosen) is int:
        return chosen
    if isinstance(chosen, bool):
        raise ValueError(f"{chosen} is no whole number: give iterations, layers, heads and positions as such")
    if getattr(chosen, "ndim", 0) == 0 and hasattr(chosen, "__index__"):
        return whole(chosen, "what is chosen")
    return [plain(item) for item in chosen] if hasattr(chosen, "__iter__") else chosen
