"""Keywords that nobody reads are refused: what is passed on with ``**kwargs`` would swallow a misspelt one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

_DEPTHS = """
    H_cycles L_cycles loops max_loops mean_recurrence n_iterations n_loops n_recurrences num_iterations num_iters
    num_loops num_recurrences num_steps recurrence total_ut_steps ut_steps
"""
DEPTHS = frozenset(_DEPTHS.split())
"""What the families, and people, call the number of iterations."""


@lru_cache(maxsize=256)
def keywords_of(function: Callable[..., Any]) -> frozenset[str]:
    """The keywords that a function names, without those that its ``**kwargs`` takes."""
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(function).parameters.items()
    return frozenset(name for name, parameter in parameters if parameter.kind not in variable) - {"self"}


def takes_any(function: Callable[..., Any]) -> bool:
    """Whether a function takes keywords that it does not name."""
    kinds = (parameter.kind for parameter in inspect.signature(function).parameters.values())
    return inspect.Parameter.VAR_KEYWORD in kinds


def require_keywords(given: Iterable[str], accepted: Collection[str], call: str) -> None:
    """Raise unless every keyword is one that the call reads.

    Args:
        given: The keywords.
        accepted: Those that are read.
        call: What was called, for the message.

    Raises:
        TypeError: If one is not; names the nearest that is, or ``recurrences`` for a word for the number of
            iterations.
    """
    for name in given:
        if name in accepted:
            continue
        near = get_close_matches(name, accepted, 1, 0.5)
        hint = f": did you mean {near[0]!r}?" if near else ""
        if name in DEPTHS and "recurrences" in accepted:
            hint = ": the number of iterations is recurrences="
        raise TypeError(f"{call} got an unexpected keyword argument {name!r}{hint}")
