"""Empty figures."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from io import BytesIO
from typing import Any


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
