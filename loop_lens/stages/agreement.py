"""How alike a loop's stages are to those of a feed-forward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loop_lens.figures.lines import line_figure
from loop_lens.measuring.results import Result
from loop_lens.measuring.tables import grid_table
from loop_lens.stages.result import Curve, Span, Stages
from loop_lens.unrolling.numbers import whole


@dataclass(frozen=True)
class StageAgreement(Result):
    """How alike each recurrence's curve is to a feed-forward model's, metric by metric.

    Attributes:
        span: What counted as 100% of depth.
        metrics: Names of the metrics.
        correlation: Pearson's, of the two curves over % of depth [metric recurrence]; NaN where either is
            flat, or has fewer than three points.
        rank_correlation: Spearman's, of the same shape.
        rmse: Root mean square of their difference, in the metric's unit.
        relative_rmse: The same over the reference curve's standard deviation.

    Example:
        >>> from loop_lens.stages import StageAgreement
        >>> values = torch.tensor([[0.9, 0.7]])  # one metric, two recurrences
        >>> agreement = StageAgreement("model", ("sink_rate",), values, values, 1 - values, 1 - values)
        >>> agreement.to_dataframe()["recurrence"].tolist()
        [0, 1]
    """

    span: str
    metrics: tuple[str, ...]
    correlation: Tensor
    rank_correlation: Tensor
    rmse: Tensor
    relative_rmse: Tensor

    def to_dataframe(self) -> pd.DataFrame:
        """One row per metric and recurrence."""
        axes = {"metric": self.metrics, "recurrence": range(self.correlation.shape[1])}
        scores = ("correlation", "rank_correlation", "rmse", "relative_rmse")
        return grid_table(axes, {score: getattr(self, score) for score in scores})

    def plot(self, score: str = "correlation") -> Any:
        """One line per metric against the recurrence; a figure, not shown."""
        values: Tensor = getattr(self, score)
        names = [metric.replace("_", " ") for metric in self.metrics]
        lines = dict(zip(names, values, strict=True))
        return line_figure(lines, ylabel=score, xlabel="recurrence", marker="o")


def stage_agreement(
    looped: Stages,
    reference: Stages,
    *,
    metrics: Sequence[str] | None = None,
    span: Span = "model",
    points: int = 50,
) -> StageAgreement:
    """Compare each recurrence's curve over % of depth with a feed-forward model's.

    Both curves are interpolated linearly at evenly spaced depths, where both are defined. The prelude and
    the coda are not compared: they would agree equally in every recurrence. With ``span="model"`` a
    recurrence is compared with the part of the reference at the same depth; with ``span="block"`` with all
    of it, which is what repeating all stages in every loop would mean.

    Args:
        looped: Stages of a looped model.
        reference: Stages of a model without a loop, on the same prompts.
        metrics: Which ones; by default those that both have.
        points: Number of depths.

    Raises:
        ValueError: If the first has no loop or the second has one, they share no metric, or points is
            below 3.

    Example:
        >>> from loop_lens.stages import stage_agreement, stages
        >>> from transformer_lens.model_bridge.sources import build_bridge_from_module
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=model.cfg.d_vocab, n_embd=32, n_layer=4, n_head=4)
        >>> plain = build_bridge_from_module(
        ...     GPT2LMHeadModel(config), "GPT2LMHeadModel", hf_config=config, tokenizer=None
        ... )
        >>> tokens = model.to_tokens(prompt)
        >>> stage_agreement(stages(model, tokens), stages(plain, tokens)).correlation.shape  # metric recurrence
        torch.Size([8, 8])
    """
    if looped.recurrences == 0:
        raise ValueError("the first stages are of a model without a loop: give a looped model's first")
    if reference.recurrences:
        raise ValueError("the reference has a loop: give the stages of a feed-forward model")
    points = whole(points, "points")
    if points < 3:
        raise ValueError(f"points must be at least 3, got {points}")
    shared = [metric for metric in looped.metrics if metric in reference.metrics]
    chosen = tuple(shared if metrics is None else metrics)
    if not chosen:
        raise ValueError("there is no metric to compare: these stages share none, or metrics is empty")
    scores = [
        [
            _compare(curve, reference.curves(metric, by="recurrence")[0], points)
            for curve in looped.curves(metric, by="recurrence", span=span)
            if curve.recurrence is not None
        ]
        for metric in chosen
    ]
    return StageAgreement(span, chosen, *torch.tensor(scores, dtype=torch.float64).unbind(-1))


def _compare(curve: Curve, reference: Curve, points: int) -> tuple[float, float, float, float]:
    x, y, u, v = (values.numpy() for values in (curve.at, curve.mean, reference.at, reference.mean))
    low, high = max(x[0], u[0]), min(x[-1], u[-1])
    nan = float("nan")
    if low > high:
        return nan, nan, nan, nan
    grid = np.linspace(low, high, points if high > low else 1)
    mine, theirs = np.interp(grid, x, y), np.interp(grid, u, v)
    rmse = float(np.sqrt(np.mean((mine - theirs) ** 2)))
    spread = float(theirs.std())
    relative = rmse / spread if spread > 0 else nan
    if len(x) < 3 or len(u) < 3:
        return nan, nan, rmse, relative
    ranks = [pd.Series(values).rank().to_numpy() for values in (mine, theirs)]
    return _correlation(mine, theirs), _correlation(*ranks), rmse, relative


def _correlation(a: Any, b: Any) -> float:
    """Pearson's; NaN where one is flat up to rounding."""
    flat = any(np.ptp(values) <= 1e-9 * np.abs(values).max(initial=0.0) for values in (a, b))
    return float("nan") if flat else float(np.corrcoef(a, b)[0, 1])
