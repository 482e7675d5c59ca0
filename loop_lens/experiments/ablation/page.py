"""The ablation's page, and the tables and figures that it names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from loop_lens.experiments import report
from loop_lens.experiments.ablation.cells import TRAINED, Cell, Settings
from loop_lens.experiments.ablation.figures import figures
from loop_lens.experiments.ablation.measures import STATES, CellResult
from loop_lens.experiments.ablation.verdicts import (
    BACK,
    GROWS,
    LOST,
    STABLE,
    beyond_training,
    matches,
    self_organisation,
    stability,
    summaries,
)
from loop_lens.experiments.claims import Verdict, verdict_table

_MEASURED = ["relative_distance", "nearest", "cosine", "growth", "degeneracy", "relative_step", "radius"]
_CONVERGENCE = [
    "iteration",
    "layer",
    "norm",
    "relative_step",
    "relative_distance",
    "cosine",
    "degeneracy_cosine",
]
_STAGES = [
    "segment",
    "iteration",
    "layer",
    "percent",
    "colsum_concentration",
    "sink_rate",
    "mixing_score",
    "matrix_entropy",
    "norm",
]

Results = Mapping[Cell, CellResult]


def write_report(
    results: Results,
    settings: Settings,
    out: Path,
    *,
    missing: Sequence[Cell] = (),
    command: str = "",
) -> list[Path]:
    """Write ``out.md``, and the figures and tables that it names in the folder ``out``.

    Args:
        results: What was measured.
        settings: How.
        out: Where, without an ending.
        missing: Cells of the grid that were not measured.
        command: The command that was given.

    Returns:
        The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    tables = {name: table for name, table in _tables(results, settings) if not table.empty}
    written = [report.save_csv(table, out / f"{name}.csv") for name, table in tables.items()]
    written += [report.save_figure(figure, out / f"{name}.png") for name, figure in figures(results)]
    parts = _parts(results, settings, out, tables, missing)
    title = "Injection, norm placement and block size in small looped models"
    return [report.write_page(out, title, command, parts), *written]


def _tables(results: Results, settings: Settings) -> Iterator[tuple[str, pd.DataFrame]]:
    columns = ["step", "loss", "accuracy", "grad_norm"]
    yield "dynamics", summaries(results)
    yield "recurrences", _stacked(results, lambda result: result.to_dataframe())
    yield "training", _stacked(results, lambda result: result.training()[columns])
    yield "convergence", _stacked(results, _convergence)
    yield "stages", _stacked(results, _stages)
    yield "organisation", self_organisation(results)[0]
    yield "matches", matches(results, settings.window)[0]
    yield "extrapolation", beyond_training(results)[0]


def _stacked(results: Results, table: Callable[[CellResult], Any]) -> pd.DataFrame:
    """The cells' tables below each other, with the cell's name in front."""
    return _below_each_other("cell", {cell.name: table(result) for cell, result in results.items()})


def _below_each_other(column: str, tables: Mapping[str, Any]) -> pd.DataFrame:
    parts = [table.assign(**{column: name}) for name, table in tables.items()]
    if not parts:
        return pd.DataFrame()
    whole = pd.concat(parts, ignore_index=True)
    whole.insert(0, column, whole.pop(column))
    return whole


def _convergence(result: CellResult) -> pd.DataFrame:
    tables: dict[str, Any] = {}
    for name, state in result.states.items():
        if state.convergence is not None:
            table: Any = state.convergence.to_dataframe()
            last = len(state.convergence.iterations) - 1
            tables[name] = table[table["iteration"].isin([0, 1, 2, 3, 7, 15, 31, last])][_CONVERGENCE]
    return _below_each_other("state", tables)


def _stages(result: CellResult) -> pd.DataFrame:
    tables = {name: state.stages.to_dataframe()[_STAGES] for name, state in result.states.items()}
    return _below_each_other("state", tables)


def _parts(
    results: Results,
    settings: Settings,
    out: Path,
    tables: Mapping[str, pd.DataFrame],
    missing: Sequence[Cell],
) -> Iterator[str]:
    """The page's paragraphs, tables and pictures."""
    how = settings.measuring
    numbers = {
        **vars(settings),
        "trained": TRAINED,
        "models": len(results),
        "synthetic": next((cell.task for cell in results if cell.task != "text"), "no synthetic task"),
        "minutes": sum(float(result.log["seconds"][-1]) for result in results.values()) / 60,
        "iterations": how.iterations,
        "reference": how.reference,
        "stable": STABLE,
        "growth": GROWS - 1,
        "back": BACK,
    }
    yield _METHOD.format(**numbers)
    if missing:
        yield f"Not measured: {', '.join(cell.name for cell in missing)}."
    verdicts: list[Verdict] = [v for state in STATES for v in stability(tables["dynamics"], state)]
    verdicts += self_organisation(results)[1] + matches(results, settings.window)[1]
    yield "## What the paper says of random and small models (arXiv 2604.11791)"
    yield _READINGS.format(**numbers)
    yield report.markdown_table(verdict_table(verdicts))
    yield report.notes_of(out)
    yield "## Beyond the trained iterations"
    yield f"Not in the paper. Accuracy lasts if at most {LOST} is lost."
    yield report.markdown_table(verdict_table(beyond_training(results)[1]))
    yield report.picture(out, "recurrences", "Accuracy and loss against iterations")
    yield report.markdown_table(tables["extrapolation"].drop(columns=["injection", "norm"]))
    yield "## Dynamics"
    yield _DYNAMICS.format(**numbers)
    dynamics: Any = tables["dynamics"][["cell", "state", "learnt", "kind", *_MEASURED]]
    yield report.markdown_table(dynamics)
    for task in dict.fromkeys(cell.task for cell in results if cell.looped):
        yield report.picture(out, f"convergence_{task}", f"{task}: distance to iteration {how.reference}")
    yield "## Stages on text"
    if "organisation" in tables:
        yield report.markdown_table(tables["organisation"])
        yield report.picture(out, "stages", "Stages by recurrence")
    if "matches" in tables:
        yield _MATCHES
        yield report.markdown_table(tables["matches"])
    yield "## Training"
    yield report.picture(out, "training", "Training loss")
    yield f"Tables: {', '.join(f'`{out.name}/{name}.csv`' for name in tables)}."


_METHOD = """
{models} models were trained and measured here, d_model {width}, 4 heads, gated MLP of {mlp}, {trained} iterations in
training, on {synthetic} ({symbols} symbols, level {level}; {steps} steps of {batch} sequences) and on text (Python's
own documentation, {vocabulary} tokens, windows of {window}; {text_steps} steps of {text_batch}), AdamW at {lr:g}, in
{minutes:.0f} minutes of training. The text seen is a small part of one epoch: these are barely trained language
models. Seeds are in the names (`s0`); each model is one seed unless two are named.

`pre`: pre-norm. `huginn`: the stream is normed after each branch. `ouro`: norms around each branch, and after each
iteration. `injection`: each iteration starts from W [state; prelude output], the loop from noise; `none`: the loop
starts from the prelude's output. Shapes are (prelude, core x iterations, coda).
"""

_READINGS = """
Each loop is followed for {iterations} iterations, and compared with its state after {reference}. It is at a *fixed
point* if in the last quarter the cosine to that state, mean over test tokens, is at least {stable} at every layer and
iteration (1 - tau of the paper's Algorithm 1), and the norm grows by at most {growth:.0%} in the second half;
*direction only* if the norm grows on, a *drift* if it grows on and the direction changes; on an *orbit* if it leaves
that state and comes back to within {back} of its norm; or none of these. A claim holds if all models agree, does not
hold if fewer than half do, and cannot be told at this size in between. The paper makes the first seven claims of models
with random weights; they are tested before training and, where a model learnt more than to name one token everywhere,
after.
"""

_DYNAMICS = """
In the last quarter of {iterations} iterations, at the worst iteration and layer: distance to iteration {reference} over
the norm (`nearest`: at the best iteration), cosine to it, growth of the norm in the second half, degeneracy (least
cosine of layer 0 to any layer's state there), step over the norm; and the spectral radius of the last iteration's
Jacobian at the state that it was run at.
"""

_MATCHES = """
Distance of the curves of concentration, sink rate and mixing score (over log T) over % of depth to those of the
feed-forward references, root mean square, mean over recurrences:
"""
