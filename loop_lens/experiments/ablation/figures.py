"""The ablation's figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from loop_lens.experiments.ablation.cells import TRAINED, Cell
from loop_lens.experiments.ablation.measures import STATES, CellResult
from loop_lens.experiments.ablation.verdicts import MIXING
from loop_lens.experiments.norms import NORMS
from loop_lens.figures.canvas import new_figure

_COLORS = {"linear": "C0", "none": "C1"}
_STYLES = ("-", "--", ":", "-.")

Results = Mapping[Cell, CellResult]
Draw = Callable[[Any, CellResult, dict[str, Any]], None]


def figures(results: Results) -> Iterator[tuple[str, Any]]:
    """Every figure of the page, by name."""
    yield "recurrences", _against_recurrences(results)
    for task in dict.fromkeys(cell.task for cell in results if cell.looped):
        yield f"convergence_{task}", _over_iterations(results, task)
    yield "training", _training(results)
    if any(cell.task == "text" and cell.norm == "pre" for cell in results):
        yield "stages", _over_depth(results)


def _norms(results: Results) -> list[str]:
    return [norm for norm in NORMS if any(cell.norm == norm for cell in results)]


def _draw_cells(axes: Any, results: Results, task: str, norm: str, draw: Draw) -> None:
    """Draw the looped models of a panel: colour by injection, dashes by block size."""
    first = min(cell.seed for cell in results)
    cores = sorted({cell.core for cell in results if cell.looped}, reverse=True)
    for cell, result in results.items():
        if cell.looped and cell.outer and (cell.task, cell.norm, cell.seed) == (task, norm, first):
            style = _STYLES[cores.index(cell.core) % len(_STYLES)]
            label = f"{'injection' if cell.injection == 'linear' else 'none'}, core {cell.core}"
            draw(axes, result, {"color": _COLORS[cell.injection], "linestyle": style, "label": label})


def _against_recurrences(results: Results) -> Any:
    tasks, norms = list(dict.fromkeys(cell.task for cell in results)), _norms(results)
    rows = [(task, metric) for task in tasks for metric in ("accuracy", "loss")]
    figure, panels = _panels(len(rows), len(norms), sharex=True)
    for row, (task, metric) in zip(panels, rows, strict=True):

        def draw(axes: Any, result: CellResult, look: dict[str, Any], metric: str = metric) -> None:
            axes.plot(result.answers["recurrences"], result.answers[metric], linewidth=1.2, **look)

        for axes, norm in zip(row, norms, strict=True):
            _draw_cells(axes, results, task, norm, draw)
            axes.axvline(TRAINED, color="0.7", linewidth=0.8, linestyle=":")
            axes.set_xscale("log", base=2)
            axes.set_title(f"{task}, {norm}" if metric == "accuracy" else "")
        row[0].set_ylabel(f"test {metric}")
    return _finished(figure, panels, "iterations")


def _over_iterations(results: Results, task: str) -> Any:
    norms = _norms(results)
    figure, panels = _panels(len(STATES), len(norms), sharex=True)
    for row, state in zip(panels, STATES, strict=True):

        def draw(axes: Any, result: CellResult, look: dict[str, Any], state: str = state) -> None:
            moves = result.states[state].convergence
            if moves is not None:
                values = moves.mean("relative_distance").amax(1).clamp_min(1e-8)
                axes.plot(range(1, len(values) + 1), values, linewidth=1.0, **look)

        for axes, norm in zip(row, norms, strict=True):
            _draw_cells(axes, results, task, norm, draw)
            axes.set_yscale("log")
            axes.set_title(f"{task}, {norm}, {state}")
        row[0].set_ylabel("distance / norm")
    return _finished(figure, panels, "iterations")


def _training(results: Results) -> Any:
    tasks, norms = list(dict.fromkeys(cell.task for cell in results)), _norms(results)
    figure, panels = _panels(len(tasks), len(norms))

    def draw(axes: Any, result: CellResult, look: dict[str, Any]) -> None:
        axes.plot(result.log["step"], result.log["loss"], linewidth=1.0, **look)

    for row, task in zip(panels, tasks, strict=True):
        references = [r for cell, r in results.items() if cell.task == task and not cell.looped]
        for axes, norm in zip(row, norms, strict=True):
            _draw_cells(axes, results, task, norm, draw)
            for result in references[:1]:
                draw(axes, result, {"color": "black", "label": "feed-forward"})
            axes.set(title=f"{task}, {norm}", xlabel="step")
        row[0].set_ylabel("training loss")
    return _finished(figure, panels, "step")


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
                loop = curve.recurrence is not None
                look = {
                    "color": f"C{curve.recurrence}" if loop else "0.4",
                    "label": curve.label if loop else None,
                }
                axes.plot(curve.at, curve.mean, "o-", markersize=3, **look)
            for reference in references:
                for curve in reference.trained.stages.curves(metric, by="recurrence"):
                    axes.plot(curve.at, curve.mean, "--", color="black", linewidth=1.0, label="feed-forward")
            axes.set_ylabel(metric.replace("_", " "))
        row[0].set_title(f"{cell.shape}, {cell.injection}")
    return _finished(figure, panels, "% of depth", share_y=False)


def _panels(rows: int, columns: int, **options: Any) -> Any:
    return new_figure(3.0 * columns, 2.2 * rows, rows, columns, squeeze=False, **options)


def _finished(figure: Any, panels: Any, xlabel: str, *, share_y: bool = True) -> Any:
    """Name the axis below the panels, give those of a row one range, and write a legend once."""
    for axes in panels[-1]:
        axes.set_xlabel(xlabel)
    if share_y:
        for row in panels:
            limits: Sequence[tuple[float, float]] = [axes.get_ylim() for axes in row]
            for axes in row:
                axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    named: dict[str, Any] = {}
    for axes in panels.flat:
        named |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if named:
        first = next(axes for axes in panels.flat if axes.get_legend_handles_labels()[0])
        first.legend(list(named.values()), list(named), fontsize=6)
    return figure
