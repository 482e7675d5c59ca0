"""Local dynamics in closed form, and against the cache."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from loop_lens.dynamics import StepGeometry, step_geometry
from loop_lens.measuring.moments import DivergedError
from tests.dynamics.loops import loop_of, rotation, starting_at
from tests.interventions.models import MODELS, opened, prompts, wrapped

TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def values(found: StepGeometry, metric: str, first: int = 2) -> list[float]:
    return found.mean(metric)[first:, -1].tolist()


def test_a_contraction_shrinks_straight_on() -> None:
    model = loop_of(0.5 * torch.eye(24), inject=1.0, recurrences=7)
    starting_at(model, 2, 3)
    found = step_geometry(model, TOKENS)
    steps = found.mean("step")[:, -1]
    assert values(found, "contraction") == pytest.approx([0.5] * 5, rel=1e-3)
    assert values(found, "step_angle") == pytest.approx([0] * 5, abs=3e-3)
    assert values(found, "acceleration") == pytest.approx((steps[1:-1] / 2).tolist(), rel=1e-3)
    assert values(found, "drift_to_loop", 1) == pytest.approx([1] * 6, rel=1e-4)
    assert steps[0].isnan() and found.mean("contraction")[:2].isnan().all()


def test_a_rotation_turns_by_its_angle_and_drifts_along_a_chord() -> None:
    angle = 0.4
    model = loop_of(rotation(24, angle), recurrences=30)
    state = starting_at(model, 2, 3)
    found = step_geometry(model, TOKENS)
    assert values(found, "contraction") == pytest.approx([1] * 28, rel=1e-3)
    assert values(found, "step_angle") == pytest.approx([angle] * 28, rel=1e-2)
    step = 2 * math.sin(angle / 2) * float(state.norm(dim=-1).mean())
    assert values(found, "step", 1) == pytest.approx([step] * 29, rel=1e-3)
    assert values(found, "acceleration") == pytest.approx([2 * math.sin(angle / 2) * step] * 28, rel=1e-2)
    chords = [abs(math.sin(t * angle / 2)) / (t * math.sin(angle / 2)) for t in range(1, 30)]
    assert values(found, "drift_to_loop", 1) == pytest.approx(chords, rel=1e-3, abs=1e-4)


def test_a_translation_keeps_its_pace() -> None:
    model = loop_of(torch.eye(24), inject=1.0)
    found = step_geometry(model, TOKENS)
    for metric, known in (("contraction", 1), ("step_angle", 0), ("acceleration", 0), ("drift_to_loop", 1)):
        assert values(found, metric) == pytest.approx([known] * 6, abs=5e-3)


def test_steps_as_small_as_rounding_do_not_count() -> None:
    model = loop_of(0.1 * torch.eye(24), inject=1.0, recurrences=20)
    starting_at(model, 2, 3)
    found = step_geometry(model, TOKENS)
    resolved = values(found, "resolved")
    assert resolved[0] == 1 and resolved[-1] == 0
    measured = [v for v in values(found, "contraction") if not math.isnan(v)]
    assert 3 < len(measured) < 10 and measured[:3] == pytest.approx([0.1] * 3, rel=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in MODELS if name != "looped_mistral"])
def test_against_the_cache(name: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model)
    found = step_geometry(model, tokens)
    _, cache = model.run_with_cache(tokens)
    loop = model.schedule.innermost_loop
    for column, layer in enumerate(found.layers):
        site = ("state_out", None) if layer == "state" else ("resid_post", layer)
        states = [cache[model.name(site[0], iteration=t, layer=site[1])] for t in found.iterations]  # type: ignore[arg-type]
        x = torch.stack(states).double()
        steps = x.diff(dim=0)
        lengths = steps.norm(dim=-1)
        cosine = torch.cosine_similarity(steps[1:], steps[:-1], dim=-1)
        expected = {
            "step": lengths,
            "contraction": lengths[1:] / lengths[:-1],
            "step_angle": cosine.clamp(-1, 1).arccos(),
            "acceleration": steps.diff(dim=0).norm(dim=-1),
            "drift_to_loop": (x[1:] - x[0]).norm(dim=-1) / lengths.cumsum(0),
        }
        for metric, known in expected.items():
            at = found.mean(metric)[len(x) - len(known) :, column]
            assert torch.allclose(at, known.flatten(1).mean(1), rtol=1e-3, atol=2e-3), (metric, layer)
    assert loop == found.segment


def test_parts_merge_exactly_and_padding_changes_nothing(tmp_path: Path) -> None:
    model = wrapped(injection="linear", initial_state="noise", recurrences=5)
    texts = ["w1 w2 w3", "w4", "w6 w7 w8", "w9 w10 w11 w12"]
    whole = step_geometry(model, texts)
    parts = [step_geometry(model, texts[i::2], batch_size=1) for i in (0, 1)]
    merged = parts[0].merge(parts[1])
    for metric in whole.metrics:
        assert torch.allclose(whole.mean(metric), merged.mean(metric), rtol=1e-5, atol=1e-6, equal_nan=True)
    whole.save(tmp_path / "local")
    assert torch.equal(StepGeometry.load(tmp_path / "local").moments.total, whole.moments.total)
    whole.to_parquet(tmp_path / "local.parquet")
    table = pd.read_parquet(tmp_path / "local.parquet")
    assert table.layer.isna().sum() == 5 and set(table[table.layer.isna()].site) == {"state_out"}
    assert len(whole.plot().axes[0].lines) == 4


def test_bad_requests() -> None:
    model = wrapped(recurrences=2)
    with pytest.raises(ValueError, match=r"at least 3 iterations, and 'loop' runs 2: set_recurrences\(3\)"):
        step_geometry(model, TOKENS)
    with pytest.raises(ValueError, match="'coda' does not loop: the loops are loop"):
        step_geometry(model, TOKENS, segment="coda")
    model.set_recurrences(4)
    blow_up = (model.name("state_out", iteration=2), lambda value, hook: value * math.nan)
    with model.hooks(fwd_hooks=[blow_up]), pytest.raises(DivergedError, match="first at iteration 2"):
        step_geometry(model, TOKENS)
    assert not any(point.fwd_hooks for point in model.hook_points())
    assert step_geometry(model, torch.tensor([[5]])).mean("step")[1:].isfinite().all()
