"""Losses against formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from loop_lens.training import ExitGateLoss, LastIteration, WeightedIterations
from tests.training.toy import quick, tiny

LOGITS = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
GATES = torch.randn(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float32) * 2
TARGETS = torch.tensor([0, 3, 6, 2, 2])


def ouro(beta: float) -> float:
    total = 0.0
    for place in range(5):
        stays, entropy = 1.0, 0.0
        for t in range(4):
            leaves = 1 / (1 + math.exp(-GATES[t, place].item())) if t < 3 else 1.0
            p, stays = stays * leaves, stays * (1 - leaves)
            row = LOGITS[t, place].tolist()
            nll = math.log(sum(math.exp(x) for x in row)) - row[int(TARGETS[place])]
            total += p * nll
            entropy -= p * math.log(p)
        total -= beta * entropy
    return total


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.5])
def test_the_gate_loss_is_the_published_formula(beta: float) -> None:
    assert ExitGateLoss(beta).total(LOGITS, TARGETS, GATES).item() == pytest.approx(ouro(beta), abs=1e-5)


def test_a_saturated_gate_gives_finite_loss_and_gradients() -> None:
    gates = torch.tensor([[200.0, -200.0]] * 4, requires_grad=True)
    loss = ExitGateLoss(0.1).total(LOGITS[:, :2].float(), TARGETS[:2], gates)
    loss.backward()
    first, last = (cross_entropy(LOGITS[t, p], TARGETS[p]).item() for t, p in ((0, 0), (3, 1)))
    assert loss.item() == pytest.approx(first + last, abs=1e-5)
    assert gates.grad is not None and gates.grad.isfinite().all()


def test_weights_make_a_mean_over_iterations() -> None:
    each = torch.stack([cross_entropy(LOGITS[t], TARGETS, reduction="sum") for t in range(4)]).float()
    by = {
        "uniform": each.mean(),
        "linear": (each * torch.tensor([1, 2, 3, 4])).sum() / 10,
        (0.0, 1.0, 0.0, 3.0): (each[1] + 3 * each[3]) / 4,
    }
    for weights, expected in by.items():
        found = WeightedIterations(weights).total(LOGITS.float(), TARGETS, None)
        torch.testing.assert_close(found, expected)


def test_the_last_iteration_alone() -> None:
    found = LastIteration().total(LOGITS, TARGETS, None)
    torch.testing.assert_close(found, cross_entropy(LOGITS[3], TARGETS, reduction="sum"))


def test_losses_refuse_models_and_trainings_that_they_do_not_fit() -> None:
    with pytest.raises(ValueError, match="exit_gate=True"):
        quick(loss=ExitGateLoss()).require_model(tiny().config)
    with pytest.raises(ValueError, match="2 weights"):
        quick(loss=WeightedIterations((1.0, 2.0))).require_model(tiny().config)
    with pytest.raises(ValueError, match="all be zero"):
        WeightedIterations((0.0, 0.0))
    with pytest.raises(ValueError, match="unknown"):
        WeightedIterations("cubic")
    with pytest.raises(ValueError, match="beta"):
        ExitGateLoss(-1.0)
