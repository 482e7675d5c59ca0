"""The ablation's report: markdown, figures and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from loop_lens.experiments.ablation import TRAINED, Cell, Settings
from loop_lens.experiments.ablation_measures import Measured
from loop_lens.experiments.ablation_verdicts import (
    BACK,
    GROWS,
    LOST,
    STABLE,
    Verdict,
    beyond_training,
    matches,
    self_organisation,
    stability,
    summaries,
)
from loop_lens.experiments.page import how_it_was_made, markdown_table, notes_of, save_csv, save_figure
from loop_lens.experiments.random_models import NORMS
from loop_lens.figures.canvas import new_figure

_COLORS = {"linear": "C0", "none": "C1"}
_MEASURED = ["relative_distance", "nearest", "cosine", "growth", "degeneracy", "relative_step", "radius"]
_STYLES = ("-", "--", ":", "-.")


def write_report(
    found: Mapping[Cell, Measured],
    settings: Settings,
    out: Path,
    *,
    missing: Sequence[Cell] = (),
    options: str = "",
) -> list[Path]:
    """Write ``out.md``, and the figures and tables that it names in the folder ``out``.

    Args:
        found: What was measured.
        settings: How.
        out: Where, without an ending.
        missing: Cells of the grid that were not measured.
        options: Of the command, for the report.

    Returns:
        The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    tables = dict(_tables(found, settings))
    for name, table in tables.items():
        if not table.empty:
            written.append(save_csv(table, out / f"{name}.csv"))
    for name, figure in _figures(found):
        written.append(save_figure(figure, out / f"{name}.png"))
    page = out.with_name(f"{out.name}.md")
    page.write_text(_page(found, settings, out, tables, missing, options), encoding="utf-8")
    return [page, *written]


def _tables(found: Mapping[Cell, Measured], settings: Settings) -> Iterator[tuple[str, pd.DataFrame]]:
    yield "dynamics", summaries(found)
    yield "recurrences", _stacked(found, lambda measured: measured.to_dataframe())
    yield (
        "training",
        _stacked(found, lambda measured: measured.training()[["step", "loss", "accuracy", "grad_norm"]]),
    )
    yield "convergence", _stacked(found, _convergence)
    yield "stages", _stacked(found, _stages)
    yield "organisation", self_organisation(found)[0]
    yield "matches", matches(found, settings.window)[0]
    yield "extrapolation", beyond_training(found)[0]


def _stacked(found: Mapping[Cell, Measured], table: Callable[[Measured], Any]) -> pd.DataFrame:
    parts: list[pd.DataFrame] = []
    for cell, measured in found.items():
        part = table(measured)
        part.insert(0, "cell", cell.name)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _convergence(measured: Measured) -> pd.DataFrame:
    parts: list[Any] = []
    for state, moves in measured.moves.items():
        part: Any = moves.to_dataframe()
        n = len(moves.iterations)
        part = part[part["iteration"].isin([0, 1, 2, 3, 7, 15, 31, n - 1])]
        columns = [
            "iteration",
            "layer",
            "norm",
            "relative_step",
            "relative_distance",
            "cosine",
            "degeneracy_cosine",
        ]
        part = part[columns].copy()
        part.insert(0, "state", state)
        parts.append(part)
    return pd.concat(parts) if parts else pd.DataFrame()


def _stages(measured: Measured) -> pd.DataFrame:
    columns = [
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
    parts: list[Any] = []
    for state, found in measured.firings.items():
        part = found.to_dataframe()[columns].copy()
        part.insert(0, "state", state)
        parts.append(part)
    return pd.concat(parts)


def _figures(found: Mapping[Cell, Measured]) -> Iterator[tuple[str, Any]]:
    yield "recurrences", _against_recurrences(found)
    for task in dict.fromkeys(cell.task for cell in found if cell.looped):
        yield f"convergence_{task}", _over_iterations(found, task)
    yield "training", _training(found)
    if any(cell.task == "text" and cell.norm == "pre" for cell in found):
        yield "stages", _over_depth(found)


def _rows(found: Mapping[Cell, Measured]) -> tuple[list[str], list[str]]:
    tasks = list(dict.fromkeys(cell.task for cell in found))
    return tasks, [norm for norm in NORMS if any(cell.norm == norm for cell in found)]


def _main(
    found: Mapping[Cell, Measured], task: str, norm: str
) -> Iterator[tuple[Cell, Measured, dict[str, Any]]]:
    """The looped models of a panel, with how their lines look: colour by injection, dashes by block size."""
    first = min(cell.seed for cell in found)
    cores = sorted({cell.core for cell in found if cell.looped}, reverse=True)
    for cell, measured in found.items():
        if cell.looped and cell.outer and (cell.task, cell.norm, cell.seed) == (task, norm, first):
            style = _STYLES[cores.index(cell.core) % len(_STYLES)]
            label = f"{'injection' if cell.injection == 'linear' else 'none'}, core {cell.core}"
            yield cell, measured, {"color": _COLORS[cell.injection], "linestyle": style, "label": label}


def _against_recurrences(found: Mapping[Cell, Measured]) -> Any:
    tasks, norms = _rows(found)
    figure, panels = _panels(2 * len(tasks), len(norms), sharex=True)
    for i, task in enumerate(tasks):
        for k, norm in enumerate(norms):
            for j, metric in enumerate(("accuracy", "loss")):
                axes = panels[2 * i + j][k]
                for _, measured, look in _main(found, task, norm):
                    axes.plot(measured.said["recurrences"], measured.said[metric], linewidth=1.2, **look)
                axes.axvline(TRAINED, color="0.7", linewidth=0.8, linestyle=":")
                axes.set_xscale("log", base=2)
                axes.set(title=f"{task}, {norm}" if j == 0 else "", ylabel=f"test {metric}" if k == 0 else "")
    for axes in panels[-1]:
        axes.set_xlabel("iterations")
    _share_y(panels)
    _legend(panels)
    return figure


def _over_iterations(found: Mapping[Cell, Measured], task: str) -> Any:
    _, norms = _rows(found)
    states = ("initial", "trained")
    figure, panels = _panels(len(states), len(norms), sharex=True)
    for j, state in enumerate(states):
        for k, norm in enumerate(norms):
            axes = panels[j][k]
            for _, measured, look in _main(found, task, norm):
                if state in measured.moves:
                    values = measured.moves[state].mean("relative_distance").amax(1).clamp_min(1e-8)
                    axes.plot(range(1, len(values) + 1), values, linewidth=1.0, **look)
            axes.set_yscale("log")
            axes.set(title=f"{task}, {norm}, {state}", ylabel="distance / norm" if k == 0 else "")
    for axes in panels[-1]:
        axes.set_xlabel("iterations")
    _share_y(panels)
    _legend(panels)
    return figure


def _training(found: Mapping[Cell, Measured]) -> Any:
    tasks, norms = _rows(found)
    figure, panels = _panels(len(tasks), len(norms))
    for i, task in enumerate(tasks):
        references = [m for cell, m in found.items() if cell.task == task and not cell.looped]
        for k, norm in enumerate(norms):
            axes = panels[i][k]
            for _, measured, look in _main(found, task, norm):
                axes.plot(measured.log["step"], measured.log["loss"], linewidth=1.0, **look)
            for measured in references[:1]:
                axes.plot(
                    measured.log["step"],
                    measured.log["loss"],
                    linewidth=1.0,
                    color="black",
                    label="feed-forward",
                )
            axes.set(title=f"{task}, {norm}", xlabel="step", ylabel="training loss" if k == 0 else "")
    _share_y(panels)
    _legend(panels)
    return figure


def _over_depth(found: Mapping[Cell, Measured]) -> Any:
    """Mixing of the largest pre-norm models of text by recurrence, before training and after."""
    most = max(cell.core for cell in found if cell.looped)
    first = min(cell.seed for cell in found)
    chosen = [
        (cell, measured)
        for cell, measured in found.items()
        if cell.looped and (cell.task, cell.norm, cell.core, cell.seed) == ("text", "pre", most, first)
    ]
    references = [m for cell, m in found.items() if not cell.looped]
    metrics = ("colsum_concentration", "mixing_score", "sink_rate")
    figure, panels = _panels(len(chosen), len(metrics), sharex=True)
    for i, (cell, measured) in enumerate(chosen):
        for k, metric in enumerate(metrics):
            axes = panels[i][k]
            for curve in measured.firings["initial"].curves(metric, by="recurrence"):
                axes.plot(curve.at, curve.mean, ".:", color="0.7", markersize=3, linewidth=0.8)
            for curve in measured.firings["trained"].curves(metric, by="recurrence"):
                loop = curve.recurrence is not None
                color = f"C{curve.recurrence}" if loop else "0.4"
                axes.plot(
                    curve.at, curve.mean, "o-", color=color, markersize=3, label=curve.label if loop else None
                )
            for reference in references:
                for curve in reference.firings["trained"].curves(metric, by="recurrence"):
                    axes.plot(curve.at, curve.mean, "--", color="black", linewidth=1.0, label="feed-forward")
            axes.set(
                title=f"{cell.shape}, {cell.injection}" if k == 0 else "", ylabel=metric.replace("_", " ")
            )
    for axes in panels[-1]:
        axes.set_xlabel("% of depth")
    _legend(panels)
    return figure


def _panels(rows: int, columns: int, **options: Any) -> Any:
    return new_figure(3.0 * columns, 2.2 * rows, rows, columns, squeeze=False, **options)


def _share_y(panels: Any) -> None:
    for row in panels:
        low = min(axes.get_ylim()[0] for axes in row)
        high = max(axes.get_ylim()[1] for axes in row)
        for axes in row:
            axes.set_ylim(low, high)


def _legend(panels: Any) -> None:
    """Every label once, in the first panel that has any."""
    named: dict[str, Any] = {}
    for axes in panels.flat:
        named |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if named:
        first = next(axes for axes in panels.flat if axes.get_legend_handles_labels()[0])
        first.legend(list(named.values()), list(named), fontsize=6)


def _page(
    found: Mapping[Cell, Measured],
    settings: Settings,
    out: Path,
    tables: Mapping[str, pd.DataFrame],
    missing: Sequence[Cell],
    options: str,
) -> str:
    synthetic = next((cell.task for cell in found if cell.task != "text"), "no synthetic task")
    seconds = sum(float(measured.log["seconds"][-1]) for measured in found.values())
    name, how = out.name, settings.measuring
    verdicts: list[Verdict] = []
    for state in ("initial", "trained"):
        verdicts += stability(tables["dynamics"], state)
    verdicts += self_organisation(found)[1] + matches(found, settings.window)[1]
    dynamics: Any = tables["dynamics"][["cell", "state", "learnt", "kind", *_MEASURED]]
    lines = [
        "# Injection, norm placement and block size in small looped models",
        "",
        how_it_was_made(f"python -m loop_lens.experiments ablation{options}"),
        f"{len(found)} models were trained and measured here, d_model {settings.width}, 4 heads, gated MLP of "
        f"{settings.mlp}, {TRAINED} iterations in training, on {synthetic} ({settings.symbols} symbols, "
        f"level {settings.level}; {settings.steps} steps of {settings.batch} sequences) and on text (Python's own "
        f"documentation, {settings.vocabulary} tokens, windows of {settings.window}; {settings.text_steps} steps of "
        f"{settings.text_batch}), AdamW at {settings.lr:g}, in {seconds / 60:.0f} minutes of training. The text "
        "seen is a small part of one epoch: these are barely trained language models. Seeds are in the names "
        "(`s0`); each model is one seed unless two are named.",
        "",
        "`pre`: pre-norm. `huginn`: the stream is normed after each branch. `ouro`: norms around each branch, and "
        "after each iteration. `injection`: each iteration starts from W [state; prelude output], the loop from "
        "noise; `none`: the loop starts from the prelude's output. Shapes are (prelude, core x iterations, coda).",
    ]
    if missing:
        lines += ["", f"Not measured: {', '.join(cell.name for cell in missing)}."]
    lines += [
        "",
        "## What the paper says of random and small models (arXiv 2604.11791)",
        "",
        f"Each loop is followed for {how.iterations} iterations, and compared with its state after {how.reference}. "
        f"It is at a *fixed point* if in the last quarter the cosine to that state, mean over test tokens, is at least "
        f"{STABLE} at every layer and iteration (1 - tau of the paper's Algorithm 1), and the norm grows by at most "
        f"{GROWS - 1:.0%} in the second half; *direction only* if the norm grows on, a "
        "*drift* if it grows on and the direction changes; on an *orbit* if it leaves that "
        f"state and comes back to within {BACK} of its norm; or none of these. A claim holds if all models agree, does "
        "not hold if fewer than half do, and cannot be told at this size in between. The paper makes the first seven "
        "claims of models with random weights; they are tested before training and, where a model learnt more "
        "than to name one token everywhere, after.",
        "",
        markdown_table(pd.DataFrame([vars(v) for v in verdicts])),
        "",
        *notes_of(out),
        "",
        "## Beyond the trained iterations",
        "",
        f"Not in the paper. Accuracy lasts if at most {LOST} is lost.",
        "",
        markdown_table(pd.DataFrame([vars(v) for v in beyond_training(found)[1]])),
        "",
        f"![Accuracy and loss against iterations]({name}/recurrences.png)",
        "",
        markdown_table(tables["extrapolation"].drop(columns=["injection", "norm"])),
        "",
        "## Dynamics",
        "",
        f"In the last quarter of {how.iterations} iterations, at the worst iteration and layer: distance to iteration "
        f"{how.reference} over the norm (`nearest`: at the best iteration), cosine to it, growth of the norm in the "
        "second half, degeneracy (least cosine of layer 0 to any layer's state there), step over the norm; and the "
        "spectral radius of the last iteration's Jacobian at the state that it was run at.",
        "",
        markdown_table(dynamics),
        "",
        *(
            f"![{task}: distance to iteration {how.reference}]({name}/convergence_{task}.png)"
            for task in dict.fromkeys(cell.task for cell in found if cell.looped)
        ),
        "",
        "## Stages on text",
        "",
    ]
    if not tables["organisation"].empty:
        lines += [
            markdown_table(tables["organisation"]),
            "",
            f"![Stages by recurrence]({name}/stages.png)",
            "",
        ]
    if not tables["matches"].empty:
        lines += [
            "Distance of the curves of concentration, sink rate and mixing score (over log T) over % of depth to "
            "those of the feed-forward references, root mean square, mean over recurrences:",
            "",
            markdown_table(tables["matches"]),
            "",
        ]
    ending = [f"`{name}/{table}.csv`" for table, values in tables.items() if not values.empty]
    lines += [
        "## Training",
        "",
        f"![Training loss]({name}/training.png)",
        "",
        f"Tables: {', '.join(ending)}.",
        "",
    ]
    return "\n".join(lines)
