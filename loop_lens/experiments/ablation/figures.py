"""The ablation's figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from loop_lens.experiments.ablation.cells import TRAINED
from loop_lens.experiments.ablation.measures import STATES, CellResult
from loop_lens.experiments.ablation.verdicts import MIXING, Results
from loop_lens.experiments.norms import NORMS
from loop_lens.figures.canvas import new_figure

_COLORS = {"linear": "C0", "none": "C1"}
_STYLES = ("-", "--", ":", "-.")


class Row(NamedTuple):
    """A row of panels, one per norm: the models of a task, and a line for each of them."""

    task: str
    ylabel: str
    title: str  # with {norm}
    line: Callable[[CellResult], tuple[Any, Any]]
    feed_forward: bool = False  # whether the feed-forward model has a line, too


def figures(results: Results) -> dict[str, Any]:
    """Every figure of the page, by name."""
    tasks = list(dict.fromkeys(cell.task for cell in results))
    answers = [
        Row(
            task,
            f"test {metric}",
            title,
            lambda found, m=metric: (found.answers["recurrences"], found.answers[m]),
        )
        for task in tasks
        for metric, title in (("accuracy", f"{task}, {{norm}}"), ("loss", ""))
    ]
    figure = _by_norm(results, answers, "iterations", sharex=True)
    for axes in figure.axes:
        axes.axvline(TRAINED, color="0.7", linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
    drawn = {"recurrences": figure}
    for task in dict.fromkeys(cell.task for cell in results if cell.looped):
        distances = [
            Row(
                task,
                "distance / norm",
                f"{task}, {{norm}}, {state}",
                lambda found, s=state: _distances(found, s),
            )
            for state in STATES
        ]
        drawn[f"convergence_{task}"] = _by_norm(
            results, distances, "iterations", sharex=True, subplot_kw={"yscale": "log"}
        )
    losses = [
        Row(
            task,
            "training loss",
            f"{task}, {{norm}}",
            lambda found: (found.log["step"], found.log["loss"]),
            True,
        )
        for task in tasks
    ]
    drawn["training"] = _by_norm(results, losses, "step")
    if any(cell.task == "text" and cell.norm == "pre" for cell in results):
        drawn["stages"] = _over_depth(results)
    return drawn


def _distances(found: CellResult, state: str) -> tuple[Any, Any]:
    moves = found.states[state].convergence
    values = [] if moves is None else moves.mean("relative_distance").amax(1).clamp_min(1e-8)
    return range(1, len(values) + 1), values


def _by_norm(results: Results, rows: Sequence[Row], xlabel: str, **options: Any) -> Any:
    """The looped models of each task and norm: colour by injection, dashes by block size."""
    norms = [norm for norm in NORMS if any(cell.norm == norm for cell in results)]
    first = min(cell.seed for cell in results)
    cores = sorted({cell.core for cell in results if cell.looped}, reverse=True)
    figure, panels = _panels(len(rows), len(norms), **options)
    for row, row_of_axes in zip(rows, panels, strict=True):
        row_of_axes[0].set_ylabel(row.ylabel)
        plain = [result for cell, result in results.items() if cell.task == row.task and not cell.looped]
        for axes, norm in zip(row_of_axes, norms, strict=True):
            axes.set_title(row.title.format(norm=norm))
            for cell, result in results.items():
                if (
                    cell.looped
                    and cell.outer
                    and (cell.task, cell.norm, cell.seed) == (row.task, norm, first)
                ):
                    style = _STYLES[cores.index(cell.core) % len(_STYLES)]
                    label = f"{'injection' if cell.injection == 'linear' else 'none'}, core {cell.core}"
                    look = {"color": _COLORS[cell.injection], "linestyle": style, "label": label}
                    axes.plot(*row.line(result), linewidth=1.1, **look)
            for result in plain[:1] if row.feed_forward else ():
                axes.plot(*row.line(result), linewidth=1.1, color="black", label="feed-forward")
        limits = [axes.get_ylim() for axes in row_of_axes]
        for axes in row_of_axes:
            axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    return _finished(figure, panels, xlabel)


def _over_depth(results: Results) -> Any:
    """Mixing of the largest pre-norm models of text by recurrence, before training and after."""
    most = max(cell.core for cell in results if cell.looped)
    first = min(cell.seed for cell in results)
    chosen = [
        (cell, result)
        for cell, result in results.items()
        if cell.looped and (cell.task, cell.norm, cell.core, cell.seed) == ("text", "pre", most, first)
    ]
    references = [result for cell, result in results.items() if not cell.looped]
    figure, panels = _panels(len(chosen), len(MIXING), sharex=True)
    for row, (cell, result) in zip(panels, chosen, strict=True):
        for axes, metric in zip(row, MIXING, strict=True):
            for curve in result.initial.stages.curves(metric, by="recurrence"):
                axes.plot(curve.at, curve.mean, ".:", color="0.7", markersize=3, linewidth=0.8)
            for curve in result.trained.stages.curves(metric, by="recurrence"):
                inside = curve.recurrence is not None
                look = {"color": f"C{curve.recurrence}", "label": curve.label} if inside else {"color": "0.4"}
                axes.plot(curve.at, curve.mean, "o-", markersize=3, **look)
            for reference in references:
                for curve in reference.trained.stages.curves(metric, by="recurrence"):
                    axes.plot(curve.at, curve.mean, "--", color="black", linewidth=1.0, label="feed-forward")
            axes.set_ylabel(metric.replace("_", " "))
        row[0].set_title(f"({cell.outer}, {cell.core}x{cell.recurrences}, {cell.outer}), {cell.injection}")
    return _finished(figure, panels, "% of depth")


def _panels(rows: int, columns: int, **options: Any) -> Any:
    return new_figure(3.0 * columns, 2.2 * rows, rows, columns, squeeze=False, **options)


def _finished(figure: Any, panels: Any, xlabel: str) -> Any:
    """Name the axis below the panels, and write one legend for all."""
    for axes in panels[-1]:
        axes.set_xlabel(xlabel)
    named: dict[str, Any] = {}
    for axes in panels.flat:
        named |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if named:
        first = next(axes for axes in panels.flat if axes.get_legend_handles_labels()[0])
        first.legend(list(named.values()), list(named), fontsize=6)
    return figure
