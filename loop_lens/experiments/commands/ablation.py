"""``ablation``: injection, norm placement and block size in small models that train here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loop_lens.experiments.ablation.cells import Settings, finished, grid, run_grid
from loop_lens.experiments.ablation.page import write_report
from loop_lens.experiments.inputs import errors_as_usage
from loop_lens.experiments.report import command_line


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
    with errors_as_usage():
        settings = Settings(steps=steps, text_steps=text_steps)
        cells = grid(task, cores=tuple(int(size) for size in cores.split(",")), seed=seed)
        results = (finished if report_only else run_grid)(cells, settings, work)
    command = command_line("ablation", task=task, cores=cores, steps=steps, text_steps=text_steps, seed=seed)
    missing = [cell for cell in cells if cell not in results]
    for path in write_report(results, settings, out, missing=missing, command=command):
        typer.echo(f"wrote {path}")
