"""From a recipe to a folder that can be shipped."""

from __future__ import annotations

from pathlib import Path

from loop_lens.training.recipes.card import write_card
from loop_lens.training.recipes.recipe import Recipe
from loop_lens.training.result import TrainingResult
from loop_lens.training.trainer import train


def build(recipe: Recipe, folder: Path, *, seed: int = 0, progress: bool = True) -> TrainingResult:
    """Train a recipe's model from nothing, or go on where a killed run of the same folder stopped; then measure it.

    Args:
        recipe: What to make.
        folder: Where the training goes; the finished model with its card is in ``folder/model``.
        seed: Seed of weights and training.
        progress: Whether to show a progress bar.
    """
    task, training = recipe.task(), recipe.training(seed)
    result = train(recipe.untrained(task, seed), task, training, folder=folder, progress=progress)
    measured = recipe.measure(result.model, recipe.task())
    write_card(folder / "model", recipe, result.model, measured, result, seed)
    return result
