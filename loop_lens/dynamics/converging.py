"""How far each layer's stream and attention move per iteration, and from where they end up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.dynamics.states import LoopMeasured, LoopProbe
from loop_lens.measuring.collecting import measured
from loop_lens.measuring.moments import Collector, Moments
from loop_lens.measuring.vectors import cosines, distances, lengths, ratios
from loop_lens.prompts.reader import Batch
from loop_lens.unrolling.sites import Site

STEP = ("step", "relative_step", "step_cosine")
REFERRED = ("distance", "relative_distance", "cosine")


@dataclass(frozen=True)
class Convergence(LoopMeasured):
    """How each layer settles, per iteration.

    Attributes:
        reference: The number of iterations whose last states the distances are to, None without.
        moments: Of each metric, over tokens (or prompts, or heads) [iteration layer].

    Example:
        >>> found = loop_lens.dynamics.convergence(model, prompts, reference=32, progress=False)
        >>> found.mean("cosine")[-1].tolist()  # to the states after 32 iterations, by layer
        [0.999..., 0.999...]
        >>> found.to_dataframe().shape[0], found.layers  # a row per iteration and layer
        (16, (0, 1))
        >>> figure = found.plot("relative_step")
    """

    segment: str
    reference: int | None
    moments: Moments

    def plot(self, metric: str = "relative_step") -> Any:
        """One line per layer against the iteration, one prompt spread around it; a figure, not shown."""
        more = {"rounding": self.mean("floor")[:, 0]} if metric in ("step", "distance") else None
        return self._by_layer(metric, more, log="cosine" not in metric)


class ConvergenceProbe(LoopProbe[Convergence]):
    """Measures `Convergence` in a run of `loop_lens.measuring.measure`; options as in `convergence`.

    The reference must be given to ``measure``, too, unless states are kept.

    Example:
        >>> probe = loop_lens.dynamics.ConvergenceProbe(model, patterns=False)
        >>> loop_lens.measuring.measure(model, prompts, [probe], progress=False)
        >>> probe.result().metrics
        ('norm', 'floor', 'step', 'relative_step', 'step_cosine', 'matrix_step')
    """

    def __init__(
        self,
        model: HookedLoopedTransformer,
        *,
        reference: int | None = None,
        patterns: bool = True,
        segment: str | None = None,
        keep: bool = False,
    ) -> None:
        if keep and reference != model.recurrences:
            raise ValueError(
                f"keep=True measures distances to the last iteration that runs: give reference="
                f"{model.recurrences}, not {reference}"
            )
        super().__init__(model, segment=segment, least=2, what="convergence")
        self.reference, self._keep = reference, keep
        self.hooks = ("resid_post", "pattern") if patterns else ("resid_post",)
        names = ["norm", "floor", *STEP, "matrix_step"]
        if reference:
            names += [*REFERRED, "matrix_distance", "degeneracy_cosine", "degeneracy_distance"]
        if patterns:
            names += ["pattern_step", "pattern_distance"] if reference else ["pattern_step"]
        axes = {"iteration": self.iterations, "layer": range(self.n_layers)}
        self.collectors = (Collector(names, axes),)

    def begin(self, batch: Batch, reference: Mapping[Site, Tensor]) -> None:
        super().begin(batch, reference)
        self._ends = {(site.short, site.layer): value for site, value in reference.items()}
        self._kept: list[tuple[Site, Tensor]] = []

    def take(self, site: Site, value: Tensor) -> None:
        """Compare with the iteration before, and with the reference."""
        place = site.short, site.layer
        if site.short == "resid_post":
            norm = lengths(value)
            floor = norm * torch.finfo(value.dtype).eps
            self.put(self.cell(site), {"norm": norm, "floor": floor}, self.mask)
        if place in self.before:
            self._compare(site, value, self.before[place], STEP)
        self.before[place] = value
        if self._keep:
            self._kept.append((site, value))
        else:
            self._refer(site, value)

    def _refer(self, site: Site, value: Tensor) -> None:
        if (end := self._ends.get((site.short, site.layer))) is None:
            return
        self._compare(site, value, end, REFERRED)
        if site.short == "resid_post" and site.layer == 0:
            ends = [end for (hook, _), end in self._ends.items() if hook == "resid_post"]
            cosine = torch.stack([cosines(value, end) for end in ends]).amin(0)
            distance = torch.stack([distances(value, end) for end in ends]).amax(0)
            farthest = {"degeneracy_cosine": cosine, "degeneracy_distance": distance}
            self.put(self.cell(site), farthest, self.mask)

    def _compare(self, site: Site, value: Tensor, other: Tensor, metrics: tuple[str, str, str]) -> None:
        cell, far = self.cell(site), distances(value, other)
        if site.short == "pattern":
            whole = lengths(far.masked_fill(~self.mask[:, None], 0.0))
            self.put(cell, {f"pattern_{metrics[0]}": whole})
            return
        numbers = far, ratios(far, lengths(value)), cosines(value, other)
        self.put(cell, dict(zip(metrics, numbers, strict=True)), self.mask)
        self.put(cell, {f"matrix_{metrics[0]}": lengths(far.masked_fill(~self.mask, 0.0))})

    def end(self) -> None:
        if self._keep:
            self._ends = self.before
        for site, value in self._kept:
            self._refer(site, value)
        self._ends, self._kept = {}, []
        super().end()

    def result(self) -> Convergence:
        return Convergence(self.segment, self.reference, self.collectors[0].moments())


def convergence(
    model: HookedLoopedTransformer,
    prompts: Any,
    *,
    reference: int | None = None,
    patterns: bool = True,
    segment: str | None = None,
    keep: bool = False,
    batch_size: int = 8,
    progress: bool = True,
) -> Convergence:
    """Measure how each layer settles over iterations.

    Per token: ``norm`` of a block's output, ``step`` to the iteration before (raw norm, relative to the
    later state, cosine), ``distance`` and ``cosine`` to the reference, ``floor``, the rounding of the
    stream's dtype at that norm. Per prompt: ``matrix_step`` and ``matrix_distance``, norms over the whole
    [pos d_model] matrix. Per head: ``pattern_step`` and ``pattern_distance``, Frobenius norms. At layer 0:
    ``degeneracy_cosine`` and ``degeneracy_distance``, to the farthest layer's end. Only one
    iteration back and the reference are kept, so memory does not grow with the number of iterations.

    Args:
        reference: Number of iterations whose last states are the reference, e.g. 128: at or beyond
            what is measured, so that the measured range does not end at 0 by construction. Without one,
            steps alone.
        patterns: Whether to measure attention, too.
        keep: Whether to keep all states and patterns of a batch, when the reference is the last iteration
            measured: half the time, but memory that grows with the number of iterations.

    Raises:
        ValueError: If there are fewer than two iterations, or the reference is less than what is measured.

    Source:
        arXiv 2604.11791, M1 to M6 and M9; the relative step and the floor are additions.

    Example:
        >>> found = loop_lens.dynamics.convergence(model, prompts, reference=32, progress=False)
        >>> [round(step, 2) for step in found.mean("relative_step")[:, 1].tolist()]  # of layer 1
        [nan, 0.66, 0.44, 0.31, 0.2, 0.12, 0.1, 0.07]
    """
    probe = ConvergenceProbe(model, reference=reference, patterns=patterns, segment=segment, keep=keep)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "what": "convergence"}
    return measured(model, prompts, probe, reference=None if keep else reference, **options)
