"""Which cells of a sweep run together.

A cell is one intervention, and its forward is the same as the base run's before the first firing
that it touches and before the first position. Cells are batched so that little of that is computed
again. A batch starts at the earliest firing and position that any of its cells touches; the rows of a
cell join it at the cell's own firing, where the model allows that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loop_lens.unrolling.sites import Site

OVERHEAD = 64
"""What one firing costs besides its tokens, in tokens. On two CPU cores a forward of 12 x 12 tokens of
SmolLM2 takes 2.7 times one of 12, so a firing costs about 65 tokens more than it has; a model with
d_model 256 was measured at 68."""
ENOUGH = 2048
"""Tokens of a firing beyond which more of them no longer make each cheaper (measured: 1.00 of the time
per token at 450 tokens, 1.03 at 1,000, 1.1 at 4,000, where the MLP's values leave the cache)."""
_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128, 256, 1 << 30)


@dataclass(frozen=True)
class Cell:
    """One intervention of a sweep.

    Attributes:
        index: Its place in the result.
        sites: Where it intervenes.
        position: The position that it patches, None for all.
        head: The head that it patches, None for all.
        start: Firing from which it must run, -1 for from the tokens on.
        offset: First position at which it differs from the base run.
    """

    index: tuple[int, ...]
    sites: tuple[Site, ...]
    position: int | None
    head: int | None
    start: int
    offset: int


@dataclass(frozen=True)
class Batch:
    """Cells that run in one forward.

    Attributes:
        cells: The cells, in the order of their starts.
        start: Firing from which the forward runs, -1 for from the tokens on.
        offset: Position from which it runs.
        joins: Whether each cell's rows join at its own start, or all at the batch's.
    """

    cells: tuple[Cell, ...]
    start: int
    offset: int
    joins: bool = False

    def copies_at(self, firing: int) -> int:
        """How many cells' rows a firing has."""
        return sum(cell.start <= firing for cell in self.cells) if self.joins else len(self.cells)


def pack(
    cells: Sequence[Cell],
    *,
    n_firings: int,
    n_positions: int,
    n_prompts: int,
    max_tokens: int,
    joins: bool = False,
) -> list[Batch]:
    """Group cells into batches of little estimated cost.

    Cells are sorted by firing and position and cut into blocks of neighbouring firings and
    positions; of a few block sizes, the cheapest is taken.

    Args:
        cells: The cells.
        n_firings: Firings of a forward.
        n_positions: Positions of a prompt.
        n_prompts: Rows that one cell takes.
        max_tokens: Most tokens (rows times positions) of one batch, by the memory budget.
        joins: Whether rows may join at their own firing.
    """
    if not cells:
        return []
    starts = sorted({cell.start for cell in cells})
    offsets = sorted({cell.offset for cell in cells})
    by_place: dict[tuple[int, int], list[Cell]] = {}
    for cell in cells:
        by_place.setdefault((cell.start, cell.offset), []).append(cell)
    most = max(1, min(max_tokens, ENOUGH))
    best: tuple[float, list[Batch]] | None = None
    for a in _sizes(len(starts)):
        for b in _sizes(len(offsets)):
            batches: list[Batch] = []
            for i in range(0, len(starts), a):
                for j in range(0, len(offsets), b):
                    block = [
                        cell
                        for start in starts[i : i + a]
                        for offset in offsets[j : j + b]
                        for cell in by_place.get((start, offset), ())
                    ]
                    batches += _fitting(block, n_positions, n_prompts, most, joins)
            cost = sum(_cost(batch, n_firings, n_positions, n_prompts) for batch in batches)
            if best is None or cost < best[0]:
                best = cost, batches
    assert best is not None
    return best[1]


def _sizes(n: int) -> list[int]:
    return [size for size in _SIZES if size < n] + [n]


def _fitting(
    cells: list[Cell], n_positions: int, n_prompts: int, max_tokens: int, joins: bool
) -> list[Batch]:
    """One block's batches: several where the budget does not hold it."""
    batches: list[Batch] = []
    rest = cells
    while rest:
        offset = min(cell.offset for cell in rest)
        fit = max(1, max_tokens // (n_prompts * (n_positions - offset)))
        now, rest = rest[:fit], rest[fit:]
        start = min(cell.start for cell in now)
        batches.append(Batch(tuple(now), start, min(cell.offset for cell in now), joins and start >= 0))
    return batches


def _cost(batch: Batch, n_firings: int, n_positions: int, n_prompts: int) -> float:
    """Estimated cost in tokens times firings."""
    each = n_prompts * (n_positions - batch.offset)
    if not batch.joins:
        return (n_firings - max(batch.start, 0) + 1) * (OVERHEAD + len(batch.cells) * each)
    rows = sum(n_firings - cell.start + 1 for cell in batch.cells)
    return (n_firings - batch.start + 1) * OVERHEAD + rows * each


def cost_ratio(batches: Sequence[Batch], n_firings: int, n_positions: int) -> tuple[float, float]:
    """Firings times positions computed, and the least that the cells need, over one full forward each."""
    cells = [cell for batch in batches for cell in batch.cells]
    full = len(cells) * n_firings * n_positions
    done = sum(
        (n_firings - max(cell.start if batch.joins else batch.start, 0)) * (n_positions - batch.offset)
        for batch in batches
        for cell in batch.cells
    )
    least = sum((n_firings - max(c.start, 0)) * (n_positions - c.offset) for c in cells)
    return done / full, least / full
