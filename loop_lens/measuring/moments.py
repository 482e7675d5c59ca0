"""Counts, sums and sums of squares, cell by cell: means and spreads that merge exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from loop_lens.measuring.results import Result, merged
from loop_lens.measuring.tables import grid_table

Over = Literal["values", "prompts"]


class DivergedError(ValueError):
    """The model's states became NaN or infinite while they were measured.

    Example:
        >>> name = model.name("resid_post", iteration=2, layer=1)
        >>> try:
        ...     with model.hooks(fwd_hooks=[(name, lambda value, hook: value * float("nan"))]):
        ...         loop_lens.dynamics.convergence(model, prompts, progress=False)
        ... except loop_lens.measuring.DivergedError as error:
        ...     print(str(error).split(":")[0])
        values became NaN or infinite, first at iteration 2, layer 1
    """


@dataclass(frozen=True)
class Moments(Result):
    """Means and spreads of several metrics over the cells of a grid.

    Attributes:
        axes: The grid's axes in order, each with its labels, e.g. ``{"iteration": (0, 1), "layer": (0,)}``.
        metrics: Names of the metrics.
        sums: Of all values their `count`, `total` and `squares`, then of the prompts' own means the same:
            `prompts`, `prompt_total`, `prompt_squares` [6 metric *cell].

    Example:
        >>> ones = torch.ones(1, 2, dtype=torch.float64)  # metric iteration
        >>> sums = torch.stack([4 * ones, 8 * ones, 20 * ones, ones, 2 * ones, 4 * ones])
        >>> moments = loop_lens.measuring.Moments({"iteration": (0, 1)}, ("norm",), sums)
        >>> moments.mean("norm").tolist(), moments.std("norm").tolist()
        ([2.0, 2.0], [1.0, 1.0])
        >>> moments.merge(moments).count.tolist()
        [[8.0, 8.0]]
    """

    axes: dict[str, tuple[Any, ...]]
    metrics: tuple[str, ...]
    sums: Tensor = merged("add")

    @property
    def count(self) -> Tensor:
        """How many values went in [metric *cell]."""
        return self.sums[0]

    @property
    def total(self) -> Tensor:
        """Their sum [metric *cell]."""
        return self.sums[1]

    @property
    def squares(self) -> Tensor:
        """The sum of their squares [metric *cell]."""
        return self.sums[2]

    @property
    def prompts(self) -> Tensor:
        """How many prompts had any [metric *cell]."""
        return self.sums[3]

    @property
    def prompt_total(self) -> Tensor:
        """The sum of the prompts' own means [metric *cell]."""
        return self.sums[4]

    @property
    def prompt_squares(self) -> Tensor:
        """The sum of these means' squares [metric *cell]."""
        return self.sums[5]

    def _sums(self, metric: str, over: Over) -> Tensor:
        """Number, sum and sum of squares of a metric's values, or of the prompts' means [3 *cell]."""
        if metric not in self.metrics:
            raise ValueError(f"metric {metric!r} is unknown: there are {', '.join(self.metrics)}")
        own = self.sums[:, self.metrics.index(metric)]
        return own[3:] if over == "prompts" else own[:3]

    def mean(self, metric: str, *, over: Over = "values") -> Tensor:
        """Mean [*cell] over all values, or over the prompts' means; NaN where there is none."""
        n, total, _ = self._sums(metric, over)
        return total / n

    def std(self, metric: str, *, over: Over = "values") -> Tensor:
        """Standard deviation [*cell] of all values, or of the prompts' means."""
        n, total, squares = self._sums(metric, over)
        return (squares / n - (total / n) ** 2).clamp_min(0).sqrt()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: the axes, then each metric's mean, spread, and spread over prompts' means."""
        columns: dict[str, Tensor] = {}
        for metric in self.metrics:
            columns[metric] = self.mean(metric)
            columns[f"{metric}_std"] = self.std(metric)
            columns[f"{metric}_prompt_std"] = self.std(metric, over="prompts")
        return grid_table(self.axes, columns)


class Measured(Result):
    """Base of results whose numbers are moments; what the cells are, each says of its ``moments``.

    Example:
        >>> found = loop_lens.dynamics.convergence(model, prompts, progress=False)
        >>> found.metrics[:3]
        ('norm', 'floor', 'step')
        >>> found.std("step", over="prompts").shape  # iteration layer
        torch.Size([8, 2])
    """

    moments: Moments

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return self.moments.metrics

    def mean(self, metric: str, *, over: Over = "values") -> Tensor:
        """Mean [*cell] over all values, or over the prompts' means; NaN where there is none."""
        return self.moments.mean(metric, over=over)

    def std(self, metric: str, *, over: Over = "values") -> Tensor:
        """Standard deviation [*cell] of all values, or of the prompts' means."""
        return self.moments.std(metric, over=over)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell, with the mean and the spreads of each metric."""
        return self.moments.to_dataframe()


class Collector:
    """Takes values while a batch runs, and adds them to moments when it is over.

    Args:
        metrics: Names of the metrics.
        axes: The grid's axes with their labels.

    Example:
        >>> collector = loop_lens.measuring.Collector(["norm"], {"layer": [0, 1], "head": [0, 1, 2]})
        >>> collector.begin(n_prompts=2)
        >>> collector.put(slice(0, 1), (1,), torch.ones(1, 3, 2))  # all heads of layer 1 at once
        >>> collector.end()
        >>> collector.moments().count[0].tolist()
        [[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]]
    """

    def __init__(self, metrics: Sequence[str], axes: Mapping[str, Sequence[Any]]) -> None:
        self.metrics = tuple(metrics)
        self.axes = {name: tuple(labels) for name, labels in axes.items()}
        self._shape = (len(self.metrics), *(len(labels) for labels in self.axes.values()))
        self._sums = torch.zeros(6, *self._shape, dtype=torch.float64)
        self._batch: Tensor | None = None

    def begin(self, n_prompts: int, device: torch.device | str = "cpu") -> None:
        """Expect the values of so many prompts."""
        self._batch = torch.zeros(3, *self._shape, n_prompts, dtype=torch.float64, device=device)

    def put(
        self,
        metrics: slice | Sequence[int],
        cell: tuple[int, ...],
        values: Tensor,
        weights: Tensor | None = None,
    ) -> None:
        """Values of some metrics at one cell, or at all cells along the last axes.

        Args:
            metrics: Which metrics, by their places in the list.
            cell: Index on each axis, or on the first ones.
            values: [metric *axis prompt *several], with the axes that the cell leaves out.
            weights: 1 where a value counts, 0 at padding: [prompt pos], or whatever else broadcasts. All by default.
        """
        batch = self._batch
        assert batch is not None, "begin() comes first"
        lead = 2 + len(self.axes) - len(cell)
        real = torch.ones_like(values, dtype=torch.bool) if weights is None else weights.bool()
        # Padding may hold anything, NaN included, so it is replaced rather than multiplied away.
        wide = values.double().masked_fill(~real, 0.0).reshape(*values.shape[:lead], -1)
        n = real.expand_as(values).reshape(wide.shape).sum(-1).double()
        chosen = metrics if isinstance(metrics, slice) else list(metrics)
        batch[(slice(None), chosen, *cell)] += torch.stack([n, wide.sum(-1), wide.square().sum(-1)])

    def end(self) -> None:
        """Add the batch to the moments.

        Raises:
            DivergedError: If a value is NaN or infinite; names the first cell.
        """
        batch = self._batch
        assert batch is not None, "begin() comes first"
        self._batch = None
        count, total, squares = batch.cpu()
        bad = ~total.isfinite()
        if bool(bad.any()):
            order = bad.any(0).any(-1).flatten().nonzero()[0, 0]
            cell = torch.unravel_index(order, self._shape[1:])
            place = ", ".join(
                f"{axis} {labels[int(k)]}" for (axis, labels), k in zip(self.axes.items(), cell, strict=True)
            )
            raise DivergedError(
                f"values became NaN or infinite, first at {place}: fewer iterations, a wider dtype, or other "
                "weights are needed"
            )
        some = count > 0
        means = torch.where(some, total / count.clamp_min(1), 0.0)
        parts = (count, total, squares, some.double(), means, means.square())
        self._sums += torch.stack([part.sum(-1) for part in parts])

    def moments(self) -> Moments:
        """What has been collected so far."""
        return Moments(self.axes, self.metrics, self._sums.clone())
