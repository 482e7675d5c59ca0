"""Jacobians of an iteration: closed forms, finite differences, and whole matrices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loop_lens import HookedLoopedTransformer, UnknownNameError
from loop_lens.dynamics import JacobianSpectrum, jacobian_spectrum, spectral_radius
from loop_lens.dynamics.krylov import largest_eigenvalue, largest_singular_value
from loop_lens.dynamics.linearised import IterationMap
from loop_lens.measuring.moments import DivergedError
from loop_lens.unrolling.tree import Iteration
from tests.dynamics.loops import loop_of, rotation
from tests.interventions.models import MODELS, opened, prompts


def test_krylov_against_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(4, 12, 12, generator=generator, dtype=torch.float64)
    matrices[1] = torch.outer(matrices[1, 0], matrices[1, 1])  # of rank one: the Krylov space is spent early
    matrices[2] = 0

    def product(v: Tensor) -> Tensor:
        return torch.einsum("rij,rj->ri", matrices, v)

    def transposed(v: Tensor) -> Tensor:
        return torch.einsum("rji,rj->ri", matrices, v)

    values = [float(np.abs(np.linalg.eigvals(m)).max()) for m in matrices.numpy()]
    found = largest_eigenvalue(product, 4, 12, steps=12, seed=0)
    assert found.value.tolist() == pytest.approx(values, abs=1e-8)
    assert float(found.error.max()) < 1e-8
    stretches = [float(np.linalg.svd(m, compute_uv=False)[0]) for m in matrices.numpy()]
    for steps in (12, 8):
        most = largest_singular_value(product, transposed, 4, 12, steps=steps, seed=0)
        off = (most.value - torch.tensor(stretches, dtype=torch.float64)).abs()
        assert bool((off <= most.error + 1e-8).all())
        assert float(off.max()) < (1e-8 if steps == 12 else 0.05)
    few = largest_eigenvalue(product, 4, 12, steps=3, seed=0)
    assert float(few.error[0]) > 1e-2 > float(few.error[1])


def test_a_linear_loop_in_closed_form() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(24, 24, generator=generator) / 24**0.5
    model = loop_of(matrix, inject=1.0, recurrences=3)
    radius = float(np.abs(np.linalg.eigvals(matrix.numpy())).max())
    stretch = float(np.linalg.svd(matrix.numpy(), compute_uv=False)[0])
    found = jacobian_spectrum(model, "w1 w2 w3", iterations=[1], steps=60)
    assert found.singular_value.item() == pytest.approx(stretch, rel=1e-4)
    for positions in (None, "all"):
        found = jacobian_spectrum(model, "w1 w2 w3", positions=positions, steps=24)  # type: ignore[arg-type]
        assert torch.allclose(found.radius, torch.tensor(radius, dtype=torch.float64), rtol=2e-2)
        assert torch.allclose(found.singular_value, torch.tensor(stretch, dtype=torch.float64), rtol=2e-2)
    assert found.radius.shape == (3, 1, 4)
    assert torch.allclose(found.radius, torch.tensor(radius, dtype=torch.float64), rtol=1e-4)


def test_a_rotation_keeps_every_length() -> None:
    model = loop_of(rotation(24, 0.6, scale=0.9))
    found = jacobian_spectrum(model, "w1 w2", iterations=[2], steps=20)
    assert found.singular_value.item() == pytest.approx(0.9, rel=1e-5)
    assert spectral_radius(model, "w1 w2", iteration=2) == pytest.approx(0.9, rel=1e-5)


def mapped(model: HookedLoopedTransformer, tokens: Tensor, t: Iteration, segment: str) -> tuple[Tensor, Any]:
    """A state, and one iteration as a function of it."""
    start = model.name("state_in", iteration=t, segment=segment)
    end = model.name("state_out", iteration=t, segment=segment)

    def step(state: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hooks: list[Any] = [
            (start, lambda value, hook: state.to(value)),
            (end, lambda value, hook: seen.append(value)),
        ]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        return seen[0]

    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=start)
    return cache[start], step


@pytest.mark.parametrize("name", MODELS)
def test_products_against_finite_differences(name: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model)
    generator = torch.Generator().manual_seed(2)
    places = [(loop, model.schedule.iterations(loop)[k]) for loop in model.schedule.loops for k in (0, -1)]
    for segment, t in places:
        base, step = mapped(model, tokens, t, segment)
        v, u = torch.randn(2, *base.shape, generator=generator)
        with torch.no_grad():
            h = 2e-3 * float(base.square().mean().sqrt().clamp_min(1e-2))
            moved = (step(base + h * v) - step(base - h * v)) / (2 * h)
        one = IterationMap(model, tokens, iteration=t, segment=segment)
        product = one.jvp(v.flatten(1)).view_as(base).float()
        assert float((product - moved).norm()) < 2e-2 * float(moved.norm())
        back = one.vjp(u.flatten(1)).view_as(base).float()
        assert float((back * v).sum()) == pytest.approx(float((u * product).sum()), rel=1e-3, abs=1e-3)
    assert not any(point.fwd_hooks for point in model.registry.existing())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["huginn", "hrm_text", "looped_llama"])
def test_tokens_are_the_diagonal_blocks_of_the_whole_jacobian(name: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model, length=3)
    t = model.schedule.iterations(model.schedule.innermost_loop)[1]
    found = jacobian_spectrum(model, tokens, iterations=[t], positions="all", steps=99, batch_size=4)
    whole = jacobian_spectrum(model, tokens, iterations=[t], steps=20)
    base, step = mapped(model, tokens[1:], t, model.schedule.innermost_loop)
    jacobian: Any = torch.autograd.functional.jacobian(step, base)
    matrix = jacobian.reshape(base.numel(), -1).double().numpy()
    stretch = float(np.linalg.svd(matrix, compute_uv=False)[0])
    assert float(whole.singular_value[0, 1, 0]) == pytest.approx(stretch, rel=1e-3)
    for k in range(3):
        block = jacobian[0, k, :, 0, k].double().numpy()
        radius = float(np.abs(np.linalg.eigvals(block)).max())
        assert float(found.radius[0, 1, k]) == pytest.approx(radius, rel=1e-3)
        stretch = float(np.linalg.svd(block, compute_uv=False)[0])
        assert float(found.singular_value[0, 1, k]) == pytest.approx(stretch, rel=1e-3)


def test_a_given_state_is_where_the_jacobian_is_taken() -> None:
    model = opened("huginn")
    tokens, _ = prompts(model, n=1, length=3)
    base, _ = mapped(model, tokens, 2, "loop")
    there = spectral_radius(model, tokens, iteration=0, state=base, steps=30)
    assert there == pytest.approx(spectral_radius(model, tokens, iteration=2, steps=30), rel=1e-5)
    assert abs(there - spectral_radius(model, tokens, iteration=0, steps=30)) > 1e-3


def test_the_table_the_picture_and_the_file(tmp_path: Path) -> None:
    model = opened("hrm_text")
    tokens, _ = prompts(model, length=3)
    found = jacobian_spectrum(model, tokens, positions=[0, -1], steps=5)
    assert found.positions == (0, 2) and found.radius.shape == (6, 2, 2)
    table = found.to_dataframe()
    row = table[(table.iteration == "1.0") & (table.prompt == 1) & (table.position == 2)]
    assert row.radius.item() == float(found.radius[3, 1, 1])
    assert len(found.plot().axes[0].lines) == 3
    found.save(tmp_path / "spectrum")
    again = JacobianSpectrum.load(tmp_path / "spectrum")
    assert torch.equal(again.singular_value, found.singular_value)
    assert again.to_dataframe().equals(table) and again.positions == found.positions
    found.to_parquet(tmp_path / "spectrum.parquet")


def test_prompts_of_several_lengths_are_as_alone() -> None:
    model = opened("huginn")
    texts = [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6, 7, 8]), torch.tensor([9, 8, 7])]
    last = model.recurrences - 1
    together = spectral_radius(model, texts, iteration=last, steps=200)
    alone = [spectral_radius(model, each, iteration=last, steps=200).item() for each in texts]
    assert together.tolist() == pytest.approx(alone, rel=1e-3)
    found = jacobian_spectrum(model, texts, iterations=[last], positions=[0, -1], steps=99)
    assert found.positions == (0, 2, 4)
    assert found.radius[0].isnan().tolist() == [
        [False, False, True],
        [False, True, False],
        [False, False, True],
    ]
    single = jacobian_spectrum(model, texts[1], iterations=[last], positions=[-1], steps=99)
    assert found.singular_value[0, 1, 2].item() == pytest.approx(single.singular_value.item(), rel=1e-3)
    assert len(found.to_dataframe()) == 6 and len(found.plot().axes[0].lines) == 3
    parts = [jacobian_spectrum(model, each, iterations=[last], steps=9) for each in texts]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.radius[0, :, 0].tolist() == [part.radius.item() for part in parts]


def test_rows_keep_their_own_initial_state() -> None:
    model = opened("huginn")
    tokens, _ = prompts(model, length=3)
    model.initial_state = torch.randn(2, 3, model.cfg.d_model, generator=torch.Generator().manual_seed(3))
    found = jacobian_spectrum(model, tokens, iterations=[0], positions="all", steps=99, batch_size=2)
    model.initial_state = model.initial_state[1:]
    alone = jacobian_spectrum(model, tokens[1], iterations=[0], positions="all", steps=99)
    assert torch.allclose(found.radius[:, 1:], alone.radius, rtol=1e-4)


def test_bad_requests() -> None:
    model = opened("huginn")
    tokens, _ = prompts(model, length=3)
    with pytest.raises(UnknownNameError, match="iteration 99"):
        jacobian_spectrum(model, tokens, iterations=[99])
    with pytest.raises(ValueError, match="position 3 does not exist: there are positions 0-2"):
        jacobian_spectrum(model, tokens, positions=[3])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        jacobian_spectrum(model, tokens, steps=0)
    with pytest.raises(ValueError, match="state has shape"):
        spectral_radius(model, tokens, iteration=0, state=torch.zeros(1, 3, 64))
    blow_up = (model.name("state_out", iteration=1), lambda value, hook: value * math.nan)
    with model.hooks(fwd_hooks=[blow_up]), pytest.raises(DivergedError, match="first in iteration 1"):
        spectral_radius(model, tokens, iteration=3)
    with pytest.raises(DivergedError, match="the given state"):
        spectral_radius(model, tokens, iteration=0, state=torch.full((2, 3, 64), math.inf))
