"""Where tokens' trajectories go: to a fixed point, around an orbit, or away."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loop_lens.measuring.results import Result

Kind = Literal["fixed point", "orbit", "slider", "unknown"]
LIMIT_KINDS: tuple[Kind, ...] = ("fixed point", "orbit", "slider", "unknown")
Of = Literal["cosine", "norm"]
LEAST = 4
"""The fewest values that a series can be classified by."""


@dataclass(frozen=True)
class LimitingBehaviour:
    """The limiting behaviour of one series, with what decided it.

    Attributes:
        kind: ``"fixed point"``, ``"orbit"``, ``"slider"`` or ``"unknown"``.
        settled: Share of values within tau of the limit.
        frequency: Of the strongest oscillation, in cycles per iteration.
        amplitude: Of that oscillation.
        gradient: Slope towards the final state, per iteration.
    """

    kind: Kind
    settled: float
    frequency: float
    amplitude: float
    gradient: float


@dataclass(frozen=True)
class LimitingBehaviours(Result):
    """The limiting behaviour of many series, at each pair of thresholds.

    Attributes:
        tau: The tolerances.
        rho: The shares.
        kind: Index into `LIMIT_KINDS` [tau rho *series].
        settled: Share of values within tau of the limit [tau *series].
        frequency: Of the strongest oscillation, in cycles per iteration [*series].
        amplitude: Of that oscillation [*series].
        gradient: Slope towards the final state, per iteration [*series].
    """

    tau: tuple[float, ...]
    rho: tuple[float, ...]
    kind: Tensor
    settled: Tensor
    frequency: Tensor
    amplitude: Tensor
    gradient: Tensor

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair of thresholds and series (numbered from 0, last dimension fastest)."""
        flat = {n: getattr(self, n).flatten().tolist() for n in ("frequency", "amplitude", "gradient")}
        tables: list[pd.DataFrame] = []
        for (i, tau), (j, rho) in itertools.product(enumerate(self.tau), enumerate(self.rho)):
            kinds = [LIMIT_KINDS[k] for k in self.kind[i, j].flatten().tolist()]
            settled = self.settled[i].flatten().tolist()
            own = {"tau": tau, "rho": rho, "series": range(len(kinds)), "kind": kinds, "settled": settled}
            tables.append(pd.DataFrame(own | flat))
        return pd.concat(tables, ignore_index=True)


def limiting_behaviour(
    series: Float[Tensor, " iteration"], tau: float = 0.05, rho: float = 0.9, *, of: Of = "cosine"
) -> LimitingBehaviour:
    """Classify one token's series at one layer.

    Args:
        series: Cosine to the final state (or norm of the difference from it) per iteration, the final
            iteration left out [iteration].
        tau: How close to the final state counts as settled; half of it is the least amplitude of an orbit.
        rho: Share of iterations that must be settled for a fixed point.
        of: Whether the series holds cosines or norms.

    Raises:
        ValueError: If the series is shorter than 4 or holds NaN or infinity.

    Source:
        arXiv 2604.11791, Algorithm 1: first match of fixed point, orbit (amplitude at least tau/2, at
        least two cycles), slider (gradient above tau/n), unknown; amplitude 4/n times the largest bin of
        the Hann-windowed, detrended spectrum without its constant.
    """
    found = limiting_behaviours(torch.as_tensor(series).flatten(), tau, rho, of=of)
    kind = LIMIT_KINDS[int(found.kind[0, 0])]
    values = (found.settled[0], found.frequency, found.amplitude, found.gradient)
    return LimitingBehaviour(kind, *(float(value) for value in values))


def limiting_behaviours(
    series: Float[Tensor, "*series iteration"],
    tau: float | Sequence[float] = 0.05,
    rho: float | Sequence[float] = 0.9,
    *,
    of: Of = "cosine",
) -> LimitingBehaviours:
    """Classify many series at once, at one or several pairs of thresholds.

    Args:
        series: As for `limiting_behaviour`, e.g. [token iteration].
        tau: One tolerance, or several.
        rho: One share, or several.
        of: Whether the series hold cosines or norms.

    Raises:
        ValueError: If the series are shorter than 4 or hold NaN or infinity.

    Source:
        arXiv 2604.11791, Algorithm 1.
    """
    s = torch.as_tensor(series).double()
    n = s.shape[-1] if s.ndim else 0
    if n < LEAST:
        raise ValueError(f"the series has {n} values: give at least {LEAST}")
    if not bool(s.isfinite().all()):
        raise ValueError("the series holds NaN or infinity: the model diverged before its last iteration")
    if of not in ("cosine", "norm"):
        raise ValueError(f"of={of!r} is unknown: choose 'cosine' or 'norm'")
    taus, rhos = several(tau), several(rho)
    t = torch.arange(n, dtype=torch.float64, device=s.device)
    centred = t - t.mean()
    slope = (s * centred).sum(-1, keepdim=True) / (centred**2).sum()
    flat = s - s.mean(-1, keepdim=True) - slope * centred
    window = torch.hann_window(n, periodic=False, dtype=torch.float64, device=s.device)
    peak, k = torch.fft.rfft(flat * window).abs()[..., 1:].max(-1)
    frequency, amplitude = (k + 1).double() / n, 4 * peak / n
    gradient = slope[..., 0] if of == "cosine" else -slope[..., 0]
    settled = torch.stack([(s >= 1 - a if of == "cosine" else s <= a).double().mean(-1) for a in taus])
    kinds: list[Tensor] = []
    for a, near in zip(taus, settled, strict=True):
        orbits = (amplitude >= a / 2) & (frequency >= 2 / n)
        moving = torch.where(orbits, 1, torch.where(gradient > a / n, 2, 3))
        kinds += [torch.where(near >= share, 0, moving) for share in rhos]
    kind = torch.stack(kinds).unflatten(0, (len(taus), len(rhos)))
    return LimitingBehaviours(taus, rhos, kind, settled, frequency, amplitude, gradient)


def several(values: float | Sequence[float]) -> tuple[float, ...]:
    """One number or several, as several."""
    return (float(values),) if isinstance(values, int | float) else tuple(float(v) for v in values)
