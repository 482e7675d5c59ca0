"""Closed forms of the quantities that are plain functions on tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loop_lens import UnknownNameError
from loop_lens.dynamics import limiting_behaviour, spectral_radius
from loop_lens.stages import colsum_concentration, matrix_entropy, mixing_score, sink_rate
from tests.interventions.models import opened, prompts
from tests.interventions.test_paths import linear_loop


def test_attention_in_closed_form() -> None:
    n = 64
    uniform = torch.ones(n, n).tril()
    uniform = uniform / uniform.sum(-1, keepdim=True)
    diagonal = torch.eye(n)
    sink = torch.zeros(n, n)
    sink[:, 0] = 1
    stack = torch.stack([uniform, diagonal, sink])
    assert colsum_concentration(stack).tolist() == pytest.approx([0.097, 0, 1], abs=1e-3)
    entropy = np.mean([math.log(i + 1) for i in range(n)])
    assert mixing_score(stack).tolist() == pytest.approx([entropy, 0, 0], abs=1e-5)
    mean_of_first = np.mean([1 / (i + 1) for i in range(n)])
    assert sink_rate(stack).item() == pytest.approx(1 / 3)
    assert sink_rate(stack, tau=float(mean_of_first) - 1e-4).item() == pytest.approx(2 / 3)
    assert sink_rate(stack[None].expand(2, -1, -1, -1), token=1).tolist() == [0, 0]


def test_matrix_entropy_in_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    rank_one = torch.outer(torch.randn(9, generator=generator), torch.randn(5, generator=generator))
    assert matrix_entropy(rank_one).item() == pytest.approx(0, abs=1e-6)
    assert matrix_entropy(torch.eye(7)).item() == pytest.approx(math.log(7))
    x = torch.randn(3, 9, 5, generator=generator)
    for entropy, one in zip(matrix_entropy(x), x, strict=True):
        s = np.linalg.svd(one.numpy(), compute_uv=False) ** 2
        assert float(entropy) == pytest.approx(float(-(s / s.sum() * np.log(s / s.sum())).sum()), abs=1e-5)
    assert torch.allclose(matrix_entropy(5 * x), matrix_entropy(x), atol=1e-6)


def test_limiting_behaviour_in_closed_form() -> None:
    t = torch.arange(100, dtype=torch.float64)
    settles = 1 - 0.6**t
    assert limiting_behaviour(settles).kind == "fixed point"
    assert limiting_behaviour(0.6**t, of="norm").kind == "fixed point"
    turns = limiting_behaviour(0.5 + 0.3 * torch.cos(2 * math.pi * 0.1 * t))
    assert turns.kind == "orbit"
    assert turns.frequency == pytest.approx(0.1, abs=0.01) and turns.amplitude == pytest.approx(0.3, rel=0.05)
    slides = limiting_behaviour(0.2 + 0.005 * t)
    assert slides.kind == "slider" and slides.gradient == pytest.approx(0.005)
    away = limiting_behaviour(5 - 0.03 * t, of="norm")
    assert away.kind == "slider" and away.gradient == pytest.approx(0.03)
    assert limiting_behaviour(torch.full((50,), 0.3)).kind == "unknown"
    # The thresholds are what they say.
    share = torch.ones(100, dtype=torch.float64)
    share[:10] = 0.5
    assert (
        limiting_behaviour(share).kind == "fixed point"
        and limiting_behaviour(share, rho=0.91).kind != "fixed point"
    )


@pytest.mark.parametrize("rotation", [False, True])
def test_spectral_radius_of_a_linear_loop(rotation: bool) -> None:
    model = linear_loop()
    d = model.cfg.d_model
    weight = model.original_model.model.injection.adapter.weight
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.original_model.named_parameters():
            if "core" in name and "down_proj" in name:
                parameter.zero_()  # the state's matrix is then the injection's alone
        if rotation:
            c, s = 0.8 * math.cos(0.7), 0.8 * math.sin(0.7)
            state = torch.block_diag(torch.tensor([[c, -s], [s, c]]), 0.3 * torch.eye(d - 2))
            known = 0.8
        else:
            state = torch.randn(d, d, generator=generator) / d**0.5
            known = float(np.abs(np.linalg.eigvals(state.numpy())).max())
        weight[:, :d] = state
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert spectral_radius(model, tokens, iteration=1) == pytest.approx(known, rel=1e-3)
    assert spectral_radius(model, tokens, iteration=1, steps=4 * d) == pytest.approx(known, rel=1e-4)


@pytest.mark.parametrize("name", ["huginn", "ouro", "hrm_text", "looped_llama"])
def test_spectral_radius_against_the_whole_jacobian(name: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model, n=1, length=3)
    t = model.schedule.iterations(model.schedule.innermost_loop)[1]
    start, end = model.name("state_in", iteration=t), model.name("state_out", iteration=t)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=start)
    base = cache[start]

    def step(state: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hooks = [(start, lambda value, hook: state), (end, lambda value, hook: seen.append(value))]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        return seen[0]

    whole = torch.autograd.functional.jacobian(step, base)
    matrix = whole.reshape(base.numel(), base.numel()).double().numpy()  # type: ignore[union-attr]
    known = float(np.abs(np.linalg.eigvals(matrix)).max())
    found = spectral_radius(model, tokens, iteration=t, steps=base.numel())
    assert found == pytest.approx(known, rel=1e-3)
    assert spectral_radius(model, tokens, iteration=t) == pytest.approx(known, rel=0.1)
    assert not any(point.fwd_hooks for point in model.registry.existing())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="as many keys as queries"):
        mixing_score(torch.ones(3, 4))
    with pytest.raises(ValueError, match="two or more"):
        colsum_concentration(torch.ones(1, 1))
    with pytest.raises(ValueError, match="over heads"):
        sink_rate(torch.ones(3, 3))
    with pytest.raises(ValueError, match="token 3 does not exist"):
        sink_rate(torch.ones(1, 3, 3), token=3)
    with pytest.raises(ValueError, match="stream of zeros"):
        matrix_entropy(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="at least 4"):
        limiting_behaviour(torch.ones(3))
    with pytest.raises(ValueError, match="NaN or infinity"):
        limiting_behaviour(torch.full((9,), float("nan")))
    model = opened("ouro")
    with pytest.raises(UnknownNameError, match="iteration"):
        spectral_radius(model, torch.ones(1, 3, dtype=torch.long), iteration=99)
    with pytest.raises(ValueError, match="steps"):
        spectral_radius(model, torch.ones(1, 3, dtype=torch.long), iteration=1, steps=0)
