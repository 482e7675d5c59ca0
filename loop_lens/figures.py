"""Small figures with matplotlib; returned, never shown."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from typing import Any

import numpy as np


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Any:
    """A figure and its axes, apart from matplotlib's global state.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("pictures need matplotlib: pip install 'loop-lens[viz]'")
    figure = _figure_class()(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


@cache
def _figure_class() -> Any:
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        """A figure that notebooks draw as the value of a cell, whether or not pyplot is in use."""

        def _repr_png_(self) -> bytes:
            buffer = BytesIO()
            self.savefig(buffer, format="png", dpi=100)
            return buffer.getvalue()

    return NotebookFigure


def heatmap(
    axes: Any,
    values: Any,
    *,
    rows: Sequence[Any],
    columns: Sequence[Any],
    row_name: str,
    column_name: str,
    limit: float | None = None,
) -> Any:
    """Draw a matrix [row column] around zero: blue is positive, red negative, white nothing.

    Returns:
        The image, for a colour bar.
    """
    grid = np.asarray(values, dtype=float)
    reach = limit or float(np.nanmax(np.abs(grid), initial=0.0)) or 1.0
    image = axes.imshow(grid, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
    for set_ticks, labels in ((axes.set_yticks, rows), (axes.set_xticks, columns)):
        step = -(-len(labels) // 16)
        ticks = list(range(0, len(labels), step))
        set_ticks(ticks, [str(labels[i]) for i in ticks])
    if any(len(str(label)) > 3 for label in columns):
        axes.tick_params(axis="x", rotation=60)
    axes.set(xlabel=column_name, ylabel=row_name)
    return image
