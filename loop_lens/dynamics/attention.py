"""Which heads settle, when, and which never do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.dynamics.distances import DISTANCES, PER_QUERY, require_distances, require_two_tokens
from loop_lens.dynamics.states import LoopMeasured, LoopProbe
from loop_lens.figures.canvas import new_figure
from loop_lens.figures.heatmap import draw_heatmap
from loop_lens.measuring.collecting import measured
from loop_lens.measuring.moments import Collector, Moments
from loop_lens.measuring.results import merged
from loop_lens.measuring.tables import grid_table
from loop_lens.measuring.vectors import lengths
from loop_lens.prompts.reader import Batch
from loop_lens.unrolling.sites import Site

Of = Literal["step", "distance"]


@dataclass(frozen=True)
class AttentionSettling(LoopMeasured):
    """How each head's pattern moves per iteration.

    Attributes:
        reference: The number of iterations whose last patterns the distances are to, None without.
        tolerance: The step at which a prompt counts as settled.
        metric: The distance that the tolerance is of.
        eps: Spacing of the model's dtype at 1.
        moments: Of each metric, over queries and prompts (Frobenius: over prompts) [iteration layer head].
        prompts: Number of prompts.
        settled_prompts: How many of them have settled by each iteration [iteration layer head].

    Example:
        >>> settling = loop_lens.dynamics.attention_settling(model, prompts, reference=16)
        >>> settling.settled()  # of each layer and head: the iteration, NaN for never
        tensor([[6., 5., 4., nan],
                [nan, nan, 6., nan]], dtype=torch.float64)
        >>> settling.settled(0.1, of="distance").isnan().any().item()
        False
    """

    segment: str
    reference: int | None
    tolerance: float
    metric: str
    eps: float
    moments: Moments
    prompts: int = merged("add")
    settled_prompts: Tensor = merged("add")

    @property
    def share_settled(self) -> Tensor:
        """Share of the prompts on which a head has settled by an iteration [iteration layer head]."""
        return self.settled_prompts / self.prompts

    def floor(self, metric: str | None = None) -> Tensor:
        """What rounding the pattern itself to the model's dtype moves it by [iteration layer head].

        The scores' rounding comes on top of it, more so the larger they are.
        """
        norm = self.mean("norm")
        metric = metric or self.metric
        require_distances((metric,))
        if metric == "frobenius":
            return self.eps * norm
        return torch.full_like(norm, self.eps / (2 if metric == "total_variation" else 8**0.5))

    def settled(
        self, tolerance: float | None = None, *, metric: str | None = None, of: Of = "step"
    ) -> Tensor:
        """Where each head settles, as its place among the iterations [layer head]; NaN where it never does.

        By ``"step"`` it is the first iteration after which every mean step stays within the tolerance, by
        ``"distance"`` the first from which every mean distance to the reference does; tolerance and metric are by
        default those of the measurement.

        Raises:
            ValueError: If the tolerance is below the dtype's rounding, so that a head that stands still would
                seem to move; or there is no reference to be distant from.
        """
        tolerance = self.tolerance if tolerance is None else tolerance
        metric = metric or self.metric
        floor = float(self.floor(metric).nan_to_num().max())
        if tolerance < floor:
            raise ValueError(
                f"a tolerance of {tolerance:g} is below the rounding of the model's dtype ({floor:.2g} in "
                f"{metric}): give a larger one, or measure in a wider dtype"
            )
        if of == "distance" and self.reference is None:
            raise ValueError("there are no distances: call attention_settling(..., reference=128)")
        over = self.mean(f"{metric}_{of}") > tolerance
        return _first_settled(over, closed=of == "distance")

    def heads(
        self, tolerance: float | None = None, *, metric: str | None = None, of: Of = "step"
    ) -> pd.DataFrame:
        """One row per head: where it is `settled` (an iteration, None for never), its last step, the rounding, and
        the share of prompts on which it has settled at the tolerance that was measured.
        """
        metric = metric or self.metric
        where = self.settled(tolerance, metric=metric, of=of)
        columns = {
            "last_step": self.mean(f"{metric}_step")[-1],
            "floor": self.floor(metric)[-1],
            "share_settled": self.share_settled[-1],
        }
        table = grid_table({"layer": self.layers, "head": self.moments.axes["head"]}, columns)
        settled = [None if at != at else self.iterations[int(at)] for at in where.flatten().tolist()]
        table.insert(2, "settled", pd.Series(settled, dtype=object))
        return table

    def to_dataframe(self) -> pd.DataFrame:
        """One row per iteration, layer and head, with the mean and the spreads of each metric."""
        table = self.moments.to_dataframe()
        table["floor"] = self.floor().flatten().tolist()
        table["share_settled"] = self.share_settled.flatten().tolist()
        return table

    def plot(self, metric: str | None = None) -> Any:
        """Heads by iterations, steps as colour (log scale), a line where each head settles; not shown."""
        metric = metric or f"{self.metric}_step"
        kind, _, of = metric.rpartition("_")
        values = self.mean(metric)
        grid = values.flatten(1).T
        figure, axes = new_figure(7, 1.2 + 0.22 * len(grid))
        from matplotlib.colors import LogNorm  # new_figure has said so if it is not there

        # Below the rounding there is nothing to tell apart.
        low = max(float(self.floor(kind).nan_to_num().max()), float(values.nan_to_num(1.0).min()), 1e-12)
        scale = LogNorm(low, max(float(values.nan_to_num().max()), 2 * low), clip=True)
        image = draw_heatmap(
            axes,
            grid,
            rows=[f"{layer}.{head}" for layer in self.layers for head in self.moments.axes["head"]],
            columns=self.iterations,
            row_name="layer.head",
            column_name="iteration",
            row_ticks=32,
            cmap="viridis",
            norm=scale,
        )
        axes.tick_params(axis="y", labelsize=7)
        try:
            where = self.settled(metric=kind, of="distance" if of == "distance" else "step").flatten()
        except ValueError:
            where = torch.full((len(grid),), float("nan"))
        for row, at in enumerate(where.tolist()):
            if at == at:
                axes.plot([at + 0.5, at + 0.5], [row - 0.5, row + 0.5], color="red", linewidth=1.5)
        figure.colorbar(image, ax=axes, label=metric.replace("_", " "))
        return figure


def _first_settled(over: Tensor, *, closed: bool) -> Tensor:
    """First place after (or, closed, from) which nothing along the first axis is over; NaN for none."""
    n = len(over)
    place = torch.arange(n, dtype=torch.float64).reshape(-1, *[1] * (over.ndim - 1))
    last_over = torch.where(over, place, -1.0).amax(0)
    never = last_over == n - 1
    first = last_over + 1 if closed else last_over.clamp_min(0)
    return torch.where(never, float("nan"), first)


class AttentionSettlingProbe(LoopProbe[AttentionSettling]):
    """Measures `AttentionSettling` in a run of `loop_lens.measuring.measure`; options as in `attention_settling`.

    The reference must be given to ``measure``, too.

    Example:
        >>> probe = loop_lens.dynamics.AttentionSettlingProbe(model, metrics=("total_variation",))
        >>> loop_lens.measuring.measure(model, prompts, [probe])
        >>> probe.result().metrics
        ('norm', 'total_variation_step')
    """

    hooks = ("pattern",)

    def __init__(
        self,
        model: HookedLoopedTransformer,
        *,
        reference: int | None = None,
        tolerance: float = 0.01,
        metric: str = "total_variation",
        metrics: Sequence[str] = DISTANCES,
        segment: str | None = None,
    ) -> None:
        self.metrics = tuple(metrics)
        require_distances(self.metrics)
        require_distances((metric,), self.metrics)
        super().__init__(model, segment=segment, least=2, what="settling")
        self.reference, self.tolerance, self.metric = reference, tolerance, metric
        self._eps = torch.finfo(next(model.original_model.parameters()).dtype).eps
        self._heads = int(model.cfg.n_heads)
        names = ["norm", *(f"{metric}_step" for metric in self.metrics)]
        if reference:
            names += [f"{metric}_distance" for metric in self.metrics]
        axes = {"iteration": self.iterations, "layer": range(self.n_layers), "head": range(self._heads)}
        self.collectors = (Collector(names, axes),)
        self._settled = torch.zeros(len(self.iterations), self.n_layers, self._heads, dtype=torch.float64)
        self._prompts = 0

    def begin(self, batch: Batch, reference: Mapping[Site, Tensor]) -> None:
        require_two_tokens(batch.lengths, batch.index)
        super().begin(batch, reference)
        self._ends = {self.column(site): value for site, value in reference.items()}
        self._moved = torch.zeros(self.n_layers, self._heads, len(batch.tokens), device=batch.tokens.device)

    def take(self, site: Site, value: Tensor) -> None:
        """Compare with the iteration before, and with the reference."""
        cell = _, layer = self.cell(site)
        self._add("norm", cell, lengths(value), whole=True)
        if layer in self.before:
            self._compare("step", cell, value, self.before[layer])
        self.before[layer] = value
        if layer in self._ends:
            self._compare("distance", cell, value, self._ends[layer])

    def _compare(self, of: str, cell: tuple[int, int], value: Tensor, other: Tensor) -> None:
        for metric in self.metrics:
            rows = PER_QUERY[metric](value, other)
            each = self._add(f"{metric}_{of}", cell, rows, whole=metric == "frobenius")
            if of == "step" and metric == self.metric:
                self._moved[cell[1]][self.tolerance < each.T] = cell[0]

    def _add(self, name: str, cell: tuple[int, int], rows: Tensor, *, whole: bool) -> Tensor:
        """Collect values of each query [prompt head query]; returns each prompt's own [prompt head]."""
        real = rows.masked_fill(~self.mask[:, None], 0.0)
        if whole:
            each = lengths(real)
            self.put(cell, {name: each.T})
        else:
            each = real.sum(-1) / self.mask.sum(-1, keepdim=True)
            self.put(cell, {name: real.transpose(0, 1)}, self.mask)
        return each

    def end(self) -> None:
        self._ends = {}
        super().end()
        last = len(self.iterations) - 1
        moved = self._moved.cpu()
        settled = moved.masked_fill(moved == last, torch.inf)  # after the last iteration nobody can tell
        for i in range(last + 1):
            self._settled[i] += (settled <= i).sum(-1)
        self._prompts += moved.shape[-1]

    def result(self) -> AttentionSettling:
        about = (self.segment, self.reference, self.tolerance, self.metric, self._eps)
        return AttentionSettling(*about, self.collectors[0].moments(), self._prompts, self._settled.clone())


def attention_settling(
    model: HookedLoopedTransformer,
    prompts: Any,
    *,
    reference: int | None = None,
    tolerance: float = 0.01,
    metric: str = "total_variation",
    metrics: Sequence[str] = DISTANCES,
    segment: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> AttentionSettling:
    """Measure how each head's pattern moves from iteration to iteration.

    Per head, layer and iteration: the pattern's Frobenius ``norm``; ``frobenius_step``,
    ``total_variation_step`` and ``jensen_shannon_step`` to the iteration before, and ``..._distance`` to the
    reference. Total variation and Jensen-Shannon distance are of each query's attention, Frobenius norms of
    the whole pattern. Two patterns a layer are kept, whatever the number of iterations.

    Args:
        reference: Number of iterations whose last patterns are the reference, at or beyond what is measured.
        tolerance: The step at which a head has settled on a prompt. The default is a hundredth of a
            query's attention moving per iteration; other tolerances for the means can be tried afterwards, see
            `AttentionSettling.settled`.
        metric: The distance that the tolerance is of.
        metrics: Which distances to measure; Jensen-Shannon costs the most.

    Raises:
        ValueError: If a prompt has one token, there are fewer than two iterations, the reference is less than
            what is measured, or the model has no attention patterns.

    Example:
        >>> settling = loop_lens.dynamics.attention_settling(model, prompts, tolerance=0.02)
        >>> heads = settling.heads()
        >>> heads[heads["layer"] == 0]["settled"].tolist()  # iterations, None for never
        [5, 4, 3, 5]

    Source:
        The steps and distances in Frobenius norm are M3 and M6 of arXiv 2604.11791, here by head.
    """
    probe = AttentionSettlingProbe(
        model, reference=reference, tolerance=tolerance, metric=metric, metrics=metrics, segment=segment
    )
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "what": "attention"}
    return measured(model, prompts, probe, reference=reference, **options)
