"""The card of a shipped model, written from its recipe and its measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from loop_lens.figures.canvas import new_figure
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
    """Write a model's card, its curves and its measurements into its folder.

    Args:
        folder: The model's folder.
        recipe: How it was made.
        model: The trained model.
        measured: What it does.
        result: How its training went.
        seed: The training's seed.
    """
    settings = recipe.training(seed).to_json()
    losses: list[float] = result.log["loss"].tolist()[-10:]
    training = {
        "seed": seed,
        "steps": result.steps,
        "minutes": round(result.seconds / 60, 1),
        "last_loss": round(sum(losses) / len(losses), 4),
        "passed": {str(level): step for level, step in result.passed.items()},
        "settings": settings,
    }
    facts = {"name": recipe.name, "numbers": measured.numbers, "training": training}
    (folder / MEASUREMENTS).write_text(json.dumps(facts, indent=2) + "\n")
    figure = curves(result.log, result.passed)
    figure.savefig(folder / CURVES, dpi=80)
    (folder / CARD).write_text(card(recipe, model, measured, training))


def card(
    recipe: Recipe, model: LoopedTransformer, measured: Measurements, training: Mapping[str, Any]
) -> str:
    """A model's card as Markdown."""
    n_parameters = sum(p.numel() for p in model.parameters())
    config: dict[str, Any] = {name: getattr(model.config, name) for name in _ARCHITECTURE}
    parts = [
        f"# loop-lens/{recipe.name}",
        f"{recipe.summary} {n_parameters:,} parameters.",
        f'```python\nimport loop_lens\n\nmodel = loop_lens.boot("loop-lens/{recipe.name}")\n```',
        f"## {SECTIONS[0]}",
        recipe.intended,
        f"## {SECTIONS[1]}",
        _table({"": list(measured.numbers), "value": [_shown(v) for v in measured.numbers.values()]}),
    ]
    for title, table in measured.tables.items():
        parts += [f"### {title}", measured.notes.get(title, ""), _table(table)]
    if measured.samples:
        parts += ["### Samples", "Greedy continuations, at the default number of iterations."]
        parts += ["\n".join(f"- **{prompt}**{_one_line(text)}" for prompt, text in measured.samples.items())]
    passed = training["passed"]
    parts += [
        f"## {SECTIONS[2]}",
        f"`python -m loop_lens.training {recipe.name} --folder FOLDER --seed {training['seed']}` makes it again; "
        f"the recipe is `loop_lens/training/recipes/{recipe.name.replace('-', '_')}.py`. Seed {training['seed']}, "
        f"{training['steps']:,} steps, {training['minutes']} minutes on one thread of a shared CPU; "
        f"the training loss ended at {training['last_loss']} nats"
        + (", less the gate's entropy." if _subtracts_entropy(training) else "."),
    ]
    if passed:
        parts += [
            "Levels passed after steps: "
            + ", ".join(f"{level}: {step:,}" for level, step in passed.items())
            + "."
        ]
    parts += [
        _table({"architecture": list(config), "value": [_shown(v) for v in config.values()]}),
        _table(
            {
                "training": list(training["settings"]),
                "value": [_shown(v) for v in training["settings"].values()],
            }
        ),
        f"## {SECTIONS[3]}",
        f"![loss, accuracy and level against the step]({CURVES})",
        f"## {SECTIONS[4]}",
        "Weights and recipe: MIT, as loop_lens itself. "
        + (recipe.text_licence or "The training sequences are generated; there is no other data."),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _subtracts_entropy(training: Mapping[str, Any]) -> bool:
    """Whether the training's loss subtracts an entropy."""
    return training["settings"]["loss"]["kind"] == "ExitGateLoss"


def curves(log: pd.DataFrame, passed: Mapping[int, int]) -> Any:
    """Loss, accuracy and level against the step; a matplotlib figure, not shown."""
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


def _table(columns: Mapping[str, Any] | pd.DataFrame) -> str:
    frame = pd.DataFrame(columns)
    rows = [list(frame.columns), ["---"] * len(frame.columns)]
    rows += [[_shown(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return str(int(value)) if value == int(value) and abs(value) >= 2 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return str(value)


def _one_line(text: str) -> str:
    return " ".join(text.split("\n")).replace("|", "\\|")
