"""Pointer chasing: follow arrows through a random cycle, one hop an arrow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loop_lens.data.structures import draw_cycles, draw_of_split, draw_permutations
from loop_lens.data.symbols import symbol_tokenizer
from loop_lens.data.task import IGNORED, Split, Task, TaskBatch, require_level

SYMBOLS = 8
QUERY, ARROW = "?", "->"


class HopsTask(Task):
    """Pairs (a, f(a)) of one random 8-cycle in random order, a query, a start, and h arrows.

    ``a c  f b  ...  ? a -> -> ->``: the i-th arrow is to name f applied i times to the start. Nothing
    else is in the sequence, so hop i must come from hop i - 1 through the residual stream. With any
    permutation instead of one full cycle, short cycles would give answers away.

    Example:
        >>> task = loop_lens.data.HopsTask()
        >>> task.prompt([2, 0, 1, 4, 5, 6, 7, 3], start=0, hops=2)
        'a c b a c b d e e f f g g h h d ? a -> ->'
        >>> task.batch(4, level=2, generator=torch.Generator().manual_seed(0)).input_ids.shape
        torch.Size([4, 20])
    """

    name = "hops"
    levels = 6

    def __init__(self, *, queries: Sequence[int] = ()) -> None:
        """Hops with one query a sequence, or several.

        Args:
            queries: Number of queries in a sequence at levels 1, 2, ...; one at levels beyond. More
                queries mean more labels for the same pairs, which is what learning the first hop
                waits for.
        """
        if any(not 1 <= q <= SYMBOLS for q in queries):
            raise ValueError(f"queries must be between 1 and {SYMBOLS}, the number of starts, got {queries}")
        self.queries = tuple(queries)
        self.tokenizer = symbol_tokenizer([*"abcdefgh", QUERY, ARROW])
        self.vocab_size = len(self.tokenizer)

    def batch(self, n: int, *, level: int, generator: torch.Generator, split: Split = "train") -> TaskBatch:
        """Draw sequences of ``level`` hops; every level exists."""
        require_level(level, None, "hops")
        f = draw_of_split(lambda k: draw_cycles(k, SYMBOLS, generator), n, split)
        order = draw_permutations(n, SYMBOLS, generator)
        pairs = torch.stack([order, f.gather(1, order)], -1).flatten(1)
        several = self.queries[level - 1] if level <= len(self.queries) else 1
        starts = draw_permutations(n, SYMBOLS, generator)[:, :several]
        reached = [starts]
        for _ in range(level):
            reached.append(f.gather(1, reached[-1]))
        answers = torch.stack(reached[1:], -1)
        query = torch.full((n, several, 1), SYMBOLS)
        asked = torch.cat([query, starts[..., None], torch.full_like(answers, SYMBOLS + 1)], -1)
        silent = torch.full((n, several, 2), IGNORED)
        return TaskBatch(
            torch.cat([pairs, asked.flatten(1)], 1),
            torch.cat([torch.full_like(pairs, IGNORED), torch.cat([silent, answers], -1).flatten(1)], 1),
        )

    def chance(self, level: int) -> float:
        """One symbol in eight: all are equally likely."""
        return 1.0 / SYMBOLS

    def prompt(self, f: Sequence[int] | Tensor, start: int, hops: int) -> str:
        """A sequence as text.

        Args:
            f: The successor of each symbol [8].
            start: The symbol to start from.
            hops: Number of arrows.
        """
        letters = "abcdefgh"
        pairs = " ".join(f"{letters[a]} {letters[int(b)]}" for a, b in enumerate(f))
        return f"{pairs} {QUERY} {letters[start]} " + " ".join([ARROW] * hops)
