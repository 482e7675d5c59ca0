"""Results of sweeps and paths come back from disk, and merge into those of all prompts together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from loop_lens import SweepResult, patch_sweep
from loop_lens.interventions import PathNode, PathResult, path_patch
from tests.interventions.models import difference, opened, prompts


def _sweep(model: Any, clean: Any, corrupted: Any, method: Any = "patch") -> SweepResult:
    over = ("iteration", "position")
    return patch_sweep(model, clean, corrupted, difference, site="state_out", over=over, method=method)


def _paths(model: Any, clean: Any, corrupted: Any) -> PathResult:
    senders = [PathNode("mlp_out", 0, 0), PathNode("attn_out", 0, 0)]
    return path_patch(model, clean, corrupted, difference, senders=senders)


@pytest.mark.parametrize("method", ["patch", "attribution"])
def test_parts_of_a_sweep_merge_into_the_whole(method: str, tmp_path: Path) -> None:
    model = opened("ouro")
    clean, corrupted = prompts(model, n=3)
    whole = _sweep(model, clean, corrupted, method)
    parts = [_sweep(model, clean[s], corrupted[s], method) for s in (slice(0, 2), slice(2, 3))]
    merged = parts[0].merge(parts[1])
    assert merged.n_prompts == 3 and whole.per_prompt is not None and merged.per_prompt is not None
    assert torch.allclose(merged.values, whole.values, atol=1e-5)
    assert torch.allclose(merged.per_prompt, whole.per_prompt, atol=1e-5)
    assert merged.clean == pytest.approx(whole.clean, abs=1e-5)
    whole.save(tmp_path / "s.safetensors")
    again = SweepResult.load(tmp_path / "s.safetensors")
    assert again.labels == whole.labels and again.axes == whole.axes and again.method == method
    pd.testing.assert_frame_equal(again.to_dataframe(), whole.to_dataframe())
    whole.to_parquet(tmp_path / "s.parquet")
    assert len(pd.read_parquet(tmp_path / "s.parquet")) == whole.values.numel()


def test_sweeps_of_other_cells_do_not_merge() -> None:
    model = opened("ouro")
    clean, corrupted = prompts(model)
    one = _sweep(model, clean, corrupted)
    with pytest.raises(ValueError, match="labels differ"):
        one.merge(_sweep(model, clean[:, :6], corrupted[:, :6]))
    other = patch_sweep(
        model, clean, corrupted, lambda x: difference(x).mean(), site="state_out", over="iteration"
    )
    with pytest.raises(ValueError, match="axes"):
        one.merge(other)
    with pytest.raises(ValueError, match="one number"):
        other.merge(other)


def test_paths_merge_and_come_back(tmp_path: Path) -> None:
    model = opened("ouro")
    clean, corrupted = prompts(model, n=3)
    whole = _paths(model, clean, corrupted)
    merged = _paths(model, clean[:1], corrupted[:1]).merge(_paths(model, clean[1:], corrupted[1:]))
    assert torch.allclose(merged.values, whole.values, atol=1e-5)
    whole.save(tmp_path / "p.safetensors")
    pd.testing.assert_frame_equal(
        PathResult.load(tmp_path / "p.safetensors").to_dataframe(), whole.to_dataframe()
    )
