"""Loops whose states are huge, tiny, zero, in float64, or not finite in the end: closed forms of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from loop_lens import HookedLoopedTransformer
from loop_lens.dynamics import (
    attention_bound,
    attention_settling,
    convergence,
    extrapolate,
    firing_similarity,
    limit_table,
    path_independence,
    spectral_radius,
    step_geometry,
    trajectories,
)
from loop_lens.measuring.moments import DivergedError
from loop_lens.measuring.vectors import cosines, lengths
from loop_lens.stages import anisotropy, stages
from tests.dynamics.loops import loop_of, starting_at

TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
MEASURES: dict[str, Callable[[Any], Any]] = {
    "convergence": lambda m: convergence(m, TOKENS),
    "attention_settling": lambda m: attention_settling(m, TOKENS),
    "attention_bound": lambda m: attention_bound(m, TOKENS),
    "firing_similarity": lambda m: firing_similarity(m, TOKENS),
    "limit_table": lambda m: limit_table(m, TOKENS),
    "path_independence": lambda m: path_independence(m, TOKENS, starts=torch.ones(1, 3, 24)),
    "step_geometry": lambda m: step_geometry(m, TOKENS),
    "trajectories": lambda m: trajectories(m, TOKENS),
    "extrapolate": lambda m: extrapolate(m, TOKENS, recurrences=(1, 4, m.recurrences)),
    "stages": lambda m: stages(m, TOKENS),
    "spectral_radius": lambda m: spectral_radius(m, TOKENS, iteration=m.recurrences - 1, steps=2),
}
REFERRING: dict[str, Callable[[Any], Any]] = {
    "convergence": lambda m: convergence(m, TOKENS, reference=45),
    "attention_settling": lambda m: attention_settling(m, TOKENS, reference=45),
    "limit_table": lambda m: limit_table(m, TOKENS, reference=45),
}


def growing(recurrences: int, *, factor: float = 10.0) -> HookedLoopedTransformer:
    """Iteration t ends in states whose entries are factor^(t + 1), of either sign."""
    model = loop_of(factor * torch.eye(24), recurrences=recurrences)
    model.initial_state = starting_at(model, 2, 3).sign()
    return model


@pytest.mark.parametrize("name", MEASURES)
def test_the_first_iteration_that_is_not_finite_is_named(name: str) -> None:
    model = growing(45)  # 1e38 leaves iteration 37, and float32 ends at 3.4e38
    with pytest.raises(DivergedError, match=r"first (at|in) (loop )?iteration 38\b"):
        MEASURES[name](model)
    assert not any(point.fwd_hooks for point in model.hook_points())


@pytest.mark.parametrize("name", REFERRING)
def test_a_reference_run_that_is_not_finite_is_named_as_such(name: str) -> None:
    with pytest.raises(DivergedError, match=r"reference run of 45 iterations, first at iteration 38\b"):
        REFERRING[name](growing(10))


@pytest.mark.parametrize("name", MEASURES)
def test_finite_states_are_measured_whatever_their_size(name: str) -> None:
    for model in (growing(36), growing(36, factor=0.1)):
        MEASURES[name](model)


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_lengths_and_cosines_of_huge_and_tiny_states(factor: float) -> None:
    model = growing(36, factor=factor)
    length = 24**0.5 * torch.tensor(factor, dtype=torch.float64) ** torch.arange(1.0, 37.0).double()
    step = length[1:] * abs(1 - 1 / factor)
    found = convergence(model, TOKENS, reference=36, patterns=False)
    assert torch.allclose(found.mean("norm")[:, 0], length, rtol=1e-5)
    assert torch.allclose(found.mean("step")[1:, 0], step, rtol=1e-5)
    for metric, known in (("cosine", 1.0), ("step_cosine", 1.0), ("relative_step", abs(1 - 1 / factor))):
        assert found.mean(metric)[1:, 0].tolist() == pytest.approx([known] * 35, rel=1e-5), metric
    turns = step_geometry(model, TOKENS)
    assert turns.mean("contraction")[2:].flatten().tolist() == pytest.approx([factor] * 68, rel=1e-5)
    assert turns.mean("step_angle")[2:].flatten().tolist() == pytest.approx([0.0] * 68, abs=1e-3)
    pairs = firing_similarity(model, TOKENS, segment="loop", metrics=("cosine",)).mean("cosine")
    assert torch.allclose(pairs, torch.ones_like(pairs), rtol=1e-6)
    ends = path_independence(model, TOKENS, starts=torch.ones(1, 3, 24)).pairs.mean("cosine")
    assert torch.allclose(ends, ends[0, 0].expand_as(ends), rtol=1e-5)
    norms = stages(model, TOKENS).mean("norm")[1:-1]
    assert torch.allclose(norms, length, rtol=1e-5)
    assert limit_table(model, TOKENS).counts[0, 0, 0].tolist() == [[6, 0, 0, 0]] * 2


def in_float64(model: HookedLoopedTransformer) -> HookedLoopedTransformer:
    model = model.to(torch.float64)
    model.initial_state = model.initial_state.double()
    return model


def test_float64_states_are_measured_in_float64() -> None:
    model = in_float64(growing(40, factor=0.4))
    model.initial_state = model.initial_state + 1.0  # entries 0 and 2: nothing is exact by chance
    found = convergence(model, TOKENS, reference=40, patterns=False)
    eps = torch.finfo(torch.float64).eps
    assert torch.allclose(found.mean("floor") / found.mean("norm"), torch.tensor(eps).double(), rtol=1e-9)
    with model.hooks(fwd_hooks=[(n, lambda v, hook: v + 1e5) for n in model.names("resid_post", layer=0)]):
        offset = convergence(model, TOKENS, patterns=False)  # steps beside a large constant part
        turns = step_geometry(model, TOKENS)
        limits = limit_table(model, TOKENS, of="norm", tau=1e-9)
        ways = trajectories(model, TOKENS, components=1)
        starts = path_independence(model, TOKENS, starts=model.initial_state[:1] / 2)
        pairs = firing_similarity(model, TOKENS, segment="loop", metrics=("cosine",))
        away = 1 - pairs.mean("cosine")[0, -1]
    step = offset.mean("step")[2:20, 0]
    assert torch.allclose(step[1:] / step[:-1], torch.full((17,), 0.4).double(), rtol=1e-6)
    assert turns.mean("contraction")[3:20, 0].tolist() == pytest.approx([0.4] * 17, rel=1e-6)
    assert limits.counts[0, 0, 0, 0].tolist()[0] == 0  # no step is below 1e-9 long before the end
    moved = ways.coordinates[0, :, 0, 0].diff().abs()
    assert torch.allclose(moved[2:18] / moved[1:17], torch.full((16,), 0.4).double(), rtol=1e-5)
    apart = starts.pairs.mean("distance")[:10, 0]
    assert torch.allclose(apart[1:] / apart[:-1], torch.full((9,), 0.4).double(), rtol=1e-6)
    assert 0 < float(away) < 1e-8


def test_lengths_beyond_what_float64_can_square() -> None:
    huge = torch.tensor([[3e200, 4e200], [3e-200, 4e-200]], dtype=torch.float64)
    assert lengths(huge).tolist() == pytest.approx([5e200, 5e-200], rel=1e-12)
    assert cosines(huge, huge.flip(1)).tolist() == pytest.approx([0.96, 0.96], rel=1e-12)
    diagonal = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    for size in (1e200, 1e-200):
        assert anisotropy(size * diagonal).item() == pytest.approx(0.9, rel=1e-12)


def test_what_a_vector_of_zeros_leaves_undefined_is_left_out_of_means() -> None:
    model = growing(8, factor=0.5)
    model.initial_state[0, 1] = 0  # of six tokens, one stays at zero
    found = convergence(model, TOKENS, reference=8, patterns=False)
    for metric, n in (("norm", 6), ("step", 6), ("relative_step", 5), ("step_cosine", 5), ("cosine", 5)):
        assert int(found.moments.count[found.metrics.index(metric), 3, 0]) == n, metric
    assert found.mean("cosine")[3, 0].item() == pytest.approx(1.0)
    assert found.mean("relative_step")[3, 0].item() == pytest.approx(1.0)
    turns = step_geometry(model, TOKENS)
    assert int(turns.moments.count[turns.metrics.index("drift_to_loop"), 3, 0]) == 5
    assert turns.mean("drift_to_loop")[3, 0].item() == pytest.approx(1.0)
    pairs = firing_similarity(model, TOKENS, segment="loop", metrics=("cosine",))
    assert torch.allclose(pairs.mean("cosine"), torch.ones(8, 8).double())
    assert pairs.residual is not None and pairs.residual.count.unique().tolist() == [5.0]
    assert limit_table(model, TOKENS).counts[0, 0, 0].sum(-1).tolist() == [5, 5]
    starts = path_independence(model, TOKENS, starts=torch.ones(1, 3, 24))
    assert int(starts.pairs.count[0, 3, 0]) == 5 and int(starts.positions.count[0, 3].sum()) == 5
    model.initial_state = torch.zeros(2, 3, 24)
    assert convergence(model, TOKENS, patterns=False).mean("step_cosine")[1:].isnan().all()
    assert math.isnan(float(stages(model, TOKENS).mean("matrix_entropy")[1]))
