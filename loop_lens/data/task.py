"""What a training task is: a vocabulary, levels of difficulty, and seeded batches without end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

Split = Literal["train", "test"]
IGNORED = -100
"""The label of a position that has nothing to name, which cross-entropy leaves out."""


@dataclass(frozen=True)
class TaskBatch:
    """Sequences, and the tokens that a model should name.

    Attributes:
        input_ids: Tokens [batch pos].
        labels: What the logits at each position should name [batch pos], -100 for nothing. They are
            not shifted: the label at position i belongs to the logits at position i.

    Example:
        >>> batch = loop_lens.data.AdditionTask().batch(2, level=2, generator=torch.Generator().manual_seed(0))
        >>> batch.input_ids.shape, batch.labels[0].tolist()
        (torch.Size([2, 7]), [-100, -100, -100, -100, 0, 3, 2])
    """

    input_ids: Int[Tensor, "batch pos"]
    labels: Int[Tensor, "batch pos"]

    def to(self, device: torch.device | str) -> TaskBatch:
        """The same batch on a device."""
        return TaskBatch(self.input_ids.to(device), self.labels.to(device))

    def split(self, rows: int) -> list[TaskBatch]:
        """The batch in parts of at most ``rows`` sequences."""
        parts = zip(self.input_ids.split(rows), self.labels.split(rows), strict=True)
        return [TaskBatch(ids, labels) for ids, labels in parts]


class Task(ABC):
    """An endless supply of sequences, of a chosen difficulty.

    Structures (cycles, permutations, operands, pages of text) belong to one split for good, so that
    a test sequence is never one that training saw under another order of its parts.

    Attributes:
        name: Short name.
        vocab_size: Number of tokens.
        levels: Number of levels of difficulty; 1 is the easiest.
        tokenizer: A ``PreTrainedTokenizerFast`` that reads and writes the sequences.

    Example:
        >>> class Copying(loop_lens.data.Task):
        ...     name, vocab_size, levels, tokenizer = "copying", 7, 1, None
        ...
        ...     def batch(self, n, *, level, generator, split="train"):
        ...         ids = torch.randint(7, (n, 5), generator=generator)
        ...         return loop_lens.data.TaskBatch(ids, ids)
        >>> round(Copying().chance(level=1), 3)
        0.143
    """

    name: str
    vocab_size: int
    levels: int
    tokenizer: Any

    @abstractmethod
    def batch(self, n: int, *, level: int, generator: torch.Generator, split: Split = "train") -> TaskBatch:
        """Draw sequences; the same state of the generator draws the same ones.

        Args:
            n: Number of sequences.
            level: Difficulty, from 1; tasks that can be made harder than ``levels`` take more.
            generator: Where all randomness comes from, on the CPU.
            split: Which structures may occur.

        Raises:
            ValueError: If there is no such level or split.
        """

    def chance(self, level: int) -> float:
        """Accuracy of guessing among the answers that the sequence itself allows."""
        return 1.0 / self.vocab_size


def require_level(level: int, highest: int | None, what: str) -> None:
    """Raise unless a task has this level."""
    if level < 1 or (highest is not None and level > highest):
        upto = "" if highest is None else f" to {highest}"
        raise ValueError(f"level {level} does not exist: {what} has levels 1{upto}")


def require_split(split: str) -> None:
    """Raise unless this is a split."""
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} does not exist: choose 'train' or 'test'")
