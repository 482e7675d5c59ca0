"""Drawn numbers of iterations against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from loop_lens.training import Fixed, LogNormalPoisson, Ramp, Uniform
from loop_lens.training.recurrences import Recurrences


def draws(rule: Recurrences, n: int, level: int = 1, fraction: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.tensor([rule.draw(generator, level=level, fraction=fraction) for _ in range(n)]).double()


def test_log_normal_poisson_has_the_mean_and_variance_of_its_definition() -> None:
    mean, sigma, n = 32.0, 0.5, 4000
    found = draws(LogNormalPoisson(mean, sigma), n)
    variance = mean + mean**2 * (math.exp(sigma**2) - 1)
    assert abs(found.mean() - (mean + 1)) < 4 * math.sqrt(variance / n)
    assert abs(found.var() / variance - 1) < 0.2
    assert found.min() >= 1


def test_log_normal_poisson_without_spread_is_poisson_and_without_tail_is_cut() -> None:
    found = draws(LogNormalPoisson(3.0, sigma=0.0), 4000) - 1
    expected = torch.tensor([math.exp(-3) * 3**k / math.factorial(k) for k in range(8)])
    assert (torch.bincount(found.long(), minlength=8)[:8] / 4000 - expected).abs().max() < 0.03
    assert draws(LogNormalPoisson(3.0, most=4), 500).max() == 4


def test_a_fraction_scales_the_mean() -> None:
    found = draws(LogNormalPoisson(32.0), 2000, fraction=0.25)
    assert abs(found.mean() - 9) < 0.5
    assert draws(Fixed(8), 1, fraction=0.25).item() == 2
    assert draws(Fixed(8), 1, fraction=1e-6).item() == 1


def test_uniform_draws_every_number_of_the_range_of_its_level() -> None:
    found = draws(Uniform(1, 3, per_level=1), 300, level=4)
    assert sorted(set(found.tolist())) == [5, 6, 7]
    counts = torch.bincount(found.long())[5:]
    assert counts.min() > 70


def test_ramps_end_at_the_full_number() -> None:
    linear, root = Ramp(10), Ramp(10, "1-sqrt")
    assert [linear.fraction(s) for s in (0, 4, 9, 50)] == [0.1, 0.5, 1.0, 1.0]
    assert root.fraction(4) == pytest.approx(1 - math.sqrt(0.5))
    assert root.fraction(9) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed(0), "at least 1"),
        (lambda: Uniform(4, 3), "empty"),
        (lambda: Uniform(0, 3), "at least 1"),
        (lambda: LogNormalPoisson(0.0), "above 0"),
        (lambda: LogNormalPoisson(4.0, sigma=-1.0), "sigma"),
        (lambda: LogNormalPoisson(4.0, most=0), "most"),
        (lambda: Ramp(0), "at least one step"),
        (lambda: Ramp(3, "cubic"), "unknown"),
    ],
)
def test_impossible_numbers_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
