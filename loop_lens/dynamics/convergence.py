"""How far each layer's stream and attention move per iteration, and from where they end up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from loop_lens.bridge import HookedLoopedTransformer
from loop_lens.figures import new_figure
from loop_lens.prompts import tokens_of
from loop_lens.schedule import Iteration

STREAM = ("norm", "floor", "step", "relative_step", "step_cosine", "matrix_step")
REFERRED = ("distance", "relative_distance", "cosine", "matrix_distance")


@dataclass(frozen=True)
class Convergence:
    """Sums of each metric over tokens (or prompts, or heads), which merge exactly.

    Attributes:
        iterations: The loop's iterations, in order.
        n_layers: Layers of the loop.
        reference: The number of iterations whose last states the distances are to, None without.
        count: By metric, how many values went in [iteration layer].
        total: By metric, their sum [iteration layer].
        squares: By metric, the sum of their squares [iteration layer].
    """

    iterations: tuple[Iteration, ...]
    n_layers: int
    reference: int | None
    count: dict[str, Tensor]
    total: dict[str, Tensor]
    squares: dict[str, Tensor]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return tuple(self.count)

    def mean(self, metric: str) -> Tensor:
        """Mean [iteration layer]; NaN where there is none (steps of the first iteration)."""
        return self.total[self._known(metric)] / self.count[metric]

    def std(self, metric: str) -> Tensor:
        """Standard deviation over what went in [iteration layer]."""
        mean = self.mean(metric)
        return (self.squares[metric] / self.count[metric] - mean**2).clamp_min(0).sqrt()

    def _known(self, metric: str) -> str:
        if metric not in self.count:
            raise ValueError(f"metric {metric!r} is unknown: there are {', '.join(self.count)}")
        return metric

    def merge(self, other: Convergence) -> Convergence:
        """The result on both results' prompts.

        Raises:
            ValueError: If they are of different loops or references.
        """
        mine = (self.iterations, self.n_layers, self.reference, self.metrics)
        if mine != (other.iterations, other.n_layers, other.reference, other.metrics):
            raise ValueError("these results are of different loops, references or metrics: they do not merge")
        sums = [
            {metric: a[metric] + b[metric] for metric in a}
            for a, b in (
                (self.count, other.count),
                (self.total, other.total),
                (self.squares, other.squares),
            )
        ]
        return Convergence(self.iterations, self.n_layers, self.reference, *sums)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per iteration and layer, with the mean and the spread of each metric."""
        rows: list[dict[str, Any]] = []
        means = {metric: self.mean(metric).tolist() for metric in self.metrics}
        spreads = {metric: self.std(metric).tolist() for metric in self.metrics}
        for i, iteration in enumerate(self.iterations):
            for layer in range(self.n_layers):
                row: dict[str, Any] = {"iteration": iteration, "layer": layer}
                for metric in self.metrics:
                    row[metric], row[f"{metric}_std"] = means[metric][i][layer], spreads[metric][i][layer]
                rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, metric: str = "relative_step") -> Any:
        """One line per layer against the iteration; a matplotlib figure, not shown."""
        values = self.mean(metric)
        figure, axes = new_figure(6, 3.2)
        for layer in range(self.n_layers):
            axes.plot(range(len(self.iterations)), values[:, layer], "-", label=f"layer {layer}")
        if metric in ("step", "distance"):
            axes.plot(
                range(len(self.iterations)), self.mean("floor")[:, 0], ":", color="gray", label="rounding"
            )
        if "cosine" not in metric:
            axes.set_yscale("log")
        axes.set(xlabel="iteration", ylabel=metric.replace("_", " "))
        axes.legend(fontsize=7, ncols=2)
        return figure


@torch.no_grad()
def convergence(
    model: HookedLoopedTransformer,
    prompts: Any,
    *,
    reference: int | None = None,
    patterns: bool = True,
    segment: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Convergence:
    """Measure, while the model runs, how each layer settles over iterations.

    Per token: ``norm`` of a block's output, ``step`` to the iteration before (raw norm, relative to the
    later state, cosine), ``distance`` and ``cosine`` to the reference, ``floor``, the rounding of the
    stream's dtype at that norm. Per prompt: ``matrix_step`` and ``matrix_distance``, norms over the whole
    [pos d_model] matrix. Per head: ``pattern_step`` and ``pattern_distance``, Frobenius norms. Only one
    iteration back and the reference are kept, so memory does not grow with the number of iterations.

    Args:
        model: The model, at the number of iterations to measure.
        prompts: Texts, tokens [prompt pos] or a list of either, of any lengths; or a dataset with a column
            ``text`` or ``input_ids``. Prompts of one length run together: nothing is padded.
        reference: Number of iterations whose last states are the reference, e.g. 128: at or beyond
            what is measured, so that the measured range does not end at 0 by construction. Without one,
            steps alone.
        patterns: Whether to measure attention, too.
        segment: The loop; the innermost by default.
        batch_size: Prompts a forward.
        progress: Whether to show a progress bar, for work beyond two seconds.

    Raises:
        ValueError: If there are no prompts, or the reference is less than what is measured.

    Source:
        arXiv 2604.11791, M1 to M6; the relative step and the floor are additions.
    """
    loop = segment or model.schedule.innermost_loop
    iterations = tuple(model.schedule.iterations(loop))
    n_layers = model.schedule.segments[loop]
    if reference is not None and reference < model.recurrences:
        raise ValueError(
            f"reference={reference} comes before the end of what is measured ({model.recurrences} iterations)"
        )
    batches = list(_batches(model, prompts, batch_size))
    if not batches:
        raise ValueError("there are no prompts")
    names = list(STREAM) + (list(REFERRED) if reference else [])
    if patterns:
        names += ["pattern_step"] + (["pattern_distance"] if reference else [])
    tables = [
        {name: torch.zeros(len(iterations), n_layers, dtype=torch.float64) for name in names}
        for _ in range(3)
    ]
    for tokens in tqdm(batches, desc="convergence", delay=2, disable=not progress, leave=False):
        ends = _ends(model, tokens, loop, reference, patterns) if reference else {}
        watch = _Watch(tables, ends)
        hooks: list[Any] = []
        for i, t in enumerate(iterations):
            for layer in range(n_layers):
                hooks.append(
                    (model.name("resid_post", iteration=t, layer=layer, segment=loop), watch.stream(i, layer))
                )
                if patterns:
                    hooks.append(
                        (
                            model.name("pattern", iteration=t, layer=layer, segment=loop),
                            watch.pattern(i, layer),
                        )
                    )
        model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None)
    return Convergence(iterations, n_layers, reference, *tables)


def _batches(model: HookedLoopedTransformer, prompts: Any, batch_size: int) -> Iterable[Tensor]:
    """Prompts as batches of one length each, in the order of first appearance."""
    columns = getattr(prompts, "column_names", None)
    if columns is not None:
        column = "input_ids" if "input_ids" in columns else "text"
        prompts = [row[column] for row in prompts]
    each = [prompts] if isinstance(prompts, str) else list(prompts)
    by_length: dict[int, list[Tensor]] = {}
    for prompt in each:
        given = prompt if isinstance(prompt, str | Tensor) else torch.as_tensor(prompt)
        tokens = tokens_of(model, given, "prompts")
        by_length.setdefault(tokens.shape[1], []).append(tokens)
    for group in by_length.values():
        rows = torch.cat(group)
        yield from rows.split(batch_size)


def _ends(
    model: HookedLoopedTransformer, tokens: Tensor, loop: str, reference: int, patterns: bool
) -> dict[tuple[str, int], Tensor]:
    """Each layer's stream and pattern in the last of so many iterations."""
    with model.at_recurrences(reference):
        last = model.schedule.iterations(loop)[-1]
        names = {
            (hook, layer): model.name(hook, iteration=last, layer=layer, segment=loop)
            for hook in (("resid_post", "pattern") if patterns else ("resid_post",))
            for layer in range(model.schedule.segments[loop])
        }
        _, cache = model.run_with_cache(tokens, names_filter=list(names.values()))
        return {key: cache[name] for key, name in names.items()}


class _Watch:
    """Adds up metrics while one batch runs."""

    def __init__(self, tables: Sequence[dict[str, Tensor]], ends: dict[tuple[str, int], Tensor]) -> None:
        self.count, self.total, self.squares = tables
        self.ends = ends
        self.before: dict[tuple[str, int], Tensor] = {}

    def _add(self, metric: str, i: int, layer: int, values: Tensor) -> None:
        wide = values.double()
        self.count[metric][i, layer] += wide.numel()
        self.total[metric][i, layer] += wide.sum().cpu()
        self.squares[metric][i, layer] += (wide**2).sum().cpu()

    def stream(self, i: int, layer: int) -> Any:
        """A hook on a block's output."""

        def hook(value: Tensor, hook: Any) -> None:
            x = value.float()
            norm = x.norm(dim=-1)
            self._add("norm", i, layer, norm)
            self._add("floor", i, layer, norm * torch.finfo(value.dtype).eps)
            before = self.before.get(("resid_post", layer))
            if before is not None:
                self._compare(("step", "relative_step", "step_cosine", "matrix_step"), i, layer, x, before)
            end = self.ends.get(("resid_post", layer))
            if end is not None:
                self._compare(REFERRED, i, layer, x, end.float())
            self.before["resid_post", layer] = x.clone()

        return hook

    def _compare(self, names: Sequence[str], i: int, layer: int, x: Tensor, other: Tensor) -> None:
        gap = x - other
        far = gap.norm(dim=-1)
        self._add(names[0], i, layer, far)
        self._add(names[1], i, layer, far / x.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny))
        self._add(names[2], i, layer, torch.cosine_similarity(x, other, dim=-1))
        self._add(names[3], i, layer, gap.flatten(1).norm(dim=-1))

    def pattern(self, i: int, layer: int) -> Any:
        """A hook on a block's attention."""

        def hook(value: Tensor, hook: Any) -> None:
            x = value.float()
            for name, other in (
                ("pattern_step", self.before.get(("pattern", layer))),
                ("pattern_distance", self.ends.get(("pattern", layer))),
            ):
                if other is not None:
                    self._add(name, i, layer, (x - other.float()).flatten(2).norm(dim=-1))
            self.before["pattern", layer] = x.clone()

        return hook
