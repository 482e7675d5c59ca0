"""Heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loop_lens.figures.canvas import spaced
from loop_lens.figures.escaping import in_figure


def draw_heatmap(
    axes: Any,
    values: Any,
    *,
    rows: Sequence[Any],
    columns: Sequence[Any],
    row_name: str,
    column_name: str,
    limit: float | None = None,
    row_ticks: int = 16,
    **image: Any,
) -> Any:
    """Draw a matrix [row column] around zero: blue is positive, red negative, white nothing.

    Args:
        axes: Matplotlib's axes to draw on.
        values: The matrix.
        rows: Labels of the rows.
        columns: Labels of the columns; at most 16 are shown.
        row_name: Name of the vertical axis.
        column_name: Name of the horizontal axis.
        limit: The absolute value that has the full colour; the largest by default.
        row_ticks: How many rows are labelled at most.
        **image: Other colours, as for matplotlib's ``imshow``: ``cmap`` with ``norm``, or ``vmin`` and ``vmax``.

    Returns:
        The image, for a colour bar.

    Example:
        >>> from loop_lens.figures import draw_heatmap
        >>> from matplotlib.figure import Figure
        >>> figure = Figure()
        >>> image = draw_heatmap(
        ...     figure.subplots(),
        ...     torch.randn(2, 8),
        ...     rows=["layer 0", "layer 1"],
        ...     columns=range(8),
        ...     row_name="layer",
        ...     column_name="iteration",
        ... )
        >>> bar = figure.colorbar(image, label="effect")
    """
    grid = np.asarray(values, dtype=float)
    if not image:
        reach = limit or float(np.nanmax(np.abs(grid), initial=0.0)) or 1.0
        image = {"cmap": "RdBu", "vmin": -reach, "vmax": reach}
    picture = axes.imshow(grid, aspect="auto", interpolation="nearest", **image)
    for set_ticks, labels, most in ((axes.set_yticks, rows, row_ticks), (axes.set_xticks, columns, 16)):
        ticks = spaced(len(labels), most)
        set_ticks(ticks, [in_figure(labels[i]) for i in ticks])
    if any(len(str(label)) > 3 for label in columns):
        axes.tick_params(axis="x", rotation=60)
    axes.set(xlabel=in_figure(column_name), ylabel=in_figure(row_name))
    return picture
