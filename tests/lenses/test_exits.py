"""Exit rules against values computed by hand, and against the model run at that many iterations."""

from __future__ import annotations

import math

import pytest
import torch

from loop_lens.lenses import EXIT_RULES, exit_curve, exit_probabilities, exit_scores, find_exits
from tests.interventions.models import FAMILIES, opened, prompts


def test_gate_distribution_by_hand() -> None:
    gates = torch.tensor([0.0, math.log(3.0), 5.0]).view(3, 1, 1)  # lambdas 1/2, 3/4, (the rest)
    assert torch.allclose(exit_probabilities(gates).flatten(), torch.tensor([0.5, 0.375, 0.125]))
    assert torch.allclose(exit_scores("gate", gate_logits=gates).flatten(), torch.tensor([0.5, 0.875, 1.0]))


def test_gates_sum_to_one_even_when_saturated() -> None:
    gates = 30 * torch.randn(9, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(exit_probabilities(gates).sum(0), torch.ones(4, 5), atol=1e-6)
    assert exit_probabilities(torch.full((4, 1), 200.0))[0].item() == pytest.approx(1.0)
    assert exit_probabilities(torch.full((4, 1), -200.0))[-1].item() == pytest.approx(1.0)


def test_huginns_six_rules_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0], [3.0, 4.4], [0.0, 5.0]]).view(3, 1, 1, 2)
    latent = exit_scores("latent", states=x).flatten().tolist()
    assert latent[0] == math.inf
    assert latent[1] == pytest.approx(0.4 / math.hypot(3, 4.4)) and latent[2] == pytest.approx(
        math.hypot(3, 0.6) / 5
    )
    cosine = exit_scores("cosine", states=x).flatten().tolist()
    assert cosine[1] == pytest.approx(1 - (9 + 17.6) / (5 * math.hypot(3, 4.4)), abs=1e-6)
    p, q = [0.5, 0.3, 0.2], [0.6, 0.38, 0.02]
    logits = torch.tensor([p, q]).log().view(2, 1, 1, 3)

    def entropy(d: list[float]) -> float:
        return -sum(v * math.log(v) for v in d)

    def kl(a: list[float], b: list[float]) -> float:
        return sum(u * math.log(u / v) for u, v in zip(a, b, strict=True))

    assert exit_scores("entropy", logits=logits)[1].item() == pytest.approx(
        abs(entropy(q) - entropy(p)), rel=1e-4
    )
    assert exit_scores("kl", logits=logits)[1].item() == pytest.approx(kl(p, q), rel=1e-4)
    filtered = [v / (0.6 + 0.38 + 1 / 3) for v in (0.6, 0.38, 1 / 3)]  # 0.02 is below a tenth of 0.6
    assert exit_scores("minp_kl", logits=logits)[1].item() == pytest.approx(kl(p, filtered), rel=1e-4)
    tops = torch.nn.functional.one_hot(torch.tensor([1, 1, 2, 2, 2, 0]), 3).float().view(6, 1, 1, 3)
    assert exit_scores("argmax", logits=tops).flatten().tolist() == [0, 1, 0, 1, 2, 0]


def test_acceleration_by_hand() -> None:
    x = torch.tensor([[0.0, 0.0], [4.0, 0.0], [6.0, 0.0], [6.0, 1.0], [6.0, 1.5]]).view(5, 1, 1, 2)
    # Steps (4,0), (2,0), (0,1), (0,.5); changes 2, sqrt 5, .5; relative 1, sqrt 5, 1.
    scores = exit_scores("acceleration", states=x).flatten().tolist()
    assert scores[:3] == [math.inf] * 3
    assert scores[3:] == pytest.approx([math.sqrt(5), math.sqrt(5)])


@torch.no_grad()
@pytest.mark.parametrize("rule", [r for r in EXIT_RULES if r != "gate"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_said_at_the_exit_is_what_the_model_says_at_that_depth(name: str, rule: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model)
    n = model.recurrences
    loop = model.schedule.main_loop
    _, cache = model.run_with_cache(tokens)
    states = torch.stack([cache[f"{loop}.{t}.hook_state_out"] for t in range(n)])
    said = []
    for t in range(n):
        with model.at_recurrences(t + 1):
            said.append(model(tokens))
    logits = torch.stack(said)
    scores = exit_scores(rule, states=states, logits=logits)
    middle = float(scores[1:].flatten().median()) if rule != "argmax" else 1.0
    threshold = middle if math.isfinite(middle) else 1.0
    result = find_exits(model, tokens, rule=rule, threshold=threshold)
    assert torch.allclose(result.scores, scores, atol=1e-5, rtol=1e-3)
    for b in range(tokens.shape[0]):
        for p in range(tokens.shape[1]):
            hits = [
                t
                for t in range(n)
                if (
                    result.scores[t, b, p] >= threshold
                    if rule == "argmax"
                    else result.scores[t, b, p] < threshold
                )
            ]
            at = hits[0] if hits else n - 1
            assert result.iterations[b, p] == at + 1 and bool(result.exited[b, p]) == bool(hits)
            assert result.tokens[b, p] == logits[at, b, p].argmax()
            assert result.full[b, p] == logits[-1, b, p].argmax()


@torch.no_grad()
def test_ouros_gate_and_the_curve() -> None:
    model = opened("ouro")
    tokens, _ = prompts(model)
    _, cache = model.run_with_cache(tokens)
    gates = torch.stack([cache[f"loop.{t}.hook_exit_gate"] for t in range(model.recurrences)])
    result = find_exits(model, tokens, rule="gate", threshold=0.6)
    cumulated = exit_probabilities(gates).cumsum(0)
    assert torch.allclose(result.scores, cumulated, atol=1e-6)
    assert torch.equal(result.iterations, (cumulated >= 0.6).float().argmax(0) + 1)
    curve = exit_curve(model, tokens, rule="gate", thresholds=[0.0, 0.6, 2.0])
    assert curve.mean_iterations.tolist() == pytest.approx([1, result.mean_iterations, model.recurrences])
    assert curve.agreement[2] == 1 and curve.agreement[1] == pytest.approx(result.agreement)
    right = (result.tokens[:, :-1] == tokens[:, 1:]).float().mean()
    assert curve.accuracy[1] == pytest.approx(float(right))
    assert len(curve.plot().axes[0].lines) == 2
    assert len(result.to_dataframe()) == tokens.numel()


def test_bad_requests() -> None:
    model = opened("huginn")
    tokens, _ = prompts(model)
    with pytest.raises(ValueError, match="rule 'soon' is unknown"):
        find_exits(model, tokens, rule="soon")
    with pytest.raises(ValueError, match="rule 'soon' is unknown"):
        exit_curve(model, tokens, rule="soon", thresholds=[0.1])
    with pytest.raises(ValueError, match="needs a model with an exit gate"):
        find_exits(model, tokens, rule="gate")
    with pytest.raises(ValueError, match="looks at states"):
        exit_scores("latent", logits=torch.ones(2, 1, 1, 3))
