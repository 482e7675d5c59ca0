"""Injection, norm placement and block size in small models that train here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from loop_lens.dynamics import Convergence
from loop_lens.experiments import report
from loop_lens.experiments.ablation.cells import TRAINED, Cell, Settings, finished, grid, run_grid
from loop_lens.experiments.ablation.figures import figures
from loop_lens.experiments.ablation.measures import STATES
from loop_lens.experiments.ablation.verdicts import (
    BACK,
    GROWS,
    LOST,
    STABLE,
    Results,
    beyond_training,
    matches,
    self_organisation,
    stability,
    summaries,
)
from loop_lens.experiments.inputs import errors_as_usage

_LOG = ["step", "loss", "accuracy", "grad_norm"]
_MOVES = ["norm", "relative_step", "relative_distance", "cosine", "degeneracy_cosine"]
_MIXES = ["colsum_concentration", "sink_rate", "mixing_score", "matrix_entropy", "norm"]


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
    runs = {"task": task, "cores": cores, "steps": steps, "text_steps": text_steps, "seed": seed}
    command = report.command_line("ablation", **runs)
    missing = [cell for cell in cells if cell not in results]
    for path in write_report(results, settings, out, missing=missing, command=command):
        typer.echo(f"wrote {path}")


def write_report(
    results: Results, settings: Settings, out: Path, *, missing: Sequence[Cell] = (), command: str = ""
) -> list[Path]:
    """Write ``out.md``, and the figures and tables that it names in the folder ``out``; these files, the page first."""
    organisation, organised = self_organisation(results)
    nearness, nearest = matches(results, settings.window)
    extrapolation, lasting = beyond_training(results)
    states = {
        (cell.name, name): state for cell, found in results.items() for name, state in found.states.items()
    }
    moves = {key: state.convergence for key, state in states.items() if state.convergence is not None}
    tables = {
        "dynamics": summaries(results),
        "recurrences": _stacked({cell.name: found.to_dataframe() for cell, found in results.items()}),
        "training": _stacked({cell.name: found.training()[_LOG] for cell, found in results.items()}),
        "convergence": _stacked({key: _some_iterations(found) for key, found in moves.items()}),
        "stages": _stacked(
            {
                key: state.stages.to_dataframe()[["segment", "iteration", "layer", "percent", *_MIXES]]
                for key, state in states.items()
            }
        ),
        "organisation": organisation,
        "matches": nearness,
        "extrapolation": extrapolation,
    }
    tables = {name: table for name, table in tables.items() if not table.empty}
    before_and_after = [v for state in STATES for v in stability(tables["dynamics"], state)]
    values = {
        **asdict(settings),
        **asdict(settings.measuring),
        "models": len(results),
        "trained": TRAINED,
        "synthetic": next((cell.task for cell in results if cell.task != "text"), "no synthetic task"),
        "minutes": sum(float(found.log["seconds"][-1]) for found in results.values()) / 60,
        "missing": [cell.name for cell in missing],
        "stable": STABLE,
        "grows": GROWS,
        "back": BACK,
        "lost": LOST,
        "verdicts": pd.DataFrame([*before_and_after, *organised, *nearest]),
        "lasting": pd.DataFrame(lasting),
        "looped_tasks": dict.fromkeys(cell.task for cell in results if cell.looped),
        "tables": list(tables),
    }
    page = Path(__file__).with_name("page.md")
    return report.write_report(out, page, command, tables=tables, figures=figures(results), values=values)


def _stacked(tables: Mapping[Any, Any]) -> pd.DataFrame:
    """Tables below each other, with the cell, and the state where there are several, in front."""
    if not tables:
        return pd.DataFrame()
    names = ["cell", "state"] if isinstance(next(iter(tables)), tuple) else ["cell"]
    return pd.concat(tables, names=names).reset_index(level=names)


def _some_iterations(found: Convergence) -> pd.DataFrame:
    table: Any = found.to_dataframe()[["iteration", "layer", *_MOVES]]
    return table[table["iteration"].isin([0, 1, 2, 3, 7, 15, 31, len(found.iterations) - 1])]
