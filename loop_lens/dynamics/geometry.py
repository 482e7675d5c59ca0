"""How trajectories run: how fast they contract, how they turn, and how far they get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.dynamics.states import LoopMeasured, StateProbe, tidy
from loop_lens.measuring.collecting import measured
from loop_lens.measuring.moments import Collector, Moments
from loop_lens.measuring.vectors import cosines, distances, lengths, ratios
from loop_lens.unrolling.sites import Site

METRICS = ("step", "drift_to_loop", "acceleration", "resolved", "contraction", "step_angle")
_ROUNDING = 10
"""Steps of a settled loop-lens/hops are 2.6 times the dtype's spacing at the state's norm, at random angles."""


@dataclass(frozen=True)
class StepGeometry(LoopMeasured):
    """How the trajectories of tokens run, per iteration and layer.

    Attributes:
        moments: Of each metric, over tokens [iteration layer]; the last layer is the state that leaves
            the iteration.

    Example:
        >>> found = loop_lens.dynamics.step_geometry(model, prompts, progress=False)
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
        level = (1, None) if metric == "contraction" else None
        return self._by_layer(metric, level=level, log=metric in ("step", "acceleration"))


class _Trail(NamedTuple):
    """What of a trajectory the next step is compared with: the first state, the last, its step, the path's length."""

    first: Tensor
    x: Tensor
    step: Tensor | None
    path: Tensor | float


class StepGeometryProbe(StateProbe[StepGeometry]):
    """Measures `StepGeometry` in a run of `loop_lens.measuring.measure`; options as in `step_geometry`.

    Example:
        >>> probe = loop_lens.dynamics.StepGeometryProbe(model)
        >>> loop_lens.measuring.measure(model, prompts, [probe], progress=False)
        >>> probe.result().metrics
        ('step', 'drift_to_loop', 'acceleration', 'resolved', 'contraction', 'step_angle')
    """

    def __init__(self, model: HookedLoopedTransformer, *, segment: str | None = None) -> None:
        super().__init__(model, segment=segment, least=3, what="step geometry")
        self.collectors = (Collector(METRICS, {"iteration": self.iterations, "layer": self.columns}),)

    def take(self, site: Site, value: Tensor) -> None:
        """Compare with the step before."""
        cell = self.cell(site)
        trail: _Trail | None = self.before.get(cell[1])
        if trail is None:
            self.before[cell[1]] = _Trail(value, value, None, 0.0)
            return
        step = value.double() - trail.x.double()
        length = lengths(step)
        path = trail.path + length
        drift = ratios(distances(value, trail.first), path)
        self.put(cell, {"step": length, "drift_to_loop": drift}, self.mask)
        if trail.step is not None:
            before = lengths(trail.step)
            # A step as small as what rounding changes says nothing about its direction or rate.
            floor = _ROUNDING * lengths(value) * torch.finfo(value.dtype).eps
            resolved = (length > floor) & (before > floor)
            turn = distances(step, trail.step)
            self.put(cell, {"acceleration": turn, "resolved": resolved.double()}, self.mask)
            angle = cosines(step, trail.step).clamp(-1, 1).arccos()
            rates = {"contraction": ratios(length, before), "step_angle": angle}
            self.put(cell, rates, self.mask & resolved)
        self.before[cell[1]] = _Trail(trail.first, value, step, path)

    def result(self) -> StepGeometry:
        return StepGeometry(self.segment, self.collectors[0].moments())


def step_geometry(
    model: HookedLoopedTransformer,
    prompts: Any,
    *,
    segment: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> StepGeometry:
    """Measure how each token's trajectory runs at each layer, and between iterations.

    With x_t a layer's output (or the state that leaves iteration t) and D_t = x_t - x_{t-1}:
    ``step`` ||D_t||; ``contraction`` ||D_t|| / ||D_{t-1}||, near a fixed point the modulus of the
    slowest eigenvalue that is excited; ``step_angle`` between D_t and D_{t-1}, in radians (0 straight on, pi
    back); ``acceleration`` ||D_t - D_{t-1}||; ``drift_to_loop`` ||x_t - x_0|| / sum of ||D_s|| for s up to t,
    the net displacement per length of path (1 on a straight line, towards 0 on an orbit). Contraction and
    angle leave out tokens whose steps are within ten times the dtype's rounding; ``resolved`` is the share of
    those that count. Only the first state and the last step are kept, so memory does not grow with R.

    Raises:
        ValueError: If there are fewer than three iterations (two steps).

    Source:
        Step norm, angle, acceleration and the comparison of drift with loop steps: arXiv 2509.23314. There
        drift is between several looped blocks and loop steps are within one; a single core has no next block,
        so drift is the displacement since its first iteration, and the ratio is per path length.

    Example:
        >>> found = loop_lens.dynamics.step_geometry(model, prompts, progress=False)
        >>> [round(rate, 2) for rate in found.mean("contraction")[:, -1].tolist()]  # of the state
        [nan, nan, 0.65, 0.66, 0.61, 0.55, 0.64, 0.55]
    """
    probe = StepGeometryProbe(model, segment=segment)
    return measured(model, prompts, probe, batch_size=batch_size, progress=progress, what="step geometry")
