"""Principal components against numpy's SVD of cached states, and loops of known shape."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from loop_lens import HookedLoopedTransformer
from loop_lens.dynamics import Trajectories, trajectories
from loop_lens.dynamics.projection import Scatter, TrajectoriesProbe
from loop_lens.measuring.moments import DivergedError
from loop_lens.measuring.run import measure
from tests.dynamics.loops import loop_of, rotation, starting_at
from tests.interventions.models import MODELS, opened, prompts, wrapped


@torch.no_grad()
def cached(model: HookedLoopedTransformer, tokens: torch.Tensor) -> Any:
    """All states [iteration layer prompt pos d_model]."""
    _, cache = model.run_with_cache(tokens)
    loop = model.schedule.innermost_loop
    rows = [
        torch.stack(
            [
                cache[model.name("resid_post", iteration=t, layer=k)]
                for k in range(model.schedule.segments[loop])
            ]
        )
        for t in model.schedule.iterations(loop)
    ]
    return torch.stack(rows).double().numpy()


def numpy_pca(cloud: Any, n: int) -> tuple[Any, Any, Any]:
    mean = cloud.mean(0)
    _, s, axes = np.linalg.svd(cloud - mean, full_matrices=False)
    return mean, axes[:n], s[:n] ** 2 / (s**2).sum()


@pytest.mark.parametrize("name", MODELS)
def test_the_last_token_of_one_prompt_against_numpy(name: str) -> None:
    model = opened(name)
    if len(model.schedule.iterations(model.schedule.innermost_loop)) < 3:
        model.set_recurrences(3)
    tokens, _ = prompts(model)
    if name != "given_state":
        tokens = tokens[:1]
    found = trajectories(model, tokens, components=2)
    x = cached(model, tokens)[..., -1, :]
    mean, axes, explained = numpy_pca(x.reshape(-1, x.shape[-1]), 2)
    assert found.explained[0].tolist() == pytest.approx(explained.tolist(), rel=1e-3)
    known = np.einsum("ilpd,cd->pilc", x - mean, axes)
    signs = np.sign((found.components[0].numpy() * axes).sum(-1))
    assert np.allclose(found.coordinates.numpy(), known * signs, atol=1e-3 * np.abs(known).max())
    assert found.prompt.tolist() == list(range(len(tokens)))


@pytest.mark.parametrize("over", ["position", "tokens"])
@pytest.mark.parametrize("fit", ["joint", "layer"])
def test_every_fit_against_numpy(over: Any, fit: Any) -> None:
    model = opened("retrofit_llama")
    model.set_recurrences(6)
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(1, 30, (n,), generator=generator) for n in (4, 6, 5)]
    found = trajectories(model, rows, fit=fit, over=over, position=-2, layers=[1, 0], batch_size=2)
    states = [cached(model, row[None])[:, :, 0] for row in rows]
    chosen = np.stack([s[:, :, -2] for s in states])  # prompt iteration layer d_model
    assert found.position.tolist() == [2, 4, 3] and found.layers == (1, 0)
    for k, layer in enumerate((1, 0)):
        layers = [0, 1] if fit == "joint" else [layer]
        if over == "tokens":
            cloud = np.concatenate([s[:, layers].reshape(-1, s.shape[-1]) for s in states])
        else:
            cloud = chosen[:, :, layers].reshape(-1, chosen.shape[-1])
        mean, axes, explained = numpy_pca(cloud, 3)
        group = 0 if fit == "joint" else k
        assert found.explained[group].tolist() == pytest.approx(explained.tolist(), rel=1e-4)
        assert found.variance[group].tolist() == pytest.approx(
            ((cloud - mean) @ axes.T).var(0, ddof=1).tolist(), rel=1e-4
        )
        known = (chosen[:, :, layer] - mean) @ axes.T
        signs = np.sign((found.components[group].numpy() * axes).sum(-1))
        assert np.allclose(found.coordinates[:, :, k].numpy(), known * signs, atol=1e-3)


def test_a_rotation_is_a_circle_and_a_translation_a_line() -> None:
    tokens = torch.tensor([[1, 2, 3]])
    model = loop_of(rotation(24, 2 * math.pi / 8), recurrences=16)
    state = starting_at(model, 1, 3)
    circle = trajectories(model, tokens, components=3)
    assert circle.explained[0].tolist() == pytest.approx([0.5, 0.5, 0], abs=1e-5)
    radius = circle.coordinates[0, :, 0, :2].norm(dim=-1)
    assert torch.allclose(radius, state[0, -1].norm().double().expand(16), rtol=1e-4)
    model = loop_of(torch.eye(24), inject=1.0)
    line = trajectories(model, tokens, components=2)
    assert line.explained[0].tolist() == pytest.approx([1, 0], abs=1e-6)
    steps = line.coordinates[0, :, 0, 0].diff()
    assert torch.allclose(steps, steps[0].expand(7), rtol=1e-3)


def test_scatter_merges_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 1000 + torch.randn(40, 5, generator=generator, dtype=torch.float64)
    merged = Scatter.of(x[:1]).merge(Scatter.of(x[1:7])).merge(Scatter.of(x[7:]))
    assert merged.count == 40
    assert np.allclose(merged.scatter.numpy() / 39, np.cov(x.numpy().T), rtol=1e-9)
    assert np.allclose(merged.mean.numpy(), x.mean(0).numpy(), rtol=1e-12)


def test_parts_that_processes_keep_merge_to_the_whole() -> None:
    model = wrapped(injection="linear", initial_state="noise", recurrences=5)
    texts = ["w1 w2 w3", "w4", "w6 w7 w8", "w9 w10 w11 w12"]

    def kept(index: slice) -> Any:
        probe = TrajectoriesProbe(model, over="tokens")
        measure(model, texts[index], [probe], batch_size=2, progress=False)
        return probe.kept()

    whole, merged = kept(slice(None)), kept(slice(0, 2)).merge(kept(slice(2, 4)))
    assert sorted(merged.position.tolist()) == sorted(whole.position.tolist())
    assert torch.allclose(merged.scatter.scatter[0], whole.scatter.scatter[0], rtol=1e-5, atol=1e-4)
    assert merged.scatter.count.tolist() == whole.scatter.count.tolist() == [15 * 5 * 2]


def test_the_table_the_pictures_and_the_file(tmp_path: Path) -> None:
    model = opened("ouro")
    model.set_recurrences(8)
    tokens, _ = prompts(model)
    found = trajectories(model, tokens, layers=[0, 2, "state"])
    table = found.to_dataframe()
    assert len(table) == 2 * 8 * 3 and table.quartile.tolist()[::3][:8] == [1, 1, 2, 2, 3, 3, 4, 4]
    row = table[(table.prompt == 1) & (table.iteration == 3) & table.layer.isna()]
    assert row.pc2.item() == float(found.coordinates[1, 3, 2, 1])
    assert len(found.plot(prompt=1).axes) == 4
    solid = found.plot(projection="3d").axes
    assert [a.name for a in solid] == ["3d"] * 4 and len(solid[0].lines) == 3
    found.save(tmp_path / "paths")
    again = Trajectories.load(tmp_path / "paths")
    pd.testing.assert_frame_equal(again.to_dataframe(), table)
    found.to_parquet(tmp_path / "paths.parquet")


def test_bad_requests() -> None:
    model = wrapped(injection="linear", initial_state="noise", recurrences=4)
    with pytest.raises(ValueError, match="position 4 does not exist in prompt 1, which has 3 tokens"):
        trajectories(model, ["w1 w2 w3 w4 w5", "w1 w2"], position=4)
    with pytest.raises(ValueError, match="layer 7 does not exist: 'loop' has layers 0-1 and 'state'"):
        trajectories(model, "w1 w2", layers=[7])
    with pytest.raises(ValueError, match="components=8 is not between 1 and 7"):
        trajectories(model, "w1 w2", components=8)
    with pytest.raises(ValueError, match="fit='each'"):
        trajectories(model, "w1 w2", fit="each")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 2 iterations"), model.at_recurrences(1):
        trajectories(model, "w1 w2")
    with pytest.raises(ValueError, match="needs 3 components, and 2 were kept"):
        trajectories(model, "w1 w2", components=2).plot(projection="3d")
    assert trajectories(model, torch.tensor([[3]])).coordinates.shape == (1, 4, 2, 3)
    blow_up = (model.name("resid_post", iteration=1, layer=1), lambda value, hook: value * math.nan)
    with model.hooks(fwd_hooks=[blow_up]), pytest.raises(DivergedError, match="iteration 1, layer 1"):
        trajectories(model, "w1 w2", over="tokens")
    assert not any(point.fwd_hooks for point in model.hook_points())
