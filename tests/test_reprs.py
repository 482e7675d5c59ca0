"""What a notebook shows of a result fits a screen, and says what it is."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pandas as pd
import pytest
import torch

import loop_lens
from loop_lens import dynamics, lenses, stages
from loop_lens.measuring.results import Result, _subclasses
from tests.interventions.models import difference, opened, prompts


@pytest.mark.parametrize("name", ["huginn", "hrm_text"])
def test_results_fit_a_screen(name: str) -> None:
    model = opened(name)
    model.set_recurrences(12)
    clean, corrupted = prompts(model)
    found: list[Result] = [
        loop_lens.lens(model, clean, targets=[3, 4], keep_logits=True),
        loop_lens.attribute(model, clean, target=3),
        loop_lens.patch_sweep(model, clean, corrupted, difference, site="resid_pre", layers=0),
        lenses.find_exits(model, clean, rule="kl"),
        dynamics.convergence(model, clean, progress=False),
        dynamics.step_geometry(model, clean, progress=False),
        stages.stages(model, clean, progress=False),
    ]
    for result in found:
        text = repr(result)
        lines = text.splitlines()
        assert text == str(result) and len(lines) <= 30 and max(map(len, lines)) <= 100
        assert lines[0] == f"{type(result).__name__}(" and len(lines) == 2 + len(fields(result))  # type: ignore[arg-type]
    assert f"top_ids=int64 {list(found[0].top_ids.shape)}" in repr(found[0])  # type: ignore[attr-defined]


def test_every_class_of_results_has_it() -> None:
    kinds: list[Any] = _subclasses(Result)
    assert len(kinds) > 10
    assert all(kind.__repr__ is Result.__repr__ for kind in kinds)


def test_numbers_are_shown() -> None:
    result = lenses.ExitResult("kl", 0.5, *[torch.zeros(1, 2)] * 5)
    assert repr(result).splitlines()[1:4] == ["  rule='kl'", "  threshold=0.5", "  iterations=float32 [1, 2]"]


def test_tables_of_nested_loops_go_to_parquet(tmp_path: Any) -> None:
    model = opened("hrm_text")
    clean, corrupted = prompts(model)
    found: list[Result] = [
        loop_lens.lens(model, clean),
        loop_lens.attribute(model, clean, target=3),
        loop_lens.patch_sweep(model, clean, corrupted, difference, site="state_out", over="iteration"),
        dynamics.firing_similarity(model, clean, progress=False),
        dynamics.convergence(model, clean, progress=False),
        stages.stages(model, clean, progress=False),
    ]
    for result in found:
        table = result.to_dataframe()
        table.to_parquet(tmp_path / "table.parquet", index=False)
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), table, check_dtype=False)
        if "iteration" in table:
            assert "1.0" in set(table["iteration"])
