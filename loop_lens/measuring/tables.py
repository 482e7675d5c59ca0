"""Grids of numbers as tidy tables."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from torch import Tensor


def grid_table(axes: Mapping[str, Sequence[Any]], columns: Mapping[str, Tensor]) -> pd.DataFrame:
    """One row per cell, the last axis fastest: its labels, then each column's value.

    Args:
        axes: The axes' labels.
        columns: Values [*axis], or what broadcasts to it.
    """
    cells = list(itertools.product(*axes.values()))
    shape = [len(labels) for labels in axes.values()]
    labels = {axis: [cell[k] for cell in cells] for k, axis in enumerate(axes)}
    return pd.DataFrame(labels | {name: v.expand(shape).flatten().tolist() for name, v in columns.items()})
