"""Which positions of which prompts are read, where prompts have any lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loop_lens.unrolling.numbers import whole


@dataclass(frozen=True)
class Positions:
    """Positions of each prompt.

    Attributes:
        numbers: Positions counted from the prompt's beginning, -1 where it has none such [prompt pos].
    """

    numbers: Int[Tensor, "prompt pos"]

    @classmethod
    def of(cls, lengths: Int[Tensor, " prompt"], asked: Sequence[int] | None) -> Positions:
        """The positions asked for, negative ones from each prompt's own end; all for None.

        Raises:
            ValueError: If no prompt has one of them.
        """
        lengths = lengths.cpu()[:, None]
        longest = int(lengths.max())
        every = range(longest) if asked is None else [whole(position, "a position") for position in asked]
        numbers = torch.tensor(list(every), dtype=torch.long)[None]
        counted = torch.where(numbers < 0, lengths + numbers, numbers)
        there = (counted >= 0) & (counted < lengths)
        lacking = (~there.any(0)).nonzero().flatten().tolist()
        if lacking or not there.numel():
            which = numbers[0, lacking[0]].item() if lacking else "(none)"
            raise ValueError(f"position {which} does not exist: there are 0-{longest - 1}")
        return cls(torch.where(there, counted, -1))

    @cached_property
    def there(self) -> Bool[Tensor, "prompt pos"]:
        """Whether the prompt has the position."""
        return self.numbers >= 0

    def where(self, device: torch.device) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"]]:
        """Prompt and position of everything read, in order."""
        return self.there.nonzero()[:, 0].to(device), self.numbers[self.there].to(device)

    def spread(self, values: Tensor, fill: float, *, dim: int = 1) -> Tensor:
        """What was read of all tokens [*lead token *rest] as [*lead prompt pos *rest], ``fill`` where none is.

        Args:
            values: What was read.
            fill: What stands where a prompt lacks a position.
            dim: The dimension of tokens.
        """
        shape = (*values.shape[:dim], *self.there.shape, *values.shape[dim + 1 :])
        if self.there.all():
            return values.reshape(shape)
        spread = values.new_full(shape, fill)
        spread[(*[slice(None)] * dim, self.there)] = values
        return spread
