"""Random permutations and cycles by the batch, each of them in one split for good."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loop_lens.data.task import Split, require_split

TEST_SHARE = 8
"""One structure in eight belongs to the test split."""


def draw_permutations(n: int, size: int, generator: torch.Generator) -> Int[Tensor, "n size"]:
    """Permutations of 0 to size - 1, uniformly."""
    return torch.rand(n, size, generator=generator).argsort(1)


def draw_cycles(n: int, size: int, generator: torch.Generator) -> Int[Tensor, "n size"]:
    """Successors f(0), ..., f(size - 1) of permutations that are one cycle, uniformly."""
    order = draw_permutations(n, size, generator)
    return torch.empty_like(order).scatter_(1, order, order.roll(-1, 1))


def in_test(structures: Int[Tensor, "n size"]) -> Bool[Tensor, " n"]:
    """Whether structures belong to the test split, by a hash of their numbers."""
    # Odd multipliers and a modulus of 2^31 keep products below 2^63; high bits are mixed best.
    code = torch.full(structures.shape[:1], 0x2545F491, dtype=torch.long)
    for column in structures.unbind(1):
        code = ((code ^ (column + 1)) * 0x5851F42D) % (1 << 31)
        code = code ^ (code >> 15)
    return (code >> 4) % TEST_SHARE == 0


def draw_of_split(
    draw: Callable[[int], Int[Tensor, "n size"]], n: int, split: Split
) -> Int[Tensor, "n size"]:
    """Draw structures until n of them belong to a split.

    Args:
        draw: Draws the number of structures that it is given.
        n: Number of structures to return.
        split: The split that they belong to.
    """
    require_split(split)
    drawn: list[Tensor] = []
    missing, share = n, TEST_SHARE if split == "test" else 1
    while missing > 0:
        candidates = draw(2 * share * missing + 8)
        kept = candidates[in_test(candidates) == (split == "test")][:missing]
        drawn.append(kept)
        missing -= len(kept)
    return torch.cat(drawn)
