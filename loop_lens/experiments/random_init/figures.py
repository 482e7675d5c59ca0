"""The paper's figures of models with random weights, drawn anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from loop_lens.experiments.norms import NORMS
from loop_lens.experiments.random_init.measures import Kind, RandomResult
from loop_lens.figures.canvas import new_figure, shades

_TITLES = {"pre": "pre-norm", "huginn": "Huginn's norm", "ouro": "Ouro's norms"}
_INJECTIONS = {True: "injection", False: "no injection"}

Models = Mapping[Kind, RandomResult]


def layer_grid(
    models: Models, curve: str, *, layers: int, overlay: str | None = None, log: bool = False, ylabel: str
) -> Any:
    """One of `RandomResult.curves`, a line per layer against the iteration; panels by norm and injection.

    ``overlay`` is one of `RandomResult.degeneracy`, dashed; ``log`` makes the vertical axis logarithmic.
    """
    kinds = [[(layers, injection, norm) for norm in NORMS] for injection in _INJECTIONS]
    figure, panels = _panels(models, kinds, curve, 8.6, 4.6, log=log, sharex=True, sharey=not log)
    for row, axes_row in zip(kinds, panels, strict=True):
        axes_row[0].set_ylabel(ylabel)
        for kind, axes in zip(row, axes_row, strict=True):
            axes.set_title(f"{_TITLES[kind[2]]}, {_INJECTIONS[kind[1]]}", fontsize=9)
            if overlay and kind in models:
                line = _drawn(models[kind].degeneracy[overlay], log)
                axes.plot(range(len(line)), line, "--", color="black", linewidth=1.1, label="farthest layer")
    if overlay:
        panels[0][0].legend(fontsize=7)
    _colour_bar(figure, panels, layers)
    return figure


def figure_31(models: Models) -> Any:
    """Cosine to the last state at every depth (columns) for the six models (rows), a line per layer."""
    depths = sorted({layers for layers, _, _ in models})
    kinds = [[(n, injection, norm) for n in depths] for injection in _INJECTIONS for norm in NORMS]
    width = 2.4 * len(depths) + 1.2
    figure, panels = _panels(models, kinds, "last_cosine", width, 9.0, sharex=True, sharey=True)
    for layers, axes in zip(depths, panels[0], strict=True):
        axes.set_title(f"{layers} layers", fontsize=9)
    for row, axes_row in zip(kinds, panels, strict=True):
        _, injection, norm = row[0]
        axes_row[0].set_ylabel(f"{_TITLES[norm]},\n{'injection' if injection else 'none'}", fontsize=8)
    bar = _colour_bar(figure, panels, 64)
    bar.set_ticks([0, 63], labels=["first", "last"])
    return figure


def figure_6(models: Models, *, layers: int) -> Any:
    """Left: cosine to the last state, the layers' mean and range; right: degeneracy. One line per model."""
    figure, (left, right) = new_figure(8.6, 3.8, 1, 2, sharex=True, sharey=True)
    for (n, injection, norm), found in models.items():
        if n == layers:
            values, apart = found.curves["last_cosine"], found.degeneracy["last_cosine"]
            color = f"C{list(NORMS).index(norm)}"
            look: dict[str, Any] = {
                "color": color,
                "linestyle": "-" if injection else "--",
                "linewidth": 1.2,
                "label": f"{_TITLES[norm]}, {'injection' if injection else 'none'}",
            }
            low, high = values.amin(1), values.amax(1)
            left.plot(range(len(values)), values.mean(1), **look)
            left.fill_between(range(len(values)), low, high, color=color, alpha=0.12, linewidth=0)
            right.plot(range(len(apart)), apart, **look)
    left.set(xlabel="iteration", ylabel="cosine", title="each layer to its own last state")
    right.set(xlabel="iteration", title="layer 0 to the farthest layer's last state")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
    return figure


def _panels(
    models: Models,
    kinds: Sequence[Sequence[Kind]],
    curve: str,
    width: float,
    height: float,
    *,
    log: bool = False,
    **options: Any,
) -> Any:
    """A panel per kind of model, with a line per layer; empty where there is no such model."""
    figure, panels = new_figure(width, height, len(kinds), len(kinds[0]), squeeze=False, **options)
    for kind, axes in zip((kind for row in kinds for kind in row), panels.flat, strict=True):
        if kind not in models:
            axes.set_axis_off()
            continue
        values = models[kind].curves[curve]
        for line, colour in zip(values.T, shades(kind[0]), strict=True):
            axes.plot(range(len(values)), _drawn(line, log), color=colour, linewidth=0.9)
        axes.set_yscale("log" if log else "linear")
    for axes in panels[-1]:
        axes.set_xlabel("iteration")
    return figure, panels


def _drawn(values: Tensor, log: bool) -> Tensor:
    """A log axis leaves out what is 0 by construction."""
    return values.where(values > 0, float("nan")) if log else values


def _colour_bar(figure: Any, panels: Any, layers: int) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colours = ScalarMappable(Normalize(0, max(layers - 1, 1)), ListedColormap(shades(layers)))
    return figure.colorbar(colours, ax=panels, fraction=0.03, pad=0.02, aspect=40, label="layer")
