"""Lines against iterations, with bands around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loop_lens.figures.canvas import new_figure, spaced
from loop_lens.figures.escaping import in_figure


def draw_band(
    axes: Any, at: Any, middle: Any, low: Any, high: Any, *, alpha: float = 0.15, **line: Any
) -> None:
    """Draw a line, and a band between two others in its colour."""
    (drawn,) = axes.plot(at, middle, **line)
    axes.fill_between(at, low, high, color=drawn.get_color(), alpha=alpha, linewidth=0)


def line_figure(
    lines: Mapping[str, Any],
    *,
    ylabel: str,
    xlabel: str = "iteration",
    at: Sequence[float] | None = None,
    ticks: Sequence[Any] | None = None,
    bands: Mapping[str, tuple[Any, Any]] | None = None,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
    level: tuple[float, str | None] | None = None,
    log: bool = False,
    marker: str | None = None,
    legend: bool = True,
) -> Any:
    """Draw a line per label; a matplotlib figure, not shown.

    Args:
        lines: Values by label [point].
        ylabel: Name of the vertical axis; underscores become spaces.
        xlabel: Name of the horizontal axis.
        at: Where the points lie; 0, 1, 2, ... by default.
        ticks: What to call the points; at most 16 are named.
        bands: Lower and upper ends of a band around some lines, by label.
        styles: What matplotlib's ``plot`` takes, by label.
        level: A dotted horizontal line, and its label.
        log: Whether the vertical axis is logarithmic.
        marker: Matplotlib's marker of the points.
        legend: Whether to name the lines.

    Example:
        >>> from loop_lens.figures import line_figure
        >>> figure = line_figure({"layer 0": [1.0, 0.1, 0.01]}, ylabel="step", log=True)
        >>> figure.axes[0].get_yscale()
        'log'
    """
    figure, axes = new_figure()
    bands, styles = bands or {}, styles or {}
    for label, values in lines.items():
        places = range(len(values)) if at is None else at
        options: dict[str, Any] = {
            "marker": marker,
            "markersize": 3,
            "label": in_figure(label),
            **styles.get(label, {}),
        }
        if label in bands:
            draw_band(axes, places, values, *bands[label], **options)
        else:
            axes.plot(places, values, **options)
    if level is not None:
        axes.axhline(
            level[0], color="gray", linestyle=":", label=None if level[1] is None else in_figure(level[1])
        )
    if log:
        axes.set_yscale("log")
    axes.set(xlabel=in_figure(xlabel), ylabel=in_figure(ylabel).replace("_", " "))
    if ticks is not None:
        named = spaced(len(ticks), 16)
        axes.set_xticks(named, [in_figure(ticks[i]) for i in named])
    if legend:
        axes.legend(fontsize=7, ncols=2)
    return figure
