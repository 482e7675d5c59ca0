"""Empty figures, and what every picture needs: colours in order, ticks that do not crowd."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from io import BytesIO
from typing import Any


def new_figure(width: float = 6, height: float = 3.2, rows: int = 1, columns: int = 1, **options: Any) -> Any:
    """A figure in inches and its axes, apart from matplotlib's global state.

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


def spaced(n: int, most: int) -> range:
    """At most so many of the places 0 to n - 1, evenly spaced from the first."""
    return range(0, n, max(1, -(-n // most)))


def shades(n: int) -> list[Any]:
    """Colours from the first to the last of n lines."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * k / max(n - 1, 1)) for k in range(n)]
