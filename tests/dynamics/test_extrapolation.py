"""What is said after R iterations, against a forward of its own for each R."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import loop_lens
from loop_lens.dynamics import Extrapolation, convergence, extrapolate
from loop_lens.measuring.moments import DivergedError
from tests.dynamics.test_attention import TEXTS
from tests.interventions.models import MODELS, opened, prompts, wrapped
from tests.oracles.unrolled import decoder

STEPS = (1, 2, 4, 5)


@torch.no_grad()
def by_hand(model: Any, tokens: Tensor, labels: Tensor, trained: int) -> dict[int, dict[str, float]]:
    """Each metric's mean over labelled tokens, one forward per R, in double precision by numpy."""
    kept = (labels != -100).numpy()
    right = labels.numpy()[kept]

    def logprobs(r: int) -> np.ndarray:
        with model.at_recurrences(r):
            logits = model(tokens).double().numpy()[kept]
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    reference = logprobs(trained)
    found: dict[int, dict[str, float]] = {}
    for r in STEPS:
        said = logprobs(r)
        found[r] = {
            "loss": float(-said[np.arange(len(right)), right].mean()),
            "accuracy": float((said.argmax(-1) == right).mean()),
            "kl": float((np.exp(reference) * (reference - said)).sum(-1).mean()),
            "entropy": float(-(np.exp(said) * said).sum(-1).mean()),
            "agreement": float((said.argmax(-1) == reference.argmax(-1)).mean()),
        }
    return found


def next_tokens(tokens: Tensor) -> Tensor:
    return torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), -100)], dim=1)


@pytest.mark.parametrize("name", list(MODELS))
def test_one_run_says_what_a_run_of_each_length_says(name: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model)
    found = extrapolate(model, tokens, recurrences=STEPS)
    expected = by_hand(model, tokens, next_tokens(tokens), model.recurrences)
    for i, r in enumerate(STEPS):
        for metric, value in expected[r].items():
            assert float(found.mean(metric)[i]) == pytest.approx(value, rel=1e-5, abs=1e-5), (r, metric)
    assert found.trained == model.recurrences and found.recurrences == STEPS
    assert (found.convergence is None) == (name == "damped_llama")


@pytest.mark.parametrize("rule", ["residual_scaled", "ema"])
def test_rules_of_loopify(rule: str) -> None:
    alpha = 0.6 if rule == "ema" else None
    model = loop_lens.loopify(decoder("llama"), layers=[2, 3], times=3, rule=rule, alpha=alpha)
    tokens, _ = prompts(model)
    found = extrapolate(model, tokens, recurrences=STEPS)
    for i, (r, metrics) in enumerate(by_hand(model, tokens, next_tokens(tokens), 3).items()):
        assert float(found.mean("loss")[i]) == pytest.approx(metrics["loss"], rel=1e-5), r
        assert float(found.mean("kl")[i]) == pytest.approx(metrics["kl"], rel=1e-4, abs=1e-6), r
    assert (found.convergence is None) == (rule == "residual_scaled")


@pytest.mark.parametrize("trained", [1, 3, 9])
def test_the_reference_may_lie_anywhere(trained: int) -> None:
    model = opened("huginn")
    tokens, _ = prompts(model)
    found = extrapolate(model, tokens, recurrences=STEPS, trained=trained)
    expected = by_hand(model, tokens, next_tokens(tokens), trained)
    for i, r in enumerate(STEPS):
        assert float(found.mean("kl")[i]) == pytest.approx(expected[r]["kl"], rel=1e-3, abs=1e-6)
        assert float(found.mean("agreement")[i]) == expected[r]["agreement"]
    table = found.to_dataframe()
    assert table["beyond"].tolist() == [r > trained for r in STEPS]
    assert (trained == 1) == (float(found.mean("kl")[0]) < 1e-9)


def test_how_the_loop_moves_stands_beside_it() -> None:
    model = wrapped(injection="linear", initial_state="noise")
    found = extrapolate(model, TEXTS, recurrences=STEPS)
    table = found.to_dataframe()
    with model.at_recurrences(5):
        moves = convergence(model, TEXTS, patterns=False)
    for metric in ("norm", "step", "relative_step", "step_cosine"):
        expected = [float(moves.mean(metric)[r - 1, -1]) for r in STEPS]
        assert table[metric].tolist() == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert model.recurrences == 3
    nested = extrapolate(opened("hrm_text"), torch.tensor([[1, 2, 3]]), recurrences=(1, 2))
    assert nested.convergence is not None and nested.convergence.segment == "H"


def test_given_labels() -> None:
    model = opened("retrofit_llama")
    tokens, _ = prompts(model)
    labels = torch.full_like(tokens, -100)
    labels[0, 2], labels[0, 6], labels[1, 6] = 5, 7, 9
    expected = by_hand(model, tokens, labels, model.recurrences)
    for given in (labels, labels.tolist()):
        found = extrapolate(model, tokens, recurrences=STEPS, labels=given)
        for i, r in enumerate(STEPS):
            assert float(found.mean("loss")[i]) == pytest.approx(expected[r]["loss"], rel=1e-5)
        assert found.moments.count[0].tolist() == [3] * len(STEPS)
    # Rows of their own length, in the prompts' order whatever order they run in.
    prompts_apart = [tokens[0], tokens[1, :4]]
    apart = [labels[0].tolist(), [-100, -100, -100, 9]]
    found = extrapolate(model, prompts_apart, recurrences=(1, 2), labels=apart, batch_size=1)
    alone = [
        extrapolate(model, [p], recurrences=(1, 2), labels=[own])
        for p, own in zip(prompts_apart, apart, strict=True)
    ]
    assert torch.allclose(found.moments.total, alone[0].merge(alone[1]).moments.total, rtol=1e-6)


def test_padding_changes_nothing_and_parts_merge(tmp_path: Path) -> None:
    model = opened("ouro")
    generator = torch.Generator().manual_seed(1)
    each = [torch.randint(1, model.cfg.d_vocab, (n,), generator=generator) for n in (3, 9, 5)]
    together = extrapolate(model, each, recurrences=STEPS, batch_size=3)
    alone = [extrapolate(model, [p], recurrences=STEPS) for p in each]
    merged = alone[0].merge(alone[1]).merge(alone[2])
    for metric in together.metrics:
        for over in ("values", "prompts"):
            a, b = together.mean(metric, over=over), merged.mean(metric, over=over)
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    halves = extrapolate(model, each[:2], recurrences=STEPS).merge(
        extrapolate(model, each[2:], recurrences=STEPS)
    )
    assert torch.allclose(halves.moments.total, merged.moments.total, rtol=1e-6, atol=1e-6)
    together.save(tmp_path / "said")
    again = Extrapolation.load(tmp_path / "said")
    assert again.to_dataframe().equals(together.to_dataframe())
    figure = together.plot(("loss", "entropy"))
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "entropy"]
    assert figure.axes[0].lines[1].get_xdata()[0] == model.recurrences
    with pytest.raises(ValueError, match="recurrences differ"):
        together.merge(extrapolate(model, each, recurrences=(1, 2)))


def test_bad_requests() -> None:
    model = wrapped(injection="linear", initial_state="noise")
    with pytest.raises(ValueError, match="at least one R of 2 or more"):
        extrapolate(model, TEXTS, recurrences=(1,))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        extrapolate(model, TEXTS, recurrences=(0, 2))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        extrapolate(model, TEXTS, trained=0)
    with pytest.raises(ValueError, match="prompt 1 has one token"):
        extrapolate(model, [[1, 2], [3]], recurrences=(1, 2))
    with pytest.raises(ValueError, match="prompt 1 has none"):
        extrapolate(model, [[1, 2], [3]], recurrences=(1, 2), labels=[[1, 2]])
    with pytest.raises(ValueError, match=r"\(1,\) for 2 tokens"):
        extrapolate(model, [[1, 2]], recurrences=(1, 2), labels=[[1]])
    with pytest.raises(ValueError, match="prompt 0 has no label"):
        extrapolate(model, [[1, 2]], recurrences=(1, 2), labels=[[-100, -100]])
    with pytest.raises(ValueError, match="no prompts"):
        extrapolate(model, [], recurrences=(1, 2))
    assert not any(point.fwd_hooks for point in model.hook_points())


@pytest.mark.parametrize(
    ("trained", "message"), [(2, "iteration 2, layer 1"), (4, "said after 4 iterations is NaN")]
)
def test_what_diverged_is_named(trained: int, message: str) -> None:
    model = wrapped(injection="linear", initial_state="noise", recurrences=8)
    name = model.name("resid_post", iteration=2, layer=1)
    hooks: list[Any] = [(name, lambda value, hook: value * float("nan"))]
    with model.hooks(fwd_hooks=hooks), pytest.raises(DivergedError, match=message):
        extrapolate(model, TEXTS, recurrences=(1, 2, 4, 8), trained=trained)
    assert not any(point.fwd_hooks for point in model.hook_points())


def test_a_read_out_that_diverges_is_named() -> None:
    model = wrapped(injection="linear", initial_state="noise")
    seen: list[int] = []

    def third_time(value: Tensor, hook: Any) -> Tensor:
        seen.append(1)
        return value * float("nan") if len(seen) == 3 else value

    name = model.name("resid_post", segment="coda", layer=0)
    model.set_recurrences(8)
    with (
        model.hooks(fwd_hooks=[(name, third_time)]),
        pytest.raises(DivergedError, match="first at recurrences 4"),
    ):
        extrapolate(model, TEXTS, recurrences=(1, 2, 4, 8), trained=1)
