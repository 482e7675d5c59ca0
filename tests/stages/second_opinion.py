"""Entropy and singular values by numpy, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np


def entropy(p: Any, axis: int = -1) -> Any:
    """Shannon entropy in nats of shares along an axis."""
    p = np.asarray(p, dtype=np.float64)
    p = p / p.sum(axis=axis, keepdims=True)
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=axis)


def squared_shares(resid: Any) -> Any:
    """Shares of the squared singular values, largest first."""
    squares = np.linalg.svd(np.asarray(resid, dtype=np.float64), compute_uv=False) ** 2
    return squares / squares.sum()
