"""Path independence: loops that forget their start, loops that do not, and runs by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loop_lens import HookedLoopedTransformer
from loop_lens.dynamics import PathIndependence, path_independence
from loop_lens.measuring.moments import DivergedError
from tests.dynamics.loops import loop_of, rotation
from tests.interventions.models import MODELS, opened, prompts, wrapped

TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def random_starts(n: int, length: int, d: int) -> Tensor:
    return torch.randn(n, length, d, generator=torch.Generator().manual_seed(4))


def test_a_contraction_forgets_its_start_at_its_rate() -> None:
    model = loop_of(0.5 * torch.eye(24), inject=1.0, recurrences=20)
    starts = random_starts(3, 3, 24)
    found = path_independence(model, TOKENS, starts=starts)
    assert found.starts == ("own", "given 0", "given 1", "given 2")
    distance = found.pairs.mean("distance")
    between = [(starts[a] - starts[b]).norm(dim=-1).mean() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert distance[0, 3:].tolist() == pytest.approx([float(x) / 2 for x in between], rel=1e-4)
    ratio = distance[1:8] / distance[:7]
    assert torch.allclose(ratio, torch.full_like(ratio, 0.5), rtol=1e-3)
    assert found.alignment == pytest.approx(1, abs=1e-5) and found.worst == pytest.approx(1, abs=1e-5)


def test_a_rotation_never_forgets() -> None:
    model = loop_of(rotation(24, 0.5), recurrences=9)
    starts = random_starts(2, 3, 24)
    found = path_independence(model, TOKENS, starts=starts)
    known = float(torch.cosine_similarity(starts[0], starts[1], dim=-1).mean())
    assert found.pairs.mean("cosine")[:, 2].tolist() == pytest.approx([known] * 9, abs=1e-5)
    assert found.pairs.axes["pair"][2] == "given 0 / given 1"


def states_by_hand(model: HookedLoopedTransformer, tokens: Tensor, start: Tensor | None) -> Tensor:
    """The states that leave each iteration [iteration prompt pos d_model], from a start."""
    loop = model.schedule.innermost_loop
    its = model.schedule.iterations(loop)
    seen: list[Tensor] = []
    hooks: list[Any] = [
        (model.name("state_out", iteration=t), lambda value, hook: seen.append(value)) for t in its
    ]
    if start is not None:
        hooks.append((model.name("state_in", iteration=its[0]), lambda value, hook: start.expand_as(value)))
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    return torch.stack(seen)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_against_runs_by_hand(name: str) -> None:
    model = opened(name)
    tokens, other = prompts(model, length=7)
    starts = random_starts(2, 8, model.cfg.d_model)
    if name == "given_state":  # one state per prompt fits no other prompt
        found = path_independence(model, tokens, starts=starts)
        third = starts[1:, :7]
    else:
        found = path_independence(model, tokens, starts=starts[:1], others=other[:1])
        third = states_by_hand(model, other[:1], None)[-1]
    runs = [states_by_hand(model, tokens, start) for start in (None, starts[:1, :7], third)]
    worst = torch.stack(
        [torch.cosine_similarity(runs[a], runs[b], dim=-1) for a, b in ((0, 1), (0, 2), (1, 2))]
    )
    assert torch.allclose(found.pairs.mean("cosine").float(), worst.mean((2, 3)).T, atol=2e-4)
    i = found.positions.metrics.index("worst_cosine")
    by_position = (found.positions.total[i] / found.positions.count[i]).float()
    assert torch.allclose(by_position, worst.amin(0).mean(1), atol=2e-4)
    assert found.worst == pytest.approx(float(worst.amin(0)[-1].mean()), abs=2e-4)


@torch.no_grad()
def test_seeds_are_the_models_own_noise() -> None:
    model = opened("huginn")
    tokens, _ = prompts(model)
    found = path_independence(model, tokens, starts=2)
    assert found.starts == ("own", "seed 1", "seed 2") and model.initial_state == 0
    runs: list[Tensor] = []
    for seed in (0, 1, 2):
        model.initial_state = seed
        runs.append(states_by_hand(model, tokens, None))
    distances = [(runs[a] - runs[b]).norm(dim=-1) for a, b in ((0, 1), (0, 2), (1, 2))]
    known = torch.stack([d.mean((1, 2)) for d in distances], 1)
    assert torch.allclose(found.pairs.mean("distance").float(), known, rtol=1e-4)
    again = path_independence(model, tokens, starts=(5,))
    assert again.starts == ("own", "seed 5")


def test_parts_merge_exactly_and_lengths_may_differ(tmp_path: Path) -> None:
    model = wrapped(injection="linear", initial_state="noise", recurrences=5)
    texts = ["w1 w2 w3", "w4", "w6 w7 w8", "w9 w10 w11 w12"]
    whole = path_independence(model, texts)
    parts = [path_independence(model, texts[i::2], batch_size=1) for i in (0, 1)]
    merged = parts[0].merge(parts[1])
    assert torch.allclose(merged.pairs.mean("cosine"), whole.pairs.mean("cosine"), atol=1e-6)
    assert torch.equal(merged.positions.count, whole.positions.count)
    assert whole.positions.count[0, 0].tolist() == [4, 4, 3, 3, 1]
    assert torch.allclose(merged.positions.total, whole.positions.total, rtol=1e-5)
    whole.save(tmp_path / "paths")
    assert PathIndependence.load(tmp_path / "paths").alignment == whole.alignment
    assert len(whole.to_dataframe()) == 5 * 6 and len(whole.plot().axes[0].lines) == 6


def test_bad_requests() -> None:
    model = opened("ouro")
    with pytest.raises(ValueError, match="has no noise to seed: give starts as a tensor"):
        path_independence(model, TOKENS)
    with pytest.raises(ValueError, match="'given 0' has 2 positions, and prompt 1 has 3 tokens"):
        path_independence(model, TOKENS, starts=torch.zeros(1, 2, 64))
    with pytest.raises(ValueError, match=r"states are \[start pos d_model=64\]"):
        path_independence(model, TOKENS, starts=torch.zeros(2, 64))
    with pytest.raises(ValueError, match="nothing to compare"):
        path_independence(model, TOKENS, starts=0)
    blow_up = (model.name("state_out", iteration=2), lambda value, hook: value * math.nan)
    with model.hooks(fwd_hooks=[blow_up]), pytest.raises(DivergedError, match="first at iteration 2"):
        path_independence(model, TOKENS, starts=torch.zeros(1, 3, 64))
    assert not any(point.fwd_hooks for point in model.hook_points())
