"""Sums modulo a number: a running total whose every step needs the one before."""

from __future__ import annotations

import torch

from loop_lens.data.structures import draw_of_split
from loop_lens.data.symbols import symbol_tokenizer
from loop_lens.data.task import IGNORED, Split, Task, TaskBatch, require_level


class AdditionTask(Task):
    """Terms, an equals sign, and one blank a term; the i-th blank is to name the i-th partial sum.

    ``3 9 4 = _ _ _`` modulo 10 gives 3, 2, 6. Level h has h + 1 terms, h additions. The split is by
    the ordered terms.

    Example:
        >>> task = loop_lens.data.AdditionTask(modulus=10)
        >>> batch = task.batch(1, level=2, generator=torch.Generator().manual_seed(0))
        >>> task.tokenizer.decode(batch.input_ids[0]), batch.labels[0, 4:].tolist()
        ('0 3 9 = _ _ _', [0, 3, 2])
    """

    name = "addition"
    levels = 6

    def __init__(self, *, modulus: int = 10) -> None:
        """Addition modulo a number.

        Args:
            modulus: What sums are taken modulo: the terms are 0 to modulus - 1.
        """
        if modulus < 2:
            raise ValueError(f"modulus must be at least 2, got {modulus}")
        self.modulus = modulus
        self.tokenizer = symbol_tokenizer([*map(str, range(modulus)), "=", "_"])
        self.vocab_size = len(self.tokenizer)

    def batch(self, n: int, *, level: int, generator: torch.Generator, split: Split = "train") -> TaskBatch:
        """Draw sequences of ``level`` additions; every level exists."""
        require_level(level, None, "addition")
        shape = level + 1
        terms = draw_of_split(
            lambda k: torch.randint(self.modulus, (k, shape), generator=generator), n, split
        )
        sums = terms.cumsum(1) % self.modulus
        equals = torch.full((n, 1), self.modulus)
        return TaskBatch(
            torch.cat([terms, equals, torch.full_like(sums, self.modulus + 1)], 1),
            torch.cat([torch.full((n, shape + 1), IGNORED), sums], 1),
        )

    def chance(self, level: int) -> float:
        """One number in as many as there are."""
        return 1.0 / self.modulus
