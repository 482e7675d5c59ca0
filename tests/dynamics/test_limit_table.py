"""Tables of limiting behaviour: loops of known kind, the cache, thresholds, parts."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from loop_lens.dynamics import LIMIT_KINDS, LimitTable, limit_table, limiting_behaviour
from loop_lens.measuring.moments import DivergedError
from tests.dynamics.loops import loop_of, rotation, starting_at
from tests.interventions.models import opened, prompts, wrapped

TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_a_contraction_is_a_fixed_point() -> None:
    model = loop_of(0.4 * torch.eye(24), inject=1.0, recurrences=60)
    starting_at(model, 2, 3)
    found = limit_table(model, TOKENS)
    assert found.counts[0, 0, 0].tolist() == [[6, 0, 0, 0]] * 2
    assert found.moving_tokens().empty and float(found.percent[0, 0, 0, 0, 0]) == 100


@pytest.mark.parametrize("cycles", [0.1, 0.23])
def test_a_rotation_is_an_orbit_of_its_frequency(cycles: float) -> None:
    model = loop_of(rotation(24, 2 * math.pi * cycles), recurrences=81)
    starting_at(model, 2, 3)
    found = limit_table(model, TOKENS)
    assert found.counts[0, 0, 0].tolist() == [[0, 6, 0, 0]] * 2
    row = found.to_dataframe().iloc[-1]
    assert row.orbit == 100 and row.site == "state_out"
    assert row.orbit_frequency == pytest.approx(cycles, abs=0.5 / 80)
    assert row.orbit_amplitude == pytest.approx(1, rel=0.2)
    assert len(found.moving_tokens()) == 12


def test_a_translation_is_a_slider_of_its_speed() -> None:
    model = loop_of(torch.eye(24), inject=1.0, recurrences=40)
    found = limit_table(model, TOKENS, of="norm")
    assert found.counts[0, 0, 0].tolist() == [[0, 0, 6, 0]] * 2
    _, cache = model.run_with_cache(TOKENS, names_filter="hook_prelude_out")
    speed = float(cache["hook_prelude_out"].norm(dim=-1).mean())
    assert found.to_dataframe().slider_gradient.tolist() == pytest.approx([speed] * 2, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["retrofit_llama", "ouro", "hrm_text", "looped_llama", "given_state"])
@pytest.mark.parametrize("of", ["cosine", "norm"])
def test_against_the_cache(name: str, of: Any) -> None:
    model = opened(name)
    tokens, _ = prompts(model)
    model.set_recurrences(9 if name != "hrm_text" else 3)
    total = len(model.schedule.iterations(model.schedule.innermost_loop))
    taus = (0.05, 0.3, 1e-4) if of == "cosine" else (0.05, 3.0, 20.0)
    lengths, rhos = (total, total - 2), (0.9, 0.3)
    found = limit_table(model, tokens, n=lengths, tau=taus, rho=rhos, of=of)
    _, cache = model.run_with_cache(tokens)
    for column, layer in enumerate(found.layers):
        site = ("state_out", None) if layer == "state" else ("resid_post", layer)
        its = model.schedule.iterations(found.segment)
        x = torch.stack([cache[model.name(site[0], iteration=t, layer=site[1])] for t in its])  # type: ignore[arg-type]
        for a, n in enumerate(lengths):
            end = x[n - 1]
            if of == "norm":
                series = (x[: n - 1] - end).norm(dim=-1)
            else:
                series = torch.cosine_similarity(x[: n - 1], end[None], dim=-1)
            for b, tau in enumerate(taus):
                for c, rho in enumerate(rhos):
                    each = series.flatten(1).T
                    kinds = Counter(limiting_behaviour(s, tau, rho, of=of).kind for s in each)
                    assert found.counts[a, b, c, column].tolist() == [kinds[k] for k in LIMIT_KINDS]
    assert len({tuple(row) for row in found.counts.flatten(0, 3).tolist()}) > 1
    assert not any(point.fwd_hooks for point in model.registry.existing())


@torch.no_grad()
def test_a_reference_beyond_what_is_measured() -> None:
    model = loop_of(0.9 * torch.eye(24), inject=1.0, recurrences=10)
    starting_at(model, 2, 3)
    found = limit_table(model, TOKENS, of="norm", reference=200, n=(10, 6), tau=1e-9)
    with model.at_recurrences(200):
        _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: name.endswith("hook_state_out"))
    x = torch.stack([cache[f"loop.{t}.hook_state_out"] for t in range(10)])
    distance = (x - cache["loop.199.hook_state_out"]).norm(dim=-1).flatten(1)
    for a, n in enumerate((10, 6)):
        slopes = [limiting_behaviour(s[:n], 1e-9, of="norm") for s in distance.T]
        assert {s.kind for s in slopes} <= {"slider", "orbit"}
        kinds = Counter(s.kind for s in slopes)
        assert found.counts[a, 0, 0, -1].tolist() == [kinds[k] for k in LIMIT_KINDS]


def test_moving_tokens_are_named() -> None:
    model = opened("retrofit_llama")
    model.set_recurrences(12)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 30, (n,), generator=generator) for n in (5, 2, 4)]
    found = limit_table(model, rows, batch_size=2)
    table = found.moving_tokens()
    assert len(table) == int(found.counts[0, 0, 0, :, 1:].sum())
    assert table.groupby("prompt").position.max().to_dict() == {0: 4, 1: 1, 2: 3}
    alone = limit_table(model, [rows[2]]).moving_tokens()
    mine = table[table.prompt == 2].reset_index(drop=True)
    assert mine.kind.tolist() == alone.kind.tolist()
    assert mine.amplitude.tolist() == pytest.approx(alone.amplitude.tolist(), abs=1e-5)


def test_parts_merge_exactly(tmp_path: Path) -> None:
    model = wrapped(injection="linear", initial_state="noise", recurrences=9)
    texts = ["w1 w2 w3", "w4", "w6 w7 w8", "w9 w10 w11 w12"]
    whole = limit_table(model, texts, tau=(0.05, 0.3))
    parts = [limit_table(model, texts[i::2], tau=(0.05, 0.3), batch_size=1) for i in (0, 1)]
    merged = parts[0].merge(parts[1])
    assert torch.equal(merged.counts, whole.counts) and int(whole.counts[0, 0, 0, 0].sum()) == 15
    assert torch.allclose(merged.sums, whole.sums, rtol=1e-4, atol=1e-5)
    assert len(merged.moving_tokens()) == len(whole.moving_tokens())
    with pytest.raises(ValueError, match="do not merge: their tau differ"):
        whole.merge(limit_table(model, texts))
    whole.save(tmp_path / "limits")
    again = LimitTable.load(tmp_path / "limits")
    pd.testing.assert_frame_equal(again.to_dataframe(), whole.to_dataframe())
    pd.testing.assert_frame_equal(again.moving_tokens(), whole.moving_tokens())
    whole.to_parquet(tmp_path / "limits.parquet")
    assert len(whole.plot().axes[0].patches) == 3 * 3


def test_bad_requests() -> None:
    model = wrapped(injection="linear", initial_state="noise", recurrences=4)
    with pytest.raises(ValueError, match="at least 5 iterations, and 'loop' runs 4"):
        limit_table(model, TOKENS)
    model.set_recurrences(6)
    with pytest.raises(ValueError, match="n=7 cannot be classified"):
        limit_table(model, TOKENS, n=7)
    with pytest.raises(ValueError, match="reference=5 comes before the end"):
        limit_table(model, TOKENS, reference=5)
    with pytest.raises(ValueError, match="of='angle' is unknown"):
        limit_table(model, TOKENS, of="angle")  # type: ignore[arg-type]
    blow_up = (model.name("resid_post", iteration=2, layer=1), lambda value, hook: value * math.nan)
    with model.hooks(fwd_hooks=[blow_up]), pytest.raises(DivergedError, match="iteration 2, layer 1"):
        limit_table(model, TOKENS)
    assert not any(point.fwd_hooks for point in model.hook_points())
