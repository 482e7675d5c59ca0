"""Small figures with matplotlib; returned, never shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


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
