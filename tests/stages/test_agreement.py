"""Agreement of stages: curves known in closed form, and models that agree by construction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import loop_lens
from loop_lens.measuring.moments import Moments
from loop_lens.stages import StageAgreement, Stages, stage_agreement, stages
from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.tree import Blocks, Loop, Segments
from tests.oracles.unrolled import decoder
from tests.stages.models import feed_forward


def made(schedule: Schedule, values: Any) -> Stages:
    """Stages with given means of one metric at each firing."""
    n = len(schedule)
    total = torch.as_tensor(values, dtype=torch.float64).reshape(1, n)
    one = torch.ones(1, n, dtype=torch.float64)
    axes = {"firing": tuple(f.prefix for f in schedule)}
    moments = Moments(axes, ("matrix_entropy",), torch.stack([one, total, total**2] * 2))
    places = tuple((f.segment, f.iteration, f.layer, f.block) for f in schedule)
    return Stages(places, 0.3, 0, moments, None)


def looping(times: int, core: int, prelude: int = 0, coda: int = 0) -> Schedule:
    return Schedule(
        Segments(Blocks("prelude", prelude), Loop("loop", times, Blocks("core", core)), Blocks("coda", coda))
    )


def plain(n: int) -> Schedule:
    return Schedule(Segments(Blocks("blocks", n)))


def test_curves_in_closed_form() -> None:
    depths = np.arange(1, 9) / 8  # eight firings a recurrence, of which the reference has as many
    reference = made(plain(8), depths**2)
    same, offset, opposite, flat = depths**2, depths**2 + 0.5, -(depths**2), np.full(8, 0.2)
    looped = made(looping(4, 8), np.concatenate([same, offset, opposite, flat]))
    found = stage_agreement(looped, reference)
    assert found.correlation[0, :3].tolist() == pytest.approx([1, 1, -1])
    assert found.rank_correlation[0, :3].tolist() == pytest.approx([1, 1, -1])
    assert found.correlation[0, 3].isnan() and found.rank_correlation[0, 3].isnan()
    assert found.rmse[0, :2].tolist() == pytest.approx([0, 0.5], abs=1e-12)
    grid = np.interp(np.linspace(12.5, 100, 50), 100 * depths, depths**2)
    assert found.relative_rmse[0, 1].item() == pytest.approx(0.5 / grid.std())
    assert found.rmse[0, 3].item() == pytest.approx(np.sqrt(np.mean((grid - 0.2) ** 2)))


def test_depth_is_of_the_model_or_of_the_block() -> None:
    curve = np.sin(np.arange(12))
    reference = made(plain(12), curve)
    # The loop is the reference's middle: blocks 4-7 of 12.
    middle = made(looping(2, 4, prelude=4, coda=4), np.concatenate([curve[:8], curve[4:8], curve[8:]]))
    assert stage_agreement(middle, reference).rmse[0].tolist() == pytest.approx([0, 0], abs=1e-12)
    assert (stage_agreement(middle, reference, span="block").rmse > 0.1).all()
    # The loop repeats all of the reference, at a third of its resolution.
    third = made(looping(2, 4, prelude=1), np.concatenate([[9.0], curve[2::3], curve[2::3]]))
    found = stage_agreement(third, reference, span="block", points=4)
    assert found.rmse[0].tolist() == pytest.approx([0, 0], abs=1e-12)
    assert not stage_agreement(third, reference, points=4).rmse[0].isclose(torch.tensor(0.0).double()).any()


def test_a_loop_that_runs_once_is_its_feed_forward_model() -> None:
    tokens = torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    looped = stages(loop_lens.loopify(decoder("llama"), layers=[1, 2, 3], times=1), tokens)
    found = stage_agreement(looped, stages(feed_forward("llama"), tokens))
    assert found.metrics == looped.metrics
    assert found.rmse[:, 0].tolist() == pytest.approx([0] * len(found.metrics), abs=1e-5)
    moving = found.relative_rmse[:, 0].isfinite()
    assert torch.allclose(found.correlation[moving, 0], torch.ones(int(moving.sum())).double(), atol=1e-6)


def test_short_loops_have_no_correlation() -> None:
    found = stage_agreement(made(looping(2, 1, coda=3), np.arange(5.0)), made(plain(4), np.arange(4.0)))
    assert found.correlation.isnan().all() and found.rmse[0].tolist() == pytest.approx([0, 1])


def test_table_plot_and_disk(tmp_path: Path) -> None:
    looped, reference = made(looping(3, 4), np.arange(12.0) % 5), made(plain(6), np.arange(6.0))
    found = stage_agreement(looped, reference)
    table = found.to_dataframe()
    assert table["recurrence"].tolist() == [0, 1, 2] and table["metric"].unique().tolist() == [
        "matrix_entropy"
    ]
    assert found.plot("rmse").axes[0].lines[0].get_ydata().tolist() == table["rmse"].tolist()
    found.save(tmp_path / "found")
    pd.testing.assert_frame_equal(StageAgreement.load(tmp_path / "found").to_dataframe(), table)


def test_bad_requests() -> None:
    looped, reference = made(looping(2, 3), np.arange(6)), made(plain(3), np.arange(3))
    with pytest.raises(ValueError, match="without a loop"):
        stage_agreement(reference, reference)
    with pytest.raises(ValueError, match="reference has a loop"):
        stage_agreement(looped, looped)
    with pytest.raises(ValueError, match="at least 3"):
        stage_agreement(looped, reference, points=2)
    with pytest.raises(ValueError, match="no metric to compare"):
        stage_agreement(looped, reference, metrics=[])
    with pytest.raises(ValueError, match="metric 'mixing_score' is unknown"):
        stage_agreement(looped, reference, metrics=["mixing_score"])
    with pytest.raises(ValueError, match="span='all' is unknown"):
        stage_agreement(looped, reference, span="all")  # type: ignore[arg-type]
