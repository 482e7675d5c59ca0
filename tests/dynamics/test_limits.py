"""Algorithm 1 over many series at once, against one written out in plain Python."""

from __future__ import annotations

import cmath
import math
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from loop_lens.dynamics import LIMIT_KINDS, LimitingBehaviour, limiting_behaviour


def by_hand(s: list[float], tau: float, rho: float, of: str) -> tuple[str, float, float, float]:
    """Kind, frequency, amplitude and gradient of one series."""
    n = len(s)
    mean_t, mean_s = (n - 1) / 2, sum(s) / n
    slope = sum((t - mean_t) * (v - mean_s) for t, v in enumerate(s)) / sum(
        (t - mean_t) ** 2 for t in range(n)
    )
    flat = [v - mean_s - slope * (t - mean_t) for t, v in enumerate(s)]
    windowed = [v * 0.5 * (1 - math.cos(2 * math.pi * t / (n - 1))) for t, v in enumerate(flat)]
    bins = [
        abs(sum(v * cmath.exp(-2j * math.pi * k * t / n) for t, v in enumerate(windowed)))
        for k in range(1, n // 2 + 1)
    ]
    k = max(range(len(bins)), key=bins.__getitem__)
    frequency, amplitude = (k + 1) / n, 4 * bins[k] / n
    near = sum(v >= 1 - tau if of == "cosine" else v <= tau for v in s)
    gradient = slope if of == "cosine" else -slope
    if near >= rho * n:
        kind = "fixed point"
    elif amplitude >= tau / 2 and frequency >= 2 / n:
        kind = "orbit"
    elif gradient > tau / n:
        kind = "slider"
    else:
        kind = "unknown"
    return kind, frequency, amplitude, gradient


def many(of: str, n: int) -> Tensor:
    """Series of every kind [kind series iteration]."""
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(n, dtype=torch.float64)
    a, b = torch.rand(2, 12, 1, generator=generator, dtype=torch.float64)
    settles = 1 - (0.3 + 0.65 * a) ** t
    turns = 0.5 + 0.3 * a * torch.cos(0.2 + 2.5 * b * t)
    slides = 0.9 * b + (a - 0.3) * 0.5 * t / n
    noise = torch.rand(12, n, generator=generator, dtype=torch.float64)
    cosines = torch.stack([settles, turns, slides, noise, slides + 0.02 * noise])
    return cosines if of == "cosine" else 1 - cosines


@pytest.mark.parametrize("of", ["cosine", "norm"])
@pytest.mark.parametrize("n", [17, 40])
def test_many_series_and_thresholds_at_once(of: Literal["cosine", "norm"], n: int) -> None:
    series = many(of, n)
    taus, rhos = (0.05, 0.2), (0.9, 0.5, 0.99)
    found = limiting_behaviour(series, taus, rhos, of=of)
    assert found.code.shape == (2, 3, 5, 12)
    seen: set[str] = set()
    for i, tau in enumerate(taus):
        for j, rho in enumerate(rhos):
            for a in range(5):
                for b in range(12):
                    kind, *values = by_hand(series[a, b].tolist(), tau, rho, of)
                    assert LIMIT_KINDS[int(found.code[i, j, a, b])] == found.kind[i, j, a, b] == kind
                    mine = [float(v[a, b]) for v in (found.frequency, found.amplitude, found.gradient)]
                    assert mine[1:] == pytest.approx(values[1:], abs=1e-9)
                    if values[1] > 1e-9:  # a straight line has no frequency but rounding's
                        assert mine[0] == pytest.approx(values[0], abs=1e-12)
                    seen.add(kind)
    assert seen == set(LIMIT_KINDS)
    one = limiting_behaviour(series[1, 3], 0.2, 0.5, of=of)
    assert one.kind == LIMIT_KINDS[int(found.code[1, 1, 1, 3])] and one.amplitude == float(
        found.amplitude[1, 3]
    )


def test_the_table_and_the_file(tmp_path: Path) -> None:
    found = limiting_behaviour(many("cosine", 20)[:, :2], tau=(0.05, 0.1))
    table = found.to_dataframe()
    assert len(table) == 20 and set(table.tau) == {0.05, 0.1} and set(table.rho) == {0.9}
    assert table.kind[13] == LIMIT_KINDS[int(found.code[1].flatten()[3])]
    found.save(tmp_path / "kinds")
    assert torch.equal(LimitingBehaviour.load(tmp_path / "kinds").code, found.code)


def test_bad_series() -> None:
    with pytest.raises(ValueError, match="has 3 values: give at least 4"):
        limiting_behaviour(torch.ones(7, 3))
    with pytest.raises(ValueError, match="of='angle' is unknown"):
        limiting_behaviour(torch.ones(7, 8), of="angle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN or infinity"):
        limiting_behaviour(torch.full((2, 9), math.inf))
