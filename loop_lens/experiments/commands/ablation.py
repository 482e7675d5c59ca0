"""``ablation``: injection, norm placement and block size in small models that train here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loop_lens.experiments.ablation import Settings, finished, grid, run_grid
from loop_lens.experiments.ablation_report import write_report


def main(
    out: Annotated[Path, typer.Option(help="Report, without its endings.")] = Path("docs/results/ablation"),
    work: Annotated[Path, typer.Option(help="Folder for models and measurements.")] = Path("build/ablation"),
    task: Annotated[str, typer.Option(help="Synthetic task: addition or composition.")] = "addition",
    cores: Annotated[str, typer.Option(help="Block sizes, with commas.")] = "2,4",
    steps: Annotated[int, typer.Option(help="Training steps on the synthetic task.")] = Settings.steps,
    text_steps: Annotated[int, typer.Option(help="Training steps on text.")] = Settings.text_steps,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Report what is done; train nothing.")
    ] = False,
) -> None:
    """Train a grid of small looped models, measure them, and test the paper's small-model findings."""
    try:
        settings = Settings(steps=steps, text_steps=text_steps)
        cells = grid(task, cores=tuple(int(size) for size in cores.split(",")), seed=seed)
        found = finished(cells, settings, work) if report_only else run_grid(cells, settings, work)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    options = f" --task {task} --cores {cores} --steps {steps} --text-steps {text_steps} --seed {seed}"
    for path in write_report(
        found, settings, out, missing=[cell for cell in cells if cell not in found], options=options
    ):
        typer.echo(f"wrote {path}")
