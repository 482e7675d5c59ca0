"""Where tokens' trajectories go: to a fixed point, around an orbit, or away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loop_lens.measuring.results import Result
from loop_lens.measuring.tables import grid_table

Kind = Literal["fixed point", "orbit", "slider", "unknown"]
LIMIT_KINDS: tuple[Kind, ...] = ("fixed point", "orbit", "slider", "unknown")
Of = Literal["cosine", "norm"]
LEAST = 4
"""The fewest values that a series can be classified by."""


@dataclass(frozen=True)
class LimitingBehaviour(Result):
    """Where series go, with what decided it: of one series, or of many at one or several thresholds.

    Attributes:
        code: Each series' kind, as its place in `LIMIT_KINDS` [*tau *rho *series]. The dimensions of ``tau`` and
            ``rho`` are there if several were given.
        settled: Share of values within tau of the limit [*tau *series].
        frequency: Of the strongest oscillation, in cycles per iteration [*series].
        amplitude: Of that oscillation [*series].
        gradient: Slope towards the final state, per iteration [*series].

    Example:
        >>> cosines = torch.stack([torch.ones(12), torch.linspace(0, 0.5, 12)])
        >>> found = loop_lens.dynamics.limiting_behaviour(cosines, tau=(0.05, 0.1))
        >>> found.kind[0].tolist()
        ['fixed point', 'slider']
        >>> found.to_dataframe().groupby("tau").settled.max().tolist()
        [1.0, 1.0]
    """

    tau: tuple[float, ...]
    rho: tuple[float, ...]
    code: Tensor
    settled: Tensor
    frequency: Tensor
    amplitude: Tensor
    gradient: Tensor

    @property
    def kind(self) -> Any:
        """The kinds by name, an array as `code` is; of one series at one pair of thresholds the name itself."""
        return np.array(LIMIT_KINDS, dtype=object)[self.code.cpu().numpy()]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair of thresholds and series (numbered from 0, last dimension fastest)."""
        n_series = self.gradient.numel()
        axes = {"tau": self.tau, "rho": self.rho, "series": range(n_series)}
        columns = {
            "kind": self.code.reshape(len(self.tau), len(self.rho), n_series),
            "settled": self.settled.reshape(len(self.tau), 1, n_series),
            **{name: getattr(self, name).flatten() for name in ("frequency", "amplitude", "gradient")},
        }
        table = grid_table(axes, columns)
        return table.assign(kind=table["kind"].map(LIMIT_KINDS.__getitem__))


def limiting_behaviour(
    series: Float[Tensor, "*series iteration"],
    tau: float | Sequence[float] = 0.05,
    rho: float | Sequence[float] = 0.9,
    *,
    of: Of = "cosine",
) -> LimitingBehaviour:
    """Classify series, such as those of tokens at one layer, at one or several pairs of thresholds.

    Args:
        series: Cosine to the final state (or norm of the difference from it) per iteration, the final
            iteration left out.
        tau: How close to the final state counts as settled; half of it is the least amplitude of an orbit.
        rho: Share of iterations that must be settled for a fixed point.
        of: Whether the series hold cosines or norms.

    Raises:
        ValueError: If the series are shorter than 4 or hold NaN or infinity.

    Source:
        arXiv 2604.11791, Algorithm 1: first match of fixed point, orbit (amplitude at least tau/2, at
        least two cycles), slider (gradient above tau/n), unknown; amplitude 4/n times the largest bin of
        the Hann-windowed, detrended spectrum without its constant.

    Example:
        >>> t = torch.arange(40)
        >>> found = loop_lens.dynamics.limiting_behaviour(0.5 + 0.3 * torch.cos(0.2 * torch.pi * t))
        >>> found.kind, round(float(found.frequency), 3)  # a tenth of a cycle per iteration
        ('orbit', 0.1)
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
    codes: list[Tensor] = []
    for a, near in zip(taus, settled, strict=True):
        orbits = (amplitude >= a / 2) & (frequency >= 2 / n)
        moving = torch.where(orbits, 1, torch.where(gradient > a / n, 2, 3))
        codes += [torch.where(near >= share, 0, moving) for share in rhos]
    code = torch.stack(codes).unflatten(0, (len(taus), len(rhos)))
    one_tau, one_rho = isinstance(tau, int | float), isinstance(rho, int | float)
    code = code[:, 0] if one_rho else code
    code, settled = (code[0], settled[0]) if one_tau else (code, settled)
    return LimitingBehaviour(taus, rhos, code, settled, frequency, amplitude, gradient)


def several(values: float | Sequence[float]) -> tuple[float, ...]:
    """One number or several, as several."""
    return (float(values),) if isinstance(values, int | float) else tuple(float(v) for v in values)
