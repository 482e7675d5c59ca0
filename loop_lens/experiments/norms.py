"""The three norm placements that the experiments compare."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

NORMS: dict[str, dict[str, Any]] = {
    "pre": {"block_norm": "pre"},
    "huginn": {"block_norm": "post_residual"},
    "ouro": {"block_norm": "sandwich", "loop_norm": True},
}
"""Fields of a `LoopedConfig`: pre-norm; on the stream, after each branch; around each, and after each iteration."""


def require_one_of(what: str, value: str, allowed: Collection[str]) -> None:
    """Raise unless a value is one of those that exist."""
    if value not in allowed:
        raise ValueError(f"{what}={value!r} is unknown: choose one of {', '.join(allowed)}")
