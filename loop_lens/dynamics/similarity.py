"""Every firing against every other: attention distances and residual cosines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from loop_lens.dynamics.distances import DISTANCES, jensen_shannon, require_distances, require_two_tokens
from loop_lens.figures.canvas import new_figure, spaced
from loop_lens.measuring.collecting import CollectingProbe, measured
from loop_lens.measuring.moments import Collector, Moments, Over
from loop_lens.measuring.results import Result
from loop_lens.measuring.run import schedule_of
from loop_lens.measuring.vectors import directions, wide
from loop_lens.prompts.reader import Batch
from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.sites import Boundary, Firing, Site, pick
from loop_lens.unrolling.tree import Iteration

PAIRS = (*DISTANCES, "cosine")
_BLOCK = 1 << 22  # elements of patterns that are compared at once
Select = int | slice | Iterable[Any] | None


@dataclass(frozen=True)
class FiringSimilarity(Result):
    """Distances between every pair of the chosen firings.

    Attributes:
        depths: Index of each firing in the model's order: its realised depth. ``segments``, ``iterations`` (None
            outside loops) and ``layers`` are its place.
        attention: Moments of the pattern distances, over prompts and heads [depth other], or by head
            [head depth other]; None if none was measured.
        residual: Moments of the residual cosine, over tokens [depth other]; None if it was not measured.

    Example:
        >>> similarity = loop_lens.dynamics.firing_similarity(model, prompts)
        >>> similarity.metrics
        ('frobenius', 'total_variation', 'jensen_shannon', 'cosine')
        >>> similarity.mean("cosine").shape  # depth other
        torch.Size([18, 18])
        >>> similarity.segments[:3], similarity.iterations[:3]
        (('prelude', 'loop', 'loop'), (None, 0, 0))
    """

    depths: tuple[int, ...]
    segments: tuple[str, ...]
    iterations: tuple[Iteration, ...]
    layers: tuple[int, ...]
    attention: Moments | None
    residual: Moments | None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return tuple(name for part in self._parts() for name in part.metrics)

    def _parts(self) -> list[Moments]:
        return [part for part in (self.attention, self.residual) if part is not None]

    def _part(self, metric: str) -> Moments:
        for part in self._parts():
            if metric in part.metrics:
                return part
        raise ValueError(f"metric {metric!r} is unknown: there are {', '.join(self.metrics)}")

    def mean(self, metric: str, *, over: Over = "values") -> Tensor:
        """Mean [depth other], of attention by head [head depth other]."""
        return self._part(metric).mean(metric, over=over)

    def std(self, metric: str, *, over: Over = "values") -> Tensor:
        """Standard deviation [depth other], of attention by head [head depth other]."""
        return self._part(metric).std(metric, over=over)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair, both ways (and head): places, and each metric's mean and spreads."""
        tables = [part.to_dataframe() for part in self._parts()]
        table = tables[0]
        for more in tables[1:]:
            table = table.merge(more, on=["depth", "other"])
        iterations = pd.Series(list(self.iterations), dtype=object)  # None and numbers: not floats
        places = pd.DataFrame({"segment": self.segments, "iteration": iterations, "layer": self.layers})
        places.index = pd.Index(self.depths)
        for side, prefix in (("other", "other_"), ("depth", "")):
            for k, column in enumerate(places):
                values = places[column].reindex(table[side]).to_numpy()
                table.insert(table.columns.get_loc("other") + 1 + k, prefix + column, values)  # type: ignore[operator]
        return table

    def plot(self, metric: str = "frobenius", *, head: int | None = None) -> Any:
        """Heat map of a metric, of one head or their mean, with a line wherever an iteration or a segment begins; a
        figure, not shown.
        """
        values = self.mean(metric)
        if values.ndim == 3:
            if head is not None and not 0 <= head < len(values):
                raise ValueError(f"head {head} does not exist: there are heads 0-{len(values) - 1}")
            values = values.mean(0) if head is None else values[head]
        elif head is not None:
            raise ValueError("heads were not measured one by one: call firing_similarity(..., per_head=True)")
        figure, axes = new_figure(5.2, 4.4)
        limits = {"vmax": 1.0} if metric == "cosine" else {"vmin": 0.0}
        image = axes.imshow(values.numpy(), cmap="viridis", interpolation="nearest", **limits)
        starts = self.boundaries
        for at in starts[1:]:
            axes.axhline(at - 0.5, color="white", linewidth=0.6)
            axes.axvline(at - 0.5, color="white", linewidth=0.6)
        shown = [starts[i] for i in spaced(len(starts), 12)]
        labels = [
            self.segments[i] if self.iterations[i] is None else f"{self.segments[i]} {self.iterations[i]}"
            for i in shown
        ]
        axes.set_xticks(shown, labels, fontsize=7, rotation=60, ha="right")
        axes.set_yticks(shown, labels, fontsize=7)
        axes.set(xlabel="realised depth", ylabel="realised depth")
        figure.colorbar(image, ax=axes, label=metric)
        return figure

    @property
    def boundaries(self) -> list[int]:
        """Places among the chosen firings where an iteration or a segment begins, the first included."""
        keys = list(zip(self.segments, self.iterations, strict=True))
        return [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]


class FiringSimilarityProbe(CollectingProbe[FiringSimilarity]):
    """Measures `FiringSimilarity` in a run of `loop_lens.measuring.measure`; options as in `firing_similarity`.

    Example:
        >>> probe = loop_lens.dynamics.FiringSimilarityProbe(model, layer=1, metrics=("cosine",))
        >>> loop_lens.measuring.measure(model, prompts, [probe])
        >>> probe.result().depths  # layer 1 of the loop, iteration after iteration
        (2, 4, 6, 8, 10, 12, 14, 16)
    """

    def __init__(
        self,
        model: TransformerBridge,
        *,
        segment: str | None = None,
        iteration: Select = None,
        layer: Select = None,
        metrics: Sequence[str] = PAIRS,
        per_head: bool = False,
    ) -> None:
        require_distances(tuple(metrics), PAIRS)
        self.firings = _chosen(schedule_of(model), segment, iteration, layer)
        if len(self.firings) < 2:
            raise ValueError("pairs need at least two firings: choose more, or set_recurrences(2) or more")
        self._per_head = per_head
        self._places: dict[Firing | Boundary, int] = {firing: i for i, firing in enumerate(self.firings)}
        depths = tuple(firing.index for firing in self.firings)
        pairs: dict[str, Sequence[int]] = {"depth": depths, "other": depths}
        heads = {"head": range(int(model.cfg.n_heads))} if per_head else {}
        self._collectors: dict[str, Collector] = {}
        if distances := [metric for metric in metrics if metric != "cosine"]:
            self._collectors["pattern"] = Collector(distances, {**heads, **pairs})
        if "cosine" in metrics:
            self._collectors["resid_post"] = Collector(("cosine",), pairs)
        self.hooks = tuple(self._collectors)

    def wants(self, site: Site) -> bool:
        """The chosen firings."""
        return site.place in self._places

    def begin(self, batch: Batch, reference: Mapping[Site, Tensor]) -> None:
        if "pattern" in self.hooks:
            require_two_tokens(batch.lengths, batch.index)
        super().begin(batch, reference)
        self._kept: dict[tuple[str, int], Tensor] = {}

    def take(self, site: Site, value: Tensor) -> None:
        """Keep it until the batch is over."""
        self._kept[site.short, self._places[site.place]] = value

    def end(self) -> None:
        """Compare all pairs, prompt by prompt, without its padding."""
        super().end()
        for prompt, n in enumerate(self.mask.sum(-1).tolist()):
            for hook, collector in self._collectors.items():
                kept = self._stacked(hook, prompt, n)
                collector.begin(1, kept.device)
                self.put((), self._compared(hook, kept), to=collector)
                collector.end()
        self._kept = {}

    def _compared(self, hook: str, kept: Tensor) -> dict[str, Tensor]:
        """All pairs of one prompt, [depth other prompt value] or by head [head depth other prompt]."""
        if hook == "resid_post":
            unit = directions(kept).transpose(0, 1)
            return {"cosine": (unit @ unit.mT).movedim(0, -1).unsqueeze(-2)}
        maps = {metric: _pairwise(kept, metric) for metric in self._collectors[hook].metrics}
        # Heads are cells of their own, or values of one.
        return {
            metric: each.unsqueeze(-1) if self._per_head else each.movedim(0, -1).unsqueeze(-2)
            for metric, each in maps.items()
        }

    def _stacked(self, hook: str, prompt: int, n: int) -> Tensor:
        """One prompt's patterns [depth head query key] or stream [depth pos d_model], without padding."""
        every = (wide(self._kept[hook, i][prompt]) for i in range(len(self.firings)))
        return torch.stack([v[:, :n, :n] if hook == "pattern" else v[:n] for v in every])

    def result(self) -> FiringSimilarity:
        moments = {hook: collector.moments() for hook, collector in self._collectors.items()}
        each = [(f.index, f.segment, f.iteration, f.layer) for f in self.firings]
        depths, segments, iterations, layers = zip(*each, strict=True)
        parts = moments.get("pattern"), moments.get("resid_post")
        return FiringSimilarity(depths, segments, iterations, layers, *parts)


def _chosen(schedule: Schedule, segment: str | None, iteration: Select, layer: Select) -> list[Firing]:
    """Firings in order; iterations and layers as `HookedLoopedTransformer.names` takes them."""
    if segment is None and iteration is None and layer is None:
        return list(schedule)
    if segment is None:
        segment = schedule.innermost_loop if schedule.loops else next(iter(schedule.segments))
    schedule.require_segment(segment)
    own = [firing for firing in schedule if firing.segment == segment]
    iterations = pick("iteration", iteration, list(dict.fromkeys(f.iteration for f in own)))
    layers = pick("layer", layer, sorted({f.layer for f in own}))
    return [firing for firing in own if firing.iteration in iterations and firing.layer in layers]


def _pairwise(
    patterns: Float[Tensor, "depth head query key"], metric: str
) -> Float[Tensor, "head depth depth"]:
    """One distance between all pairs of patterns, of each head; those per query as their mean."""
    if metric == "jensen_shannon":
        return _jensen_shannon_pairwise(patterns)
    flat = patterns.flatten(2).transpose(0, 1)
    if metric == "total_variation":
        return torch.cdist(flat, flat, p=1) / (2 * patterns.shape[2])
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b cancels for neighbours: in float64, around the mean of all, it is
    # exact to about 1e-8 of the patterns' own spread.
    centred = flat.double() - flat.double().mean(1, keepdim=True)
    gram = centred @ centred.mT
    square = gram.diagonal(dim1=-2, dim2=-1)
    distance = (square[:, :, None] + square[:, None, :] - 2 * gram).clamp_min(0).sqrt()
    distance.diagonal(dim1=-2, dim2=-1).zero_()
    return distance


def _jensen_shannon_pairwise(patterns: Tensor) -> Tensor:
    n_depths, n_heads = patterns.shape[:2]
    above = patterns.new_zeros(n_heads, n_depths, n_depths)
    size = max(1, _BLOCK // patterns[0].numel())
    for i in range(n_depths - 1):
        for start in range(i + 1, n_depths, size):
            others = slice(start, min(start + size, n_depths))
            above[:, i, others] = jensen_shannon(patterns[i], patterns[others]).mean(-1).T
    return above + above.mT


def firing_similarity(
    model: TransformerBridge,
    prompts: Any,
    *,
    segment: str | None = None,
    iteration: Select = None,
    layer: Select = None,
    metrics: Sequence[str] = PAIRS,
    per_head: bool = False,
    batch_size: int = 4,
    progress: bool = True,
) -> FiringSimilarity:
    """Compare the attention and the stream of every two firings.

    Unlike the other measures, this one has to keep a batch's patterns and streams of all chosen firings until
    the batch is over: firings x batch_size x (heads x pos + d_model) x pos x 4 bytes. Of the distances,
    Frobenius is one matrix product a prompt; total variation and Jensen-Shannon take every pair's every
    entry (with 512 firings, 131,000 pairs), so choose fewer firings for them.

    Args:
        model: A looped model, or a feed-forward one.
        segment: One segment; the innermost loop if only iterations or layers are chosen, every firing of the
            model if nothing is.
        iteration: One, several or a slice of its iterations.
        layer: One, several or a slice of its layers.
        metrics: ``"frobenius"``, ``"total_variation"`` and ``"jensen_shannon"`` (both per query) of attention
            patterns, head by head, and ``"cosine"`` of the stream after the block, per token.
        per_head: Whether to keep heads apart rather than average over them; 48 bytes a pair, metric and head.

    Raises:
        ValueError: If a metric is unknown, fewer than two firings are chosen, a prompt has one token (for
            attention), or the model has no attention patterns.
        UnknownNameError: If a segment, iteration or layer does not exist.

    Example:
        >>> similarity = loop_lens.dynamics.firing_similarity(
        ...     model, prompts, segment="loop", layer=1, metrics=("frobenius",)
        ... )
        >>> similarity.mean("frobenius")[0, :3].round(decimals=2).tolist()  # iteration 0 against 0, 1, 2
        [0.0, 1.06, 1.14]

    Source:
        arXiv 2604.11791, M7 and M8 (figures 2 and 19 to 21); the other two distances are additions.
    """
    probe = FiringSimilarityProbe(
        model, segment=segment, iteration=iteration, layer=layer, metrics=metrics, per_head=per_head
    )
    return measured(model, prompts, probe, batch_size=batch_size, progress=progress, what="pairs")
