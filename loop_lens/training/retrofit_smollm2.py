"""``python -m loop_lens.training.retrofit_smollm2``: SmolLM2-135M as a looped model, fine-tuned a little."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loop_lens.data.text import TextTask
from loop_lens.shipped.smollm2 import load_smollm2
from loop_lens.training.config import TrainingConfig
from loop_lens.training.pretrained import retrofit
from loop_lens.training.recurrences import Fixed
from loop_lens.training.result import TrainingResult
from loop_lens.training.trainer import train

PRELUDE, CORE, CODA = range(0, 8), range(12, 22), range(22, 30)
"""Layers of SmolLM2-135M, which has 30; four before the core are left out, as in the published splits."""


def retrofit_smollm2(
    folder: str | Path,
    *,
    steps: int = 20,
    recurrences: int = 2,
    batch_size: int = 4,
    window: int = 48,
    lr: float = 1e-4,
    progress: bool = True,
) -> TrainingResult:
    """Fine-tune a retrofitted SmolLM2-135M on docstrings of Python's standard library.

    Args:
        folder: Where checkpoints (1.6 GB) and the trained model (0.5 GB) go; the same folder again resumes.
        steps: Number of steps.
        recurrences: Number of iterations.
        batch_size: Windows of text per step.
        window: Tokens in a window.
        lr: Peak learning rate.
        progress: Whether to show a progress bar.

    Raises:
        ModuleNotFoundError: If the extra ``smollm2`` is not installed.
    """
    base, tokenizer = load_smollm2()
    model = retrofit(base, recurrences=recurrences, prelude=PRELUDE, core=CORE, coda=CODA)
    del base
    config = TrainingConfig(
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        warmup=min(5, steps),
        weight_decay=0.0,
        recurrences=Fixed(recurrences),
        checkpoint_every=None,
        log_every=1,
    )
    return train(
        model, TextTask(tokenizer=tokenizer, window=window), config, folder=folder, progress=progress
    )


def main(
    folder: Annotated[Path, typer.Option(help="Where it goes.")] = Path("runs/retrofit-smollm2"),
    steps: Annotated[int, typer.Option(help="Number of steps.")] = 20,
) -> None:
    """Fine-tune, and print the loss of each step."""
    result = retrofit_smollm2(folder, steps=steps)
    typer.echo(result.log[["step", "loss", "accuracy"]].to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
