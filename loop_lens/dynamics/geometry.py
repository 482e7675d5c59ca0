"""How trajectories run: how fast they contract, how they turn, and how far they get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.dynamics.states import LoopMeasured, StateProbe, tidy
from loop_lens.figures.lines import line_figure
from loop_lens.measuring.moments import Collector, Moments
from loop_lens.measuring.processes import shared
from loop_lens.measuring.run import measure
from loop_lens.prompts.reader import Batch
from loop_lens.unrolling.sites import Site

PATH = ("step", "drift_to_loop")
TURNS = ("acceleration", "resolved")
RATES = ("contraction", "step_angle")
_TINY = torch.finfo(torch.float32).tiny


_ROUNDING = 10
"""Steps of a settled loop-lens/hops are 2.6 times the dtype's spacing at the state's norm, at random angles."""


@dataclass(frozen=True)
class StepGeometry(LoopMeasured):
    """How the trajectories of tokens run, per iteration and layer.

    Attributes:
        segment: The loop.
        moments: Of each metric, over tokens [iteration layer]; the last layer is the state that leaves
            the iteration.

    Example:
        >>> from loop_lens.dynamics import step_geometry
        >>> found = step_geometry(model, prompts, progress=False)
        >>> found.layers
        (0, 1, 'state')
        >>> figure = found.plot("step_angle")
    """

    segment: str
    moments: Moments

    def to_dataframe(self) -> pd.DataFrame:
        """One row per iteration and layer (missing at the state), with means and spreads."""
        return tidy(self.moments.to_dataframe())

    def plot(self, metric: str = "contraction") -> Any:
        """One line per layer, and the state's, against the iteration; a figure, not shown."""
        values = self.mean(metric)
        names = [layer if isinstance(layer, str) else f"layer {layer}" for layer in self.layers]
        return line_figure(
            dict(zip(names, values.T, strict=True)),
            ylabel=metric,
            styles={"state": {"color": "black", "linestyle": "--"}},
            level=(1, None) if metric == "contraction" else None,
            log=metric in ("step", "acceleration"),
        )


class StepGeometryProbe(StateProbe):
    """Measures `StepGeometry` in a run of `loop_lens.measuring.measure`.

    Args:
        model: The model, at the number of iterations to measure.
        segment: The loop; the innermost by default.

    Raises:
        ValueError: If the loop runs fewer than three iterations.

    Example:
        >>> from loop_lens.dynamics import StepGeometryProbe
        >>> from loop_lens.measuring import measure
        >>> probe = StepGeometryProbe(model)
        >>> measure(model, prompts, [probe], progress=False)
        >>> probe.result().metrics
        ('step', 'drift_to_loop', 'acceleration', 'resolved', 'contraction', 'step_angle')
    """

    def __init__(self, model: HookedLoopedTransformer, *, segment: str | None = None) -> None:
        super().__init__(model, segment=segment, least=3, what="step geometry")
        self._collector = Collector(
            (*PATH, *TURNS, *RATES), {"iteration": self.iterations, "layer": self.columns}
        )
        self._trails: dict[int, _Trail] = {}

    def begin(self, batch: Batch, reference: Mapping[Site, Tensor]) -> None:
        """Start a batch."""
        super().begin(batch, reference)
        self._collector.begin(len(batch.tokens), batch.tokens.device)
        self._trails = {}

    def take(self, i: int, column: int, value: Tensor) -> None:
        """Compare with the step before."""
        x = value.float()
        trail = self._trails.get(column)
        if trail is None:
            self._trails[column] = _Trail(x, x, None, None, torch.zeros_like(x[..., 0]))
            return
        cell = (i, column)
        step = x - trail.x
        length = step.norm(dim=-1)
        path = trail.path + length
        net = (x - trail.first).norm(dim=-1)
        self._collector.put(slice(0, 2), cell, torch.stack([length, net / path.clamp_min(_TINY)]), self.mask)
        if trail.step is not None and trail.length is not None:
            # A step as small as what rounding changes says nothing about its direction or rate.
            floor = _ROUNDING * x.norm(dim=-1) * torch.finfo(value.dtype).eps
            resolved = (length > floor) & (trail.length > floor)
            turn = (step - trail.step).norm(dim=-1)
            self._collector.put(slice(2, 4), cell, torch.stack([turn, resolved.float()]), self.mask)
            both = (length * trail.length).clamp_min(_TINY)
            angle = (torch.linalg.vecdot(step, trail.step) / both).clamp(-1, 1).arccos()
            rate = length / trail.length.clamp_min(_TINY)
            self._collector.put(slice(4, 6), cell, torch.stack([rate, angle]), self.mask & resolved)
        self._trails[column] = _Trail(trail.first, x, step, length, path)

    def end(self) -> None:
        """Add the batch up."""
        self._trails = {}
        self._collector.end()

    def result(self) -> StepGeometry:
        """What was measured so far, by this process."""
        return StepGeometry(self.segment, self._collector.moments())


@dataclass(frozen=True)
class _Trail:
    """What of a trajectory the next step is compared with."""

    first: Tensor
    x: Tensor
    step: Tensor | None
    length: Tensor | None
    path: Tensor


def step_geometry(
    model: HookedLoopedTransformer,
    prompts: Any,
    *,
    segment: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> StepGeometry:
    """Measure, while the model runs, how each token's trajectory runs at each layer, and between iterations.

    With x_t a layer's output (or the state that leaves iteration t) and D_t = x_t - x_{t-1}:
    ``step`` ||D_t||; ``contraction`` ||D_t|| / ||D_{t-1}||, near a fixed point the modulus of the
    slowest eigenvalue that is excited; ``step_angle`` between D_t and D_{t-1}, in radians (0 straight on, pi
    back); ``acceleration`` ||D_t - D_{t-1}||; ``drift_to_loop`` ||x_t - x_0|| / sum of ||D_s|| for s up to t,
    the net displacement per length of path (1 on a straight line, towards 0 on an orbit). Contraction and
    angle leave out tokens whose steps are within ten times the dtype's rounding; ``resolved`` is the share of
    those that count. Only the first state and the last step are kept, so memory does not grow with R.

    Args:
        model: The model, at the number of iterations to measure.
        prompts: Texts, tokens or a dataset, of any lengths, see `loop_lens.prompts.read_prompts`.
        segment: The loop; the innermost by default.
        batch_size: Prompts a forward.
        progress: Whether to show a progress bar, for work beyond two seconds.

    Raises:
        ValueError: If there are no prompts, or fewer than three iterations (two steps).
        DivergedError: If states become NaN or infinite; names the iteration.

    Source:
        Step norm, angle, acceleration and the comparison of drift with loop steps: arXiv 2509.23314. There
        drift is between several looped blocks and loop steps are within one; a single core has no next block,
        so drift is the displacement since its first iteration, and the ratio is per path length.

    Example:
        >>> from loop_lens.dynamics import step_geometry
        >>> found = step_geometry(model, prompts, progress=False)
        >>> [round(rate, 2) for rate in found.mean("contraction")[:, -1].tolist()]  # of the state
        [nan, nan, 0.65, 0.66, 0.61, 0.55, 0.64, 0.55]
    """
    probe = StepGeometryProbe(model, segment=segment)
    measure(model, prompts, [probe], batch_size=batch_size, progress=progress, what="step geometry")
    return shared(probe.result())
