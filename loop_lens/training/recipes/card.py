"""The card of a shipped model, written from its recipe and its measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from loop_lens.figures.canvas import new_figure
from loop_lens.figures.markdown import filled_in
from loop_lens.models.native.modeling import LoopedTransformer
from loop_lens.training.recipes.measure import Measurements
from loop_lens.training.recipes.recipe import Recipe
from loop_lens.training.result import TrainingResult

CARD, MEASUREMENTS, CURVES = "README.md", "measurements.json", "curves.png"
SECTIONS = ("Intended use", "Measured", "Recipe", "Curves", "Licence")
_ARCHITECTURE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("prelude_layers", "core_layers", "coda_layers", "recurrences", "block_norm", "qk_norm"),
    *("injection", "initial_state", "initial_state_std", "loop_norm", "exit_gate"),
    *("embedding_scale", "tie_word_embeddings", "initializer_range"),
)


def write_card(
    folder: Path,
    recipe: Recipe,
    model: LoopedTransformer,
    measured: Measurements,
    result: TrainingResult,
    seed: int,
) -> None:
    """Write a trained model's card, its curves and its measurements into its folder."""
    losses: list[float] = result.log["loss"].tolist()[-10:]
    training = {
        "seed": seed,
        "steps": result.steps,
        "minutes": round(result.seconds / 60, 1),
        "last_loss": round(sum(losses) / len(losses), 4),
        "passed": {str(level): step for level, step in result.passed.items()},
        "settings": recipe.training(seed).to_json(),
    }
    facts = {"name": recipe.name, "numbers": measured.numbers, "training": training}
    (folder / MEASUREMENTS).write_text(json.dumps(facts, indent=2) + "\n")
    _curves(result.log, result.passed).savefig(folder / CURVES, dpi=80)
    (folder / CARD).write_text(card(recipe, model, measured, training))


def card(
    recipe: Recipe, model: LoopedTransformer, measured: Measurements, training: Mapping[str, Any]
) -> str:
    """A model's card as Markdown."""
    config = {name: getattr(model.config, name) for name in _ARCHITECTURE}
    values = {
        **vars(recipe),
        **vars(measured),
        **training,
        "parameters": sum(p.numel() for p in model.parameters()),
        "numbers": _two_columns("", measured.numbers),
        "architecture": _two_columns("architecture", config),
        "training": _two_columns("training", training["settings"]),
        "curves": CURVES,
    }
    return filled_in(Path(__file__).with_suffix(".md"), values, digits=4)


def _two_columns(name: str, values: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame({name: list(values), "value": [_plain(value) for value in values.values()]})


def _plain(value: Any) -> str:
    """Settings within settings without their brackets."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _curves(log: pd.DataFrame, passed: Mapping[int, int]) -> Any:
    """Loss, accuracy and level against the step."""
    levels = len(set(log["level"])) > 1
    figure, axes = new_figure(6, 5 if levels else 3.6, rows=3 if levels else 2, sharex=True)
    smooth = log.rolling(5, min_periods=1, on="step").mean()
    axes[0].plot(smooth["step"], smooth["loss"], linewidth=1)
    axes[0].set(ylabel="loss (nats)")
    axes[1].plot(smooth["step"], smooth["accuracy"], linewidth=1)
    axes[1].set(ylabel="accuracy", ylim=(0, 1.02))
    if levels:
        axes[2].step(log["step"], log["level"], where="post", linewidth=1)
        axes[2].set(ylabel="level")
    for step in passed.values():
        for each in axes:
            each.axvline(step, color="grey", linewidth=0.5, linestyle=":")
    axes[-1].set(xlabel="step")
    return figure
