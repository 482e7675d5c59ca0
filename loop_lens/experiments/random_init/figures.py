"""The paper's figures of models with random weights, drawn anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loop_lens.experiments.norms import NORMS
from loop_lens.experiments.random_init.measures import Kind, RandomResult
from loop_lens.figures.canvas import new_figure, shades

_TITLES = {"pre": "pre-norm", "huginn": "Huginn's norm", "ouro": "Ouro's norms"}


def layer_grid(
    models: Mapping[Kind, RandomResult],
    curve: str,
    *,
    layers: int,
    overlay: str | None = None,
    log: bool = False,
    ylabel: str,
) -> Any:
    """A curve of every layer against the iteration, one panel per norm (columns) and injection (rows).

    Args:
        models: Measured models by kind.
        curve: One of `RandomResult.curves`; the colour goes from the first layer to the last.
        layers: Which depth to draw.
        overlay: One of `RandomResult.degeneracy`, dashed.
        log: Whether the vertical axis is logarithmic.
        ylabel: Its name.
    """
    figure, panels = new_figure(8.6, 4.6, 2, 3, squeeze=False, sharex=True, sharey=not log)
    colours = shades(layers)
    for row, injection in enumerate((True, False)):
        for column, norm in enumerate(NORMS):
            axes, found = panels[row][column], models.get((layers, injection, norm))
            if found is None:
                axes.set_axis_off()
                continue
            values = found.curves[curve]
            for layer in range(layers):
                axes.plot(_at(values), _drawn(values[:, layer], log), color=colours[layer], linewidth=0.9)
            if overlay:
                line = _drawn(found.degeneracy[overlay], log)
                axes.plot(_at(line), line, "--", color="black", linewidth=1.1, label="farthest layer")
            if log:
                axes.set_yscale("log")
            axes.set_title(f"{_TITLES[norm]}, {'injection' if injection else 'no injection'}", fontsize=9)
            if row == 1:
                axes.set_xlabel("iteration")
            if column == 0:
                axes.set_ylabel(ylabel)
    if overlay:
        panels[0][0].legend(fontsize=7)
    _colour_bar(figure, panels, layers)
    return figure


def figure_6(models: Mapping[Kind, RandomResult], *, layers: int) -> Any:
    """Left: cosine to the last state, the layers' mean and range; right: degeneracy. One line per model."""
    figure, (left, right) = new_figure(8.6, 3.8, 1, 2, sharex=True, sharey=True)
    for k, norm in enumerate(NORMS):
        for injection in (True, False):
            found = models.get((layers, injection, norm))
            if found is None:
                continue
            style, values = ("-" if injection else "--"), found.curves["last_cosine"]
            label = f"{_TITLES[norm]}, {'injection' if injection else 'none'}"
            left.plot(_at(values), values.mean(1), style, color=f"C{k}", linewidth=1.2, label=label)
            left.fill_between(
                _at(values), values.amin(1), values.amax(1), color=f"C{k}", alpha=0.12, linewidth=0
            )
            apart = found.degeneracy["last_cosine"]
            right.plot(_at(apart), apart, style, color=f"C{k}", linewidth=1.2)
    left.set(xlabel="iteration", ylabel="cosine", title="each layer to its own last state")
    right.set(xlabel="iteration", title="layer 0 to the farthest layer's last state")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
    return figure


def figure_31(models: Mapping[Kind, RandomResult]) -> Any:
    """Cosine to the last state at every depth (columns) for the six models (rows), a line per layer."""
    depths = sorted({layers for layers, _, _ in models})
    kinds = [(injection, norm) for injection in (True, False) for norm in NORMS]
    figure, panels = new_figure(
        2.4 * len(depths) + 1.2, 9.0, len(kinds), len(depths), squeeze=False, sharex=True, sharey=True
    )
    for row, (injection, norm) in enumerate(kinds):
        for column, layers in enumerate(depths):
            axes, found = panels[row][column], models.get((layers, injection, norm))
            if found is None:
                axes.set_axis_off()
                continue
            values = found.curves["last_cosine"]
            for layer, shade in enumerate(shades(layers)):
                axes.plot(_at(values), values[:, layer], color=shade, linewidth=0.8)
            if row == 0:
                axes.set_title(f"{layers} layers", fontsize=9)
            if row == len(kinds) - 1:
                axes.set_xlabel("iteration")
            if column == 0:
                axes.set_ylabel(f"{_TITLES[norm]},\n{'injection' if injection else 'none'}", fontsize=8)
    _colour_bar(figure, panels, None)
    return figure


def _at(values: Tensor) -> list[int]:
    return list(range(len(values)))


def _drawn(values: Tensor, log: bool) -> Tensor:
    """A log axis leaves out what is 0 by construction."""
    return values.where(values > 0, float("nan")) if log else values


def _colour_bar(figure: Any, panels: Any, layers: int | None) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    top = layers - 1 if layers is not None else 1
    colours = ListedColormap(shades(layers or 64))
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, max(top, 1)), colours), ax=panels, fraction=0.03, pad=0.02, aspect=40
    )
    bar.set_label("layer")
    if layers is None:
        bar.set_ticks([0, 1], labels=["first", "last"])
