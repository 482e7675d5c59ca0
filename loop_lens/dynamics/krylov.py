"""Leading eigenvalues and singular values of matrices that are known by their products alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""Each row's matrix times its vector, [row size] to [row size]."""
_SPENT = 1e-10  # of a product's norm: float64 noise is 1e-16, what is left of float32 products 1e-7


class Leading(NamedTuple):
    """The modulus of each row's leading value [row], and the norm of its vector's residual, a bound on the error."""

    value: Tensor
    error: Tensor


def largest_eigenvalue(product: Product, rows: int, size: int, *, steps: int, seed: int) -> Leading:
    """Largest modulus of an eigenvalue, by an Arnoldi process for all rows at once; finds complex pairs, too."""
    steps = min(steps, size)
    basis = torch.zeros(rows, steps, size, dtype=torch.float64)
    basis[:, 0] = _first(rows, size, seed)
    hessenberg = torch.zeros(rows, steps, steps, dtype=torch.float64)
    left = torch.zeros(rows, dtype=torch.float64)
    for k in range(steps):
        moved = product(basis[:, k])
        rest, hessenberg[:, : k + 1, k] = _orthogonal(moved, basis[:, : k + 1])
        vector, left = _unit(rest, moved)
        if k + 1 < steps:
            hessenberg[:, k + 1, k] = left
            basis[:, k + 1] = vector
    values, vectors = torch.linalg.eig(hessenberg)
    largest = values.abs().argmax(-1)
    tail = vectors[torch.arange(rows), -1, largest].abs()
    return Leading(values.abs().amax(-1), left * tail)


def largest_singular_value(
    product: Product, transposed: Product, rows: int, size: int, *, steps: int, seed: int
) -> Leading:
    """Largest singular value, by Golub and Kahan's bidiagonalisation for all rows at once."""
    steps = min(steps, size)
    right = torch.zeros(rows, steps, size, dtype=torch.float64)
    right[:, 0] = _first(rows, size, seed)
    left = torch.zeros_like(right)
    bidiagonal = torch.zeros(rows, steps, steps, dtype=torch.float64)
    left_over = torch.zeros(rows, dtype=torch.float64)
    for k in range(steps):
        moved = product(right[:, k])
        rest, _ = _orthogonal(moved, left[:, :k])
        left[:, k], bidiagonal[:, k, k] = _unit(rest, moved)
        back = transposed(left[:, k])
        rest, _ = _orthogonal(back, right[:, : k + 1])
        vector, left_over = _unit(rest, back)
        if k + 1 < steps:
            bidiagonal[:, k, k + 1] = left_over
            right[:, k + 1] = vector
    u, s, _ = torch.linalg.svd(bidiagonal)
    return Leading(s[:, 0], left_over * u[:, -1, 0].abs())


def _first(rows: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    return vector / vector.norm(dim=-1, keepdim=True)


def _orthogonal(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """What of each row's vector is orthogonal to a basis [row k size], and its coefficients [row k]."""
    along = torch.zeros(basis.shape[:2], dtype=torch.float64)
    for _ in range(2):  # once more against rounding
        part = (basis @ vector[..., None])[..., 0]
        vector = vector - (part[:, None] @ basis)[:, 0]
        along += part
    return vector, along


def _unit(rest: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit length with their lengths; zero where the Krylov space is spent."""
    length, reach = rest.norm(dim=-1), whole.norm(dim=-1)
    spent = length <= _SPENT * reach
    unit = torch.where(spent[:, None], 0.0, rest / length.clamp_min(torch.finfo(torch.float64).tiny)[:, None])
    return unit, torch.where(spent, 0.0, length)
