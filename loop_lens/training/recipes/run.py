"""From a recipe to a folder that can be shipped."""

from __future__ import annotations

import shutil
from pathlib import Path

from loop_lens.training.recipes.card import write_card
from loop_lens.training.recipes.recipe import Recipe
from loop_lens.training.result import TrainingResult
from loop_lens.training.trainer import train


def build(recipe: Recipe, folder: Path, *, seed: int = 0, progress: bool = True) -> TrainingResult:
    """Train a recipe's model from nothing, or go on where a killed run of the same folder stopped.

    Args:
        recipe: What to make.
        folder: Where the training goes; the finished model with its card is in ``folder/model``.
        seed: Seed of weights and training.
        progress: Whether to show a progress bar.
    """
    task = recipe.task()
    result = train(
        recipe.untrained(task, seed), task, recipe.training(seed), folder=folder, progress=progress
    )
    finish(recipe, result, folder / "model", seed=seed)
    return result


def finish(recipe: Recipe, result: TrainingResult, folder: Path, *, seed: int) -> None:
    """Measure a trained model and write its card; its folder must hold the model already."""
    measured = recipe.measure(result.model, recipe.task())
    write_card(folder, recipe, result.model, measured, result, seed)


def ship(folder: Path, to: Path) -> None:
    """Copy a finished model folder to where the package keeps its own."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
