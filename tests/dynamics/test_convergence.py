"""Convergence metrics against the cache, against a known contraction, and merged from parts."""

from __future__ import annotations

import math

import pytest
import torch

from loop_lens.dynamics import convergence
from tests.interventions.models import opened, prompts, wrapped
from tests.interventions.test_paths import linear_loop


@torch.no_grad()
@pytest.mark.parametrize("name", ["huginn", "ouro", "retrofit_olmo", "hrm_text", "looped_llama"])
def test_against_the_cache(name: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model)
    found = convergence(model, tokens, reference=model.recurrences + 2)
    its, loop = found.iterations, model.schedule.innermost_loop
    _, cache = model.run_with_cache(tokens)
    with model.at_recurrences(model.recurrences + 2):
        last = model.schedule.iterations(loop)[-1]
        _, later = model.run_with_cache(tokens)
        ends = [later[name] for name in model.names("resid_post", iteration=[last])]
        end = ends[0]
        end_pattern = later[model.name("pattern", iteration=last, layer=0)]

    def at(hook: str, i: int) -> torch.Tensor:
        return cache[model.name(hook, iteration=its[i], layer=0)]

    for i in range(1, len(its)):
        x, before = at("resid_post", i), at("resid_post", i - 1)
        gap = (x - before).norm(dim=-1)
        expected = {
            "step": gap,
            "relative_step": gap / x.norm(dim=-1),
            "step_cosine": torch.cosine_similarity(x, before, dim=-1),
            "matrix_step": torch.linalg.matrix_norm(x - before),
            "distance": (x - end).norm(dim=-1),
            "cosine": torch.cosine_similarity(x, end, dim=-1),
            "matrix_distance": torch.linalg.matrix_norm(x - end),
            "pattern_step": torch.linalg.matrix_norm(at("pattern", i) - at("pattern", i - 1)),
            "pattern_distance": torch.linalg.matrix_norm(at("pattern", i) - end_pattern),
            "norm": x.norm(dim=-1),
            "degeneracy_cosine": torch.stack([torch.cosine_similarity(x, e, dim=-1) for e in ends]).amin(0),
            "degeneracy_distance": torch.stack([(x - e).norm(dim=-1) for e in ends]).amax(0),
        }
        for metric, values in expected.items():
            assert float(found.mean(metric)[i, 0]) == pytest.approx(float(values.mean()), rel=1e-4, abs=1e-6)
            spread = float(values.double().std(correction=0))
            assert float(found.std(metric)[i, 0]) == pytest.approx(spread, rel=1e-2, abs=1e-4)
    assert found.mean("step")[0].isnan().all()
    assert len(found.to_dataframe()) == len(its) * len(found.layers)
    assert len(found.plot("distance").axes[0].lines) == len(found.layers) + 1


@torch.no_grad()
def test_a_contracting_linear_loop_shrinks_at_its_rate() -> None:
    model = linear_loop()
    d = model.cfg.d_model
    model.original_model.model.injection.adapter.weight[:, :d] = 0.5 * torch.eye(d)
    for name, parameter in model.original_model.named_parameters():
        if "core" in name and "down_proj" in name:
            parameter.zero_()
    model.set_recurrences(8)
    found = convergence(model, torch.tensor([[1, 2, 3]]), reference=60)
    steps, distances = found.mean("step")[:, 0], found.mean("distance")[:, 0]
    assert torch.allclose(steps[2:] / steps[1:-1], torch.full((6,), 0.5, dtype=torch.float64), rtol=1e-3)
    assert torch.allclose(
        distances[1:] / distances[:-1], torch.full((7,), 0.5, dtype=torch.float64), rtol=1e-3
    )
    attention = found.mean("pattern_step")[1:, 0]  # settles as the state does
    assert torch.allclose(
        attention[-2:] / attention[-3:-1], torch.full((2,), 0.5, dtype=torch.float64), rtol=0.1
    )
    assert (found.mean("floor")[:, 0] / found.mean("norm")[:, 0]).tolist() == pytest.approx(
        [torch.finfo(torch.float32).eps] * 8
    )


@torch.no_grad()
def test_parts_merge_exactly_and_lengths_may_differ() -> None:
    model = wrapped(injection="linear", initial_state="noise")
    texts = ["w1 w2 w3", "w4 w5", "w6 w7 w8", "w9 w10 w11 w12"]
    whole = convergence(model, texts, reference=5)
    parts = [convergence(model, texts[i::2], reference=5, batch_size=1) for i in (0, 1)]
    merged = parts[0].merge(parts[1])
    for metric in whole.metrics:
        a, b = whole.mean(metric), merged.mean(metric)
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7, equal_nan=True)
    assert torch.equal(whole.moments.count, merged.moments.count)
    assert int(whole.moments.count[whole.metrics.index("norm"), 0, 0]) == sum(
        len(t.split()) + 1 for t in texts
    )
    without = convergence(model, texts, patterns=False)
    assert "pattern_step" not in without.metrics and "distance" not in without.metrics
    with pytest.raises(ValueError, match="do not merge"):
        whole.merge(without)


@pytest.mark.parametrize("name", ["huginn", "hrm_text"])
def test_keeping_states_gives_the_same_in_one_run(name: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model)
    twice = convergence(model, tokens, reference=model.recurrences)
    once = convergence(model, tokens, reference=model.recurrences, keep=True)
    # HRM-Text's hooked blocks are transformer-lens' own, which round differently from the bare ones.
    tolerance = 0.0 if name == "huginn" else 1e-4
    assert torch.allclose(once.moments.total, twice.moments.total, rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match=f"give reference={model.recurrences}, not 99"):
        convergence(model, tokens, reference=99, keep=True)


def test_bad_requests() -> None:
    model = wrapped()
    with pytest.raises(ValueError, match="no prompts"):
        convergence(model, [])
    with pytest.raises(ValueError, match="before the end"):
        convergence(model, ["w1 w2"], reference=2)
    with pytest.raises(ValueError, match="at least 2 iterations"), model.at_recurrences(1):
        convergence(model, ["w1 w2"])
    found = convergence(model, ["w1 w2"])
    with pytest.raises(ValueError, match="metric 'speed' is unknown"):
        found.mean("speed")
    assert math.isfinite(float(found.mean("step")[1, 0]))
