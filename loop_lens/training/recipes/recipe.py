"""What a recipe of a shipped model consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loop_lens.data.task import Task
from loop_lens.models.native.config import LoopedConfig
from loop_lens.models.native.modeling import LoopedTransformer
from loop_lens.training.config import TrainingConfig

if TYPE_CHECKING:
    from loop_lens.training.recipes.measure import Measurements


@dataclass(frozen=True)
class Recipe:
    """How to make a shipped model from nothing.

    Attributes:
        name: Its name, ``loop-lens/{name}`` when shipped.
        summary: One sentence on what it is.
        intended: What it is for, and what not.
        task: Makes the task.
        model: Makes the configuration for a task; its ``recurrences`` are what the model runs by default.
        training: Makes the training configuration for a seed.
        measure: Measures a trained model for its card.
        text_licence: Licence of the training text, None where sequences are generated.
    """

    name: str
    summary: str
    intended: str
    task: Callable[[], Task]
    model: Callable[[Task], LoopedConfig]
    training: Callable[[int], TrainingConfig]
    measure: Callable[[LoopedTransformer, Task], Measurements]
    text_licence: str | None = None

    def untrained(self, task: Task, seed: int) -> LoopedTransformer:
        """The model before its first step."""
        torch.manual_seed(seed)
        return LoopedTransformer(self.model(task))
