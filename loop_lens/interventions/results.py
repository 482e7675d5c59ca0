"""What a sweep found: a metric under each of its interventions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import pandas as pd
import torch
from torch import Tensor

from loop_lens.figures.canvas import new_figure
from loop_lens.figures.heatmap import draw_heatmap
from loop_lens.measuring.results import Result, require_alike


@dataclass(frozen=True)
class SweepResult(Result):
    """A metric under each intervention of a sweep.

    Attributes:
        values: The metric, averaged over prompts, of each cell: one dimension per axis. NaN where a
            sweep was interrupted before.
        axes: Names of the dimensions, in order.
        labels: What stands along each axis: iterations, layers, heads, firings as numbers, positions
            as ``(position, token)``.
        clean: The metric of the clean run.
        corrupted: The metric of the corrupted run.
        site: The kind of site.
        direction: ``"denoising"`` (the corrupted run receives clean values) or ``"noising"``.
        per_prompt: The metric of each prompt [*axes prompt], None where the metric gives one number
            for the batch.
        method: ``"patch"``, or how it was estimated: ``"attribution"``, ``"integrated"``.
        n_prompts: Number of prompts that the means are over.

    Example:
        >>> from loop_lens.interventions import LogitDiff, SweepResult
        >>> other = "a c c b b a ? b -> -> ->"
        >>> metric = LogitDiff("c", "a", position=-3)
        >>> swept = loop_lens.patch_sweep(model, prompt, other, metric, site="state_out", over="iteration")
        >>> swept.save("sweep.safetensors")
        >>> again = SweepResult.load("sweep.safetensors")
        >>> again.to_dataframe().columns.tolist()
        ['iteration', 'value', 'effect', 'recovered']
    """

    values: Tensor
    axes: tuple[str, ...]
    labels: dict[str, tuple[Any, ...]]
    clean: float
    corrupted: float
    site: str
    direction: str = "denoising"
    per_prompt: Tensor | None = None
    method: str = "patch"
    n_prompts: int = 1

    @property
    def base(self) -> float:
        """The metric of the run that received values."""
        return self.corrupted if self.direction == "denoising" else self.clean

    @property
    def donor(self) -> float:
        """The metric of the run that gave values."""
        return self.clean if self.direction == "denoising" else self.corrupted

    @property
    def effect(self) -> Tensor:
        """Change of the metric by each intervention [*axes]."""
        return self.values - self.base

    @property
    def recovered(self) -> Tensor:
        """Share of the way from the base run to the donor run [*axes]: 0 for nothing, 1 for all."""
        return self.effect / (self.donor - self.base)

    def merge(self, other: Self) -> Self:
        """The sweep over both results' prompts. Tokens beside positions are the first result's.

        Raises:
            ValueError: If they are of different cells, or of a metric with one number for all prompts.
        """
        require_alike(self, other, "axes", "site", "direction", "method")
        if self.per_prompt is None or other.per_prompt is None:
            raise ValueError("these sweeps do not merge: their metric gives one number for all prompts")
        if self._numbers != other._numbers:
            raise ValueError("these sweeps do not merge: their labels differ")
        n = self.n_prompts + other.n_prompts
        mine, theirs = self.n_prompts / n, other.n_prompts / n
        return replace(
            self,
            values=self.values * mine + other.values * theirs,
            clean=self.clean * mine + other.clean * theirs,
            corrupted=self.corrupted * mine + other.corrupted * theirs,
            per_prompt=torch.cat([self.per_prompt, other.per_prompt], dim=-1),
            n_prompts=n,
        )

    @property
    def _numbers(self) -> dict[str, list[Any]]:
        """The labels without the positions' tokens."""
        return {a: [x[0] if a == "position" else x for x in labels] for a, labels in self.labels.items()}

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: its place on each axis, value, effect and share recovered.

        Positions have a column ``token`` beside them.
        """
        rows: list[dict[str, Any]] = []
        columns = (self.values, self.effect, self.recovered)
        flat = [column.reshape(-1).tolist() for column in columns]
        for place, value, effect, share in zip(self._places(), *flat, strict=True):
            rows.append({**place, "value": value, "effect": effect, "recovered": share})
        return pd.DataFrame(rows)

    def _places(self) -> Iterable[dict[str, Any]]:
        for labels in itertools.product(*(self.labels[axis] for axis in self.axes)):
            place: dict[str, Any] = {}
            for axis, label in zip(self.axes, labels, strict=True):
                if axis == "position":
                    place["position"], place["token"] = label
                else:
                    place[axis] = label
            yield place

    def plot(self, *, what: Literal["effect", "recovered", "value"] = "effect") -> Any:
        """Heat maps of the last two axes, one for each place on the axes before them.

        Returns:
            A matplotlib figure, not shown.
        """
        grid = {"effect": self.effect, "recovered": self.recovered, "value": self.values}[what]
        grid = grid.detach().float().cpu()
        shown = self.axes if len(self.axes) > 1 else ("", *self.axes)
        if len(self.axes) == 1:
            grid = grid.unsqueeze(0)
        *outer, row_axis, column_axis = shown
        panels = list(itertools.product(*(range(len(self.labels[axis])) for axis in outer)))
        columns = min(len(panels), 4)
        rows = -(-len(panels) // columns)
        height, width = (0.28 * max(4, min(n, 24)) + 1.1 for n in grid.shape[-2:])
        figure, axes = new_figure(
            columns * max(3.0, width), rows * max(1.8, height), rows, columns, squeeze=False, sharey=True
        )
        reach = float(grid.nan_to_num().abs().max()) or 1.0
        image = None
        for panel, place in zip(axes.flat, panels, strict=False):
            image = draw_heatmap(
                panel,
                grid[place],
                rows=self._ticks(row_axis),
                columns=self._ticks(column_axis),
                row_name=row_axis,
                column_name=column_axis,
                limit=reach,
            )
            panel.set_title(", ".join(f"{a} {self._ticks(a)[i]}" for a, i in zip(outer, place, strict=True)))
        for panel in list(axes.flat)[len(panels) :]:
            panel.remove()
        names = {"effect": "change of the metric", "recovered": "share recovered", "value": "metric"}
        figure.colorbar(image, ax=axes, label=names[what])
        figure.suptitle(f"{self.site}, {self.direction} ({self.method})")
        return figure

    def _ticks(self, axis: str) -> list[str]:
        if not axis:
            return [""]
        if axis == "position":
            return [f"{token} {position}" for position, token in self.labels[axis]]
        return [str(label) for label in self.labels[axis]]
