"""Leading eigenvalues and singular values of matrices that are known by their products alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
_SPENT = 1e-10  # of a product's norm: float64 noise is 1e-16, what is left of float32 products 1e-7


class Leading(NamedTuple):
    """The leading value of each row's matrix.

    Attributes:
        value: Its modulus [row].
        error: Norm of the residual of its vector [row]; for a singular value a bound on its error.
    """

    value: Tensor
    error: Tensor


def largest_eigenvalue(product: Product, rows: int, size: int, *, steps: int, seed: int) -> Leading:
    """Largest modulus of an eigenvalue, by an Arnoldi process for all rows at once.

    Unlike power iteration it also finds complex pairs.

    Args:
        product: Each row's matrix times its vector, [row size] to [row size].
        rows: Number of matrices.
        size: Of each.
        steps: Size of the Krylov space.
        seed: Seed of the first vectors.
    """
    steps = min(steps, size)
    vector = _first(rows, size, seed)
    basis = [vector]
    hessenberg = torch.zeros(rows, steps, steps, dtype=torch.float64)
    left = torch.zeros(rows, dtype=torch.float64)
    for k in range(steps):
        moved = product(basis[k])
        rest, along = _orthogonal(moved, basis)
        hessenberg[:, : k + 1, k] = along.T
        vector, left = _unit(rest, moved)
        if k + 1 < steps:
            hessenberg[:, k + 1, k] = left
            basis.append(vector)
    values, vectors = torch.linalg.eig(hessenberg)
    largest = values.abs().argmax(-1)
    tail = vectors[torch.arange(rows), -1, largest].abs()
    return Leading(values.abs().amax(-1), left * tail)


def largest_singular_value(
    product: Product, transposed: Product, rows: int, size: int, *, steps: int, seed: int
) -> Leading:
    """Largest singular value, by Golub and Kahan's bidiagonalisation for all rows at once.

    Args:
        product: Each row's matrix times its vector, [row size] to [row size].
        transposed: Each row's transposed matrix times its vector.
        rows: Number of matrices.
        size: Of each.
        steps: Size of the Krylov spaces.
        seed: Seed of the first vectors.
    """
    steps = min(steps, size)
    right = [_first(rows, size, seed)]
    lefts: list[Tensor] = []
    bidiagonal = torch.zeros(rows, steps, steps, dtype=torch.float64)
    left_over = torch.zeros(rows, dtype=torch.float64)
    for k in range(steps):
        moved = product(right[k])
        rest, _ = _orthogonal(moved, lefts)
        u, bidiagonal[:, k, k] = _unit(rest, moved)
        lefts.append(u)
        back = transposed(u)
        rest, _ = _orthogonal(back, right)
        v, left_over = _unit(rest, back)
        if k + 1 < steps:
            bidiagonal[:, k, k + 1] = left_over
            right.append(v)
    u, s, _ = torch.linalg.svd(bidiagonal)
    return Leading(s[:, 0], left_over * u[:, -1, 0].abs())


def _first(rows: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    return vector / vector.norm(dim=-1, keepdim=True)


def _orthogonal(vector: Tensor, basis: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What of each row's vector is orthogonal to a basis, and its coefficients along it [basis row]."""
    along = torch.zeros(len(basis), len(vector), dtype=torch.float64)
    for _ in range(2):  # once more against rounding
        for j, other in enumerate(basis):
            part = torch.linalg.vecdot(vector, other)
            along[j] += part
            vector = vector - part[:, None] * other
    return vector, along


def _unit(rest: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit length with their lengths; zero where the Krylov space is spent."""
    length, reach = rest.norm(dim=-1), whole.norm(dim=-1)
    spent = length <= _SPENT * reach
    unit = torch.where(spent[:, None], 0.0, rest / length.clamp_min(torch.finfo(torch.float64).tiny)[:, None])
    return unit, torch.where(spent, 0.0, length)
