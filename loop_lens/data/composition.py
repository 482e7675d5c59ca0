"""Permutations one after another: where a symbol ends up, factor by factor."""

from __future__ import annotations

import torch

from loop_lens.data.structures import draw_of_split, draw_permutations
from loop_lens.data.symbols import symbol_tokenizer
from loop_lens.data.task import IGNORED, Split, Task, TaskBatch, require_level


class CompositionTask(Task):
    """Permutations written as their images, a start, and one blank a permutation.

    ``| b c a e d | c a b d e ? a _ _``: the i-th blank is to name where the start is after the first
    i permutations (``p_i(...p_1(s))``; here b, then a). Level h composes h of them. With five symbols
    this is the word problem of S5, which no fixed depth solves at every length. The split is by the
    permutations in order.

    Example:
        >>> task = loop_lens.data.CompositionTask()
        >>> batch = task.batch(1, level=2, generator=torch.Generator().manual_seed(0))
        >>> task.tokenizer.decode(batch.input_ids[0]), task.tokenizer.decode(batch.labels[0, -2:])
        ('| c d e a b | d b e a c ? a _ _', 'c e')
    """

    name = "composition"
    levels = 6

    def __init__(self, *, symbols: int = 5) -> None:
        """Composition of permutations of some symbols.

        Args:
            symbols: How many symbols are permuted, 2 to 26.
        """
        if not 2 <= symbols <= 26:
            raise ValueError(f"symbols must be between 2 and 26, the letters, got {symbols}")
        self.symbols = symbols
        self.tokenizer = symbol_tokenizer([*"abcdefghijklmnopqrstuvwxyz"[:symbols], "|", "?", "_"])
        self.vocab_size = len(self.tokenizer)

    def batch(self, n: int, *, level: int, generator: torch.Generator, split: Split = "train") -> TaskBatch:
        """Draw sequences of ``level`` permutations; every level exists."""
        require_level(level, None, "composition")
        size = self.symbols
        drawn = draw_of_split(
            lambda k: draw_permutations(k * level, size, generator).view(k, level * size), n, split
        )
        factors = drawn.view(n, level, size)
        at = torch.randint(size, (n, 1), generator=generator)
        start, places = at, list[torch.Tensor]()
        for i in range(level):
            at = factors[:, i].gather(1, at)
            places.append(at)
        bars = torch.full((n, level, 1), size)
        listed = torch.cat([bars, factors], -1).flatten(1)
        answers = torch.cat(places, 1)
        query = torch.full((n, 1), size + 1)
        return TaskBatch(
            torch.cat([listed, query, start, torch.full_like(answers, size + 2)], 1),
            torch.cat([torch.full((n, listed.shape[1] + 2), IGNORED), answers], 1),
        )

    def chance(self, level: int) -> float:
        """One symbol in as many as there are."""
        return 1.0 / self.symbols
