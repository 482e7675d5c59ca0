"""Stages of inference by realised depth, by recurrence, and by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from loop_lens.figures.canvas import new_figure, shades, spaced
from loop_lens.figures.lines import draw_band
from loop_lens.measuring.moments import Measured, Moments
from loop_lens.unrolling.tree import Iteration

By = Literal["depth", "recurrence", "layer"]
Span = Literal["model", "block"]
BY: tuple[By, ...] = ("depth", "recurrence", "layer")
SPANS: tuple[Span, ...] = ("model", "block")
_LABELLED = 8  # curves that get a legend entry each; beyond, evenly spaced ones


class Curve(NamedTuple):
    """One line of a grouping: its label (``"recurrence 3"``, ``"prelude"``, ``"loop layer 2"``), then [firing] where it
    lies on the axis, the metric's mean and its spread over prompts; the recurrence is None outside the loop.
    """

    label: str
    at: Tensor
    mean: Tensor
    spread: Tensor
    recurrence: int | None


@dataclass(frozen=True)
class Stages(Measured):
    """What attention and the residual stream do at every firing.

    Attributes:
        firings: Segment, iteration, layer and physical block of each firing, in order.
        tau: Mean attention from which a head counted as a sink.
        sink_token: Position of the token that may be the sink.
        moments: Of each metric, over prompts (or tokens) [firing].
        heads: Of ``colsum_concentration``, ``sink`` (mean attention to the sink's token) and ``mixing_score``, over
            prompts [firing head]; None without attention.

    Example:
        >>> found = loop_lens.stages.stages(model, prompts)
        >>> found.mean("sink_rate").shape  # of 1 + 8 x 2 + 1 firings
        torch.Size([18])
        >>> [curve.label for curve in found.curves("sink_rate", by="layer")]
        ['prelude layer 0', 'loop layer 0', 'loop layer 1', 'coda layer 0']
    """

    firings: tuple[tuple[str, Iteration, int, int], ...]
    tau: float
    sink_token: int
    moments: Moments
    heads: Moments | None

    @property
    def recurrences(self) -> int:
        """Number of iterations of the outermost loop; 0 of a feed-forward model."""
        return len({t for t in self._recurrence if t is not None})

    @cached_property
    def _recurrence(self) -> tuple[int | None, ...]:
        """The outermost loop's iteration of each firing."""
        return tuple(t[0] if isinstance(t, tuple) else t for _, t, _, _ in self.firings)

    @cached_property
    def _visit(self) -> tuple[int, ...]:
        """How often each firing's block has fired before."""
        seen: dict[int, int] = {}
        visits: list[int] = []
        for _, _, _, block in self.firings:
            visits.append(seen.get(block, 0))
            seen[block] = visits[-1] + 1
        return tuple(visits)

    def percent(self, *, span: Span = "model") -> Tensor:
        """How far through a recurrence each firing ends, in % of its blocks [firing].

        100% is of the ``span``: ``"model"``, the prelude, one recurrence and the coda, as if the loop ran once, or
        ``"block"``, one recurrence alone; what is outside the loop is NaN then. A feed-forward model is one recurrence.
        """
        if span not in SPANS:
            raise ValueError(f"span={span!r} is unknown: choose 'model' or 'block'")
        inside = [t is not None for t in self._recurrence]
        if not any(inside):
            n = len(self.firings)
            return 100 * torch.arange(1, n + 1, dtype=torch.float64) / n
        before, each = inside.index(True), sum(t == 0 for t in self._recurrence)
        whole = each if span == "block" else inside.count(False) + each
        places: list[float] = []
        starts: dict[int, int] = {}
        for i, t in enumerate(self._recurrence):
            if t is not None:
                place = i - starts.setdefault(t, i) + (before if span == "model" else 0)
            elif span == "block":
                place = float("nan")
            else:
                place = i if i < before else i - sum(inside) + each
            places.append(place + 1)
        return 100 * torch.tensor(places, dtype=torch.float64) / whole

    def curves(self, metric: str, *, by: By = "depth", span: Span = "model") -> list[Curve]:
        """A metric's lines in one of the three groupings.

        By ``"depth"`` there is one line over all firings, which count from 1; by ``"recurrence"`` one for each
        recurrence, and for the prelude and the coda, over % of depth, see `percent`; by ``"layer"`` one for each
        physical layer over how often it has fired.
        """
        mean, spread = self.mean(metric), self.std(metric, over="prompts")
        groups: dict[tuple[str, int | None], list[int]] = {}
        if by == "depth":
            groups["model", None] = list(range(len(self.firings)))
            at = torch.arange(1, len(self.firings) + 1, dtype=torch.float64)
        elif by == "recurrence":
            at = self.percent(span=span)
            for i, (t, (segment, _, _, _)) in enumerate(zip(self._recurrence, self.firings, strict=True)):
                if not bool(at[i].isnan()):
                    groups.setdefault((segment if t is None else f"recurrence {t}", t), []).append(i)
        elif by == "layer":
            at = torch.tensor(self._visit, dtype=torch.float64)
            for i, (segment, t, layer, _) in enumerate(self.firings):
                label = f"{segment} layer {layer}"
                groups.setdefault((label, None if t is None else 0), []).append(i)
        else:
            raise ValueError(f"by={by!r} is unknown: choose one of {', '.join(BY)}")
        return [
            Curve(label, at[rows], mean[rows], spread[rows], recurrence)
            for (label, recurrence), rows in groups.items()
        ]

    def to_dataframe(self, *, by: By = "depth", span: Span = "model") -> pd.DataFrame:
        """One row per firing, in the order of a grouping: where it is in each, then each metric's mean and spreads."""
        if by not in BY:
            raise ValueError(f"by={by!r} is unknown: choose one of {', '.join(BY)}")
        table = pd.concat([self._places(span), self.moments.to_dataframe().drop(columns="firing")], axis=1)
        order = {"depth": ["depth"], "recurrence": ["recurrence", "depth"], "layer": ["block", "depth"]}[by]
        return table.sort_values(order, na_position="first", ignore_index=True)

    def _places(self, span: Span) -> pd.DataFrame:
        segment, iteration, layer, block = zip(*self.firings, strict=True)
        return pd.DataFrame(
            {
                "depth": range(1, len(self.firings) + 1),
                "segment": segment,
                "iteration": pd.Series(iteration, dtype=object),
                "layer": layer,
                "block": block,
                "recurrence": pd.array(self._recurrence, dtype="Int64"),
                "visit": self._visit,
                "percent": self.percent(span=span).tolist(),
            }
        )

    def heads_to_dataframe(self) -> pd.DataFrame:
        """One row per firing and head: where it is, then each head's metrics.

        Raises:
            ValueError: If attention was not measured.
        """
        if self.heads is None:
            raise ValueError("attention was not measured: measure again with patterns=True")
        n = len(self.heads.axes["head"])
        places = self._places("model")
        places = places.loc[places.index.repeat(n)].reset_index(drop=True)
        return pd.concat([places, self.heads.to_dataframe().drop(columns="firing")], axis=1)

    def plot(
        self,
        metric: str = "matrix_entropy",
        by: By = "depth",
        *,
        span: Span = "model",
        against: Stages | Mapping[str, Stages] | None = None,
    ) -> Any:
        """A metric in one of the three groupings, see `curves`; a figure, not shown.

        References such as a feed-forward model's stages are drawn dashed ``against`` it, by name if several.
        """
        figure, axes = new_figure(6.4, 3.4)
        mine = self.curves(metric, by=by, span=span)
        looping = [curve for curve in mine if curve.recurrence is not None]
        colours, labelled = shades(len(looping)), spaced(len(looping), _LABELLED)
        for curve in mine:
            if curve.recurrence is None:
                if by == "layer":
                    axes.axhline(float(curve.mean[0]), color="0.7", linewidth=0.8, linestyle=":")
                    continue
                color, label = ("C0" if by == "depth" else "0.5"), None if by == "depth" else curve.label
            else:
                k = next(i for i, other in enumerate(looping) if other is curve)
                color, label = colours[k], curve.label if k in labelled else None
            ends = curve.mean - curve.spread, curve.mean + curve.spread
            options = {"color": color, "label": label, "marker": "o" if len(curve.at) == 1 else None}
            draw_band(axes, curve.at, curve.mean, *ends, markersize=3, alpha=0.12, **options)
        if by == "depth" and self.recurrences <= 64:
            for i in range(1, len(self.firings)):
                if self._recurrence[i] != self._recurrence[i - 1]:
                    axes.axvline(i + 0.5, color="0.85", linewidth=0.6, zorder=0)
        references = {"reference": against} if isinstance(against, Stages) else dict(against or {})
        for k, (name, other) in enumerate(references.items()):
            color = "black" if k == 0 else f"C{k}"
            for j, curve in enumerate(other.curves(metric, by=by, span=span)):
                label = name if j == 0 else None
                if by == "layer" and len(curve.at) == 1:
                    axes.axhline(float(curve.mean), color=color, linewidth=0.5, linestyle="--", label=label)
                else:
                    axes.plot(curve.at, curve.mean, "--", color=color, linewidth=1.2, label=label)
        axes.set(xlabel=_axis(by, span), ylabel=metric.replace("_", " "))
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, ncols=2)
        return figure


def _axis(by: By, span: Span) -> str:
    if by == "depth":
        return "realised depth (blocks)"
    if by == "layer":
        return "recurrence"
    return "% of depth, prelude and coda included" if span == "model" else "% of the recurrent block's depth"
