"""Verdicts on curves made by hand."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from loop_lens.experiments.random_init.measures import RandomResult
from loop_lens.experiments.random_init.models import RandomModel
from loop_lens.experiments.random_init.verdicts import CLAIMS, Claim, judge, seeds_table, tally, verdicts


def made(norm: str, injection: bool, cosine: Tensor, one_point: Tensor, seed: int = 0) -> RandomResult:
    """A model whose curves [iteration] are the same at both of its layers."""
    curve = cosine[:, None].expand(-1, 2)
    curves = {name: curve for name in ("cosine", "norm", "relative_distance", "relative_step", "step_cosine")}
    return RandomResult(
        asdict(RandomModel(norm, injection, 2, seed)),
        {**curves, "matrix_distance": curve},
        {"cosine": one_point},
        torch.tensor([[10, 0, 0, 0]] * 2),
        0.5,
    )


def settling(limit: float = 1.0) -> Tensor:
    return limit * (1 - 0.5 ** torch.arange(1, 41.0))


def paper() -> dict[tuple[str, bool], tuple[Tensor, Tensor]]:
    """Curves as the paper describes them: (cosine, degeneracy) by norm and injection."""
    lost = settling(0.1)
    return {
        ("pre", True): (settling(), settling(0.6)),
        ("huginn", True): (settling(), settling(0.6)),
        ("ouro", True): (lost, lost),
        ("pre", False): (settling(), settling()),
        ("huginn", False): (lost, lost),
        ("ouro", False): (lost, lost),
    }


def test_curves_as_described_hold_everywhere() -> None:
    found = verdicts([made(*kind, *curves) for kind, curves in paper().items()])
    assert len(found) == len(CLAIMS)
    assert all(verdict.holds for verdict in found)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_each_claim_fails_on_the_opposite_curve(claim: Claim) -> None:
    curves = paper()
    kind = (claim.norm, claim.injection)
    cosine, one_point = curves[kind]
    curves[kind] = {
        "above 0.95": (settling(0.1), one_point),
        "below 0.95": (settling(), one_point),
        "M9": (cosine, settling(0.1)),
        "below 2": (cosine, settling(0.97)),
        "above 2": (cosine, cosine),
    }["M9" if "M9" in claim.name else f"{claim.side} {claim.threshold:g}"]
    found = verdicts([made(*kind, *pair) for kind, pair in curves.items()])
    holds = {verdict.of.name: verdict.holds for verdict in found}
    assert not holds[claim.name]
    others = [c.name for c in CLAIMS if (c.norm, c.injection) != kind]
    assert all(holds[name] for name in others)


def test_layers_are_apart_by_their_angle_over_how_far_they_move() -> None:
    still, turned = torch.full((40,), 0.99), torch.full((40,), 0.9)
    result = made("pre", True, still, turned)
    assert result.apart == pytest.approx(math.acos(0.9) / math.acos(0.99), rel=1e-5)
    rounding = made("pre", True, torch.full((40,), 1 + 1e-7), turned)
    assert rounding.apart == pytest.approx(math.acos(0.9) / math.sqrt(2 * 2.0**-23), rel=1e-5)


def test_one_seed_on_the_wrong_side_is_enough() -> None:
    good, bad = settling(), settling(0.9)
    (verdict,) = [
        v
        for v in verdicts([made("pre", True, good, good), made("pre", True, bad, good, seed=1)])
        if v.of.name == "injection, pre"
    ]
    assert not verdict.holds
    assert verdict.worst == pytest.approx(0.9, abs=1e-3)
    assert "does not hold" in str(verdict)


def test_only_the_last_quarter_counts() -> None:
    late = torch.cat([torch.zeros(30), torch.ones(10)])
    (verdict,) = [v for v in verdicts([made("pre", True, late, late)]) if v.of.name == "injection, pre"]
    assert verdict.holds and verdict.values == (1.0,)


def test_a_number_that_is_none_is_on_no_side() -> None:
    for claim in CLAIMS:
        assert not judge(claim, 12, [float("nan")]).holds


def test_nothing_measured_is_no_verdict() -> None:
    with pytest.raises(ValueError, match="no model of 12 layers"):
        judge(CLAIMS[0], 12, [])
    assert verdicts([]) == []


def test_tables_say_which_claims_fail() -> None:
    models = [made(*kind, *curves) for kind, curves in paper().items()]
    table = seeds_table(verdicts(models))
    assert table["verdict"].tolist() == ["holds"] * len(CLAIMS)
    models[0] = made("pre", True, settling(0.5), settling(0.6))
    row = tally({"changed": models}).iloc[0]
    # What does not settle has no layers that are farther apart than it moves.
    assert row["hold"] == f"{len(CLAIMS) - 2} of {len(CLAIMS)}"
    assert row["injection, pre"] == "0.5 ✗"
    assert row["none, pre"] == "1"
