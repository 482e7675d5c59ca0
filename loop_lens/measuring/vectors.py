"""Lengths and angles of vectors, in float64: right wherever the vectors are finite, NaN where they mean nothing."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors over their largest entry, so that no square overflows or fades, and that entry."""
    wide = x.double()
    largest = wide.abs().amax(-1, keepdim=True)
    return wide / largest.where(largest > 0, 1.0), largest.squeeze(-1)


def lengths(x: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest"]:
    """Euclidean lengths."""
    unit, largest = _scaled(x)
    return largest * unit.norm(dim=-1)


def distances(a: Float[Tensor, "*rest d"], b: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest"]:
    """Lengths of the differences."""
    return lengths(a.double() - b.double())


def directions(x: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest d"]:
    """Vectors of length 1; of zeros, NaN."""
    unit, _ = _scaled(x)
    return unit / unit.norm(dim=-1, keepdim=True)


def cosines(a: Float[Tensor, "*rest d"], b: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest"]:
    """Cosines of the angles between vectors; NaN where one is zero."""
    return torch.linalg.vecdot(directions(a), directions(b))


def ratios(a: Tensor, b: Tensor) -> Tensor:
    """One number over another; NaN where the other is zero."""
    return a / b.masked_fill(b == 0, float("nan"))


def wide(x: Tensor) -> Tensor:
    """float64 as it is, anything narrower in float32: for what is bounded, such as attention."""
    return x if x.dtype == torch.float64 else x.float()
