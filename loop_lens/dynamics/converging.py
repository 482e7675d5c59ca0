"""How far each layer's stream and attention move per iteration, and from where they end up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.dynamics.states import LoopMeasured, LoopProbe, layer_of
from loop_lens.figures.lines import line_figure
from loop_lens.measuring.moments import Collector, Moments
from loop_lens.measuring.processes import shared
from loop_lens.measuring.run import measure
from loop_lens.prompts.reader import Batch
from loop_lens.unrolling.sites import Site

STREAM = ("norm", "floor")
STEP = ("step", "relative_step", "step_cosine")
REFERRED = ("distance", "relative_distance", "cosine")
DEGENERATE = ("degeneracy_cosine", "degeneracy_distance")
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Convergence(LoopMeasured):
    """How each layer settles, per iteration.

    Attributes:
        segment: The loop.
        reference: The number of iterations whose last states the distances are to, None without.
        moments: Of each metric, over tokens (or prompts, or heads) [iteration layer].

    Example:
        >>> from loop_lens.dynamics import convergence
        >>> found = convergence(model, prompts, reference=32, progress=False)
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
        values, spread = self.mean(metric), self.std(metric, over="prompts")
        log, high = "cosine" not in metric, values + spread
        # On a logarithmic axis the band is as wide below as above, so that it never falls to zero.
        low = values**2 / high if log else values - spread
        names = [f"layer {layer}" for layer in self.layers]
        lines = dict(zip(names, values.T, strict=True))
        if metric in ("step", "distance"):
            lines["rounding"] = self.mean("floor")[:, 0]
        return line_figure(
            lines,
            ylabel=metric,
            bands=dict(zip(names, zip(low.T, high.T, strict=True), strict=True)),
            styles={"rounding": {"color": "gray", "linestyle": ":"}},
            log=log,
        )


class ConvergenceProbe(LoopProbe):
    """Measures `Convergence` in a run of `loop_lens.measuring.measure`.

    Args:
        model: The model, at the number of iterations to measure.
        reference: As in `convergence`; the same must be given to ``measure``, unless states are kept.
        patterns: Whether to measure attention, too.
        segment: The loop; the innermost by default.
        keep: Whether to keep all states of a batch, see `convergence`.

    Raises:
        ValueError: If the loop runs once only, or states are kept for a reference beyond what runs.

    Example:
        >>> from loop_lens.dynamics import ConvergenceProbe
        >>> from loop_lens.measuring import measure
        >>> probe = ConvergenceProbe(model, patterns=False)
        >>> measure(model, prompts, [probe], progress=False)
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
        self._slices: dict[str, slice] = {}
        names: list[str] = []
        groups: list[tuple[str, tuple[str, ...]]] = [
            ("stream", STREAM),
            ("step", STEP),
            ("matrix_step", ("matrix_step",)),
        ]
        if reference:
            groups += [
                ("distance", REFERRED),
                ("matrix_distance", ("matrix_distance",)),
                ("degeneracy", DEGENERATE),
            ]
        if patterns:
            groups.append(("pattern_step", ("pattern_step",)))
            if reference:
                groups.append(("pattern_distance", ("pattern_distance",)))
        for group, metrics in groups:
            self._slices[group] = slice(len(names), len(names) + len(metrics))
            names += metrics
        axes = {"iteration": self.iterations, "layer": range(self.n_layers)}
        self._collector = Collector(names, axes)
        self._before: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._reference: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._kept: list[tuple[str, tuple[int, int], Tensor, Tensor]] = []

    def begin(self, batch: Batch, reference: Mapping[Site, Tensor]) -> None:
        """Start a batch."""
        self._mask = batch.mask
        self._collector.begin(len(batch.tokens), batch.tokens.device)
        self._before = {}
        self._reference = {}
        for site, value in reference.items():
            wide = value.float()
            self._reference[site.short, layer_of(site)] = (wide, wide.norm(dim=-1))

    def see(self, site: Site, value: Tensor) -> None:
        """Compare with the iteration before, and with the reference."""
        hook, cell = site.short, (self._row[site.iteration], layer_of(site))
        x = value.float()
        norm = x if hook == "pattern" else x.norm(dim=-1)
        if hook == "resid_post":
            self._put("stream", cell, torch.stack([norm, norm * torch.finfo(value.dtype).eps]))
        before = self._before.get((hook, cell[1]))
        if before is not None:
            self._compare(f"{'pattern_' if hook == 'pattern' else ''}step", cell, x, norm, before)
        self._before[hook, cell[1]] = (x, norm)
        if self._keep:
            self._kept.append((hook, cell, x, norm))
        else:
            self._refer(hook, cell, x, norm)

    def _refer(self, hook: str, cell: tuple[int, int], x: Tensor, norm: Tensor) -> None:
        reference = self._reference.get((hook, cell[1]))
        if reference is None:
            return
        self._compare(f"{'pattern_' if hook == 'pattern' else ''}distance", cell, x, norm, reference)
        if hook == "resid_post" and cell[1] == 0:
            self._put("degeneracy", cell, self._degeneracy(x, norm))

    def _compare(
        self, group: str, cell: tuple[int, int], x: Tensor, norm: Tensor, other: tuple[Tensor, Tensor]
    ) -> None:
        far = (x - other[0]).norm(dim=-1)
        if group.startswith("pattern"):
            rows = far * self._mask[:, None]
            self._collector.put(self._slices[group], cell, rows.norm(dim=-1).unsqueeze(0))
            return
        cosine = torch.linalg.vecdot(x, other[0]) / (norm * other[1]).clamp_min(_TINY)
        self._put(group, cell, torch.stack([far, far / norm.clamp_min(_TINY), cosine]))
        whole = (far * self._mask).norm(dim=-1)
        self._collector.put(self._slices[f"matrix_{group}"], cell, whole[None, :, None])

    def _degeneracy(self, x: Tensor, norm: Tensor) -> Tensor:
        cosines: list[Tensor] = []
        gaps: list[Tensor] = []
        for (hook, _), (last, last_norm) in self._reference.items():
            if hook == "resid_post":
                cosines.append(torch.linalg.vecdot(x, last) / (norm * last_norm).clamp_min(_TINY))
                gaps.append((x - last).norm(dim=-1))
        return torch.stack([torch.stack(cosines).amin(0), torch.stack(gaps).amax(0)])

    def _put(self, group: str, cell: tuple[int, int], values: Tensor) -> None:
        self._collector.put(self._slices[group], cell, values, self._mask)

    def end(self) -> None:
        """Add the batch up."""
        if self._keep:
            self._reference = dict(self._before)
            for kept in self._kept:
                self._refer(*kept)
        self._before, self._reference, self._kept = {}, {}, []
        self._collector.end()

    def result(self) -> Convergence:
        """What was measured so far, by this process."""
        return Convergence(self.segment, self.reference, self._collector.moments())


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
    """Measure, while the model runs, how each layer settles over iterations.

    Per token: ``norm`` of a block's output, ``step`` to the iteration before (raw norm, relative to the
    later state, cosine), ``distance`` and ``cosine`` to the reference, ``floor``, the rounding of the
    stream's dtype at that norm. Per prompt: ``matrix_step`` and ``matrix_distance``, norms over the whole
    [pos d_model] matrix. Per head: ``pattern_step`` and ``pattern_distance``, Frobenius norms. At layer 0:
    ``degeneracy_cosine`` and ``degeneracy_distance``, to the farthest layer's end. Only one
    iteration back and the reference are kept, so memory does not grow with the number of iterations.

    Args:
        model: The model, at the number of iterations to measure.
        prompts: Texts, tokens or a dataset, of any lengths, see `loop_lens.prompts.read_prompts`.
        reference: Number of iterations whose last states are the reference, e.g. 128: at or beyond
            what is measured, so that the measured range does not end at 0 by construction. Without one,
            steps alone.
        patterns: Whether to measure attention, too.
        segment: The loop; the innermost by default.
        keep: Whether to keep all states and patterns of a batch, when the reference is the last iteration
            measured: half the time, but memory that grows with the number of iterations.
        batch_size: Prompts a forward.
        progress: Whether to show a progress bar, for work beyond two seconds.

    Raises:
        ValueError: If there are no prompts, fewer than two iterations, or the reference is less than what is
            measured.
        DivergedError: If states become NaN or infinite; names the iteration.

    Source:
        arXiv 2604.11791, M1 to M6 and M9; the relative step and the floor are additions.

    Example:
        >>> from loop_lens.dynamics import convergence
        >>> found = convergence(model, prompts, reference=32, progress=False)
        >>> [round(step, 2) for step in found.mean("relative_step")[:, 1].tolist()]  # of layer 1
        [nan, 0.66, 0.44, 0.31, 0.2, 0.12, 0.1, 0.07]
    """
    probe = ConvergenceProbe(model, reference=reference, patterns=patterns, segment=segment, keep=keep)
    measure(
        model,
        prompts,
        [probe],
        reference=None if keep else reference,
        batch_size=batch_size,
        progress=progress,
        what="convergence",
    )
    return shared(probe.result())
