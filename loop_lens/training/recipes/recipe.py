"""What a recipe of a shipped model consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loop_lens.data.task import Task
from loop_lens.models.native.config import LoopedConfig
from loop_lens.models.native.modeling import LoopedTransformer
from loop_lens.training.config import TrainingConfig
from loop_lens.training.recipes.measure import Measurements


@dataclass(frozen=True)
class Recipe:
    """How to make a shipped model from nothing."""

    name: str  # ``loop-lens/{name}`` when shipped
    summary: str  # one sentence on what it is
    intended: str  # what it is for, and what not
    task: Callable[[], Task]
    model: Callable[[Task], LoopedConfig]  # its ``recurrences`` are what the model runs by default
    training: Callable[[int], TrainingConfig]  # for a seed
    measure: Callable[[LoopedTransformer, Task], Measurements]
    text_licence: str | None = None  # of the training text; None where sequences are generated

    def untrained(self, task: Task, seed: int) -> LoopedTransformer:
        """The model before its first step."""
        torch.manual_seed(seed)
        return LoopedTransformer(self.model(task))
