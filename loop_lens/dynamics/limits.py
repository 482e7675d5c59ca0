"""Where one token's trajectory goes: to a fixed point, around an orbit, or away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


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

    kind: Literal["fixed point", "orbit", "slider", "unknown"]
    settled: float
    frequency: float
    amplitude: float
    gradient: float


def limiting_behaviour(
    series: Float[Tensor, " iteration"],
    tau: float = 0.05,
    rho: float = 0.9,
    *,
    of: Literal["cosine", "norm"] = "cosine",
) -> LimitingBehaviour:
    """Classify one token's series at one layer.

    Args:
        series: Cosine to the final state at each iteration, the final one left out; or, with
            ``of="norm"``, the distance to it.
        tau: Tolerance.
        rho: Share of values that must be within tau for a fixed point.
        of: What the series holds.

    Raises:
        ValueError: If the series is shorter than 4, or holds NaN or infinity.

    Source:
        arXiv 2604.11791, Algorithm 1: first match of fixed point, orbit (amplitude at least tau/2, at
        least two cycles), slider (gradient above tau/n), unknown; amplitude 4/n times the largest bin of
        the Hann-windowed, detrended spectrum without its constant.
    """
    s = torch.as_tensor(series).double().flatten()
    n = len(s)
    if n < 4:
        raise ValueError(f"the series has {n} values: give at least 4")
    if not bool(s.isfinite().all()):
        raise ValueError("the series holds NaN or infinity: the model diverged before its last iteration")
    if of not in ("cosine", "norm"):
        raise ValueError(f"of={of!r} is unknown: choose 'cosine' or 'norm'")
    near = s >= 1 - tau if of == "cosine" else s <= tau
    t = torch.arange(n, dtype=torch.float64)
    centred = t - t.mean()
    slope = (centred * s).sum() / (centred**2).sum()
    flat = s - s.mean() - slope * centred
    spectrum = torch.fft.rfft(flat * torch.hann_window(n, periodic=False, dtype=torch.float64)).abs()[1:]
    k = int(spectrum.argmax())
    frequency, amplitude = (k + 1) / n, float(4 * spectrum[k] / n)
    gradient = float(slope) if of == "cosine" else -float(slope)
    settled = float(near.double().mean())
    if settled >= rho:
        kind = "fixed point"
    elif amplitude >= tau / 2 and frequency >= 2 / n:
        kind = "orbit"
    elif gradient > tau / n:
        kind = "slider"
    else:
        kind = "unknown"
    return LimitingBehaviour(kind, settled, frequency, amplitude, gradient)
