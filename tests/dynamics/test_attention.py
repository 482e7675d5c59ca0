"""Settling of heads: against the cache and loops by hand, and where it must not be computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loop_lens.dynamics import AttentionSettling, attention_bound, attention_settling, firing_similarity
from loop_lens.measuring.moments import DivergedError
from loop_lens.models.native.attention import LoopedAttentionBridge
from tests.dynamics.test_distances import js_by_entropies
from tests.interventions.models import MODELS, opened, prompts, wrapped
from tests.interventions.test_paths import linear_loop

TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9 w10"]


def measured(a: Tensor, b: Tensor) -> dict[str, float]:
    """Distances [prompt query key] in double precision, query by query."""
    a, b = a.double().numpy(), b.double().numpy()
    pairs = [(a[p, q], b[p, q]) for p in range(len(a)) for q in range(a.shape[1])]
    return {
        "frobenius": float(np.mean([np.linalg.norm(x - y) for x, y in zip(a, b, strict=True)])),
        "total_variation": float(np.mean([0.5 * np.abs(x - y).sum() for x, y in pairs])),
        "jensen_shannon": float(np.mean([js_by_entropies(x, y) for x, y in pairs])),
    }


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [n for n in MODELS if n not in ("no_prelude", "damped_llama", "anchored_llama")]
)
def test_against_the_cache(name: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model)
    found = attention_settling(model, tokens, reference=model.recurrences + 1)
    _, cache = model.run_with_cache(tokens)
    with model.at_recurrences(model.recurrences + 1):
        last = model.schedule.iterations(model.schedule.innermost_loop)[-1]
        _, later = model.run_with_cache(tokens)
        end = later[model.name("pattern", iteration=last, layer=1)]
    patterns = [cache[model.name("pattern", iteration=t, layer=1)] for t in found.iterations]
    for i in range(1, len(patterns)):
        for head in range(0, model.cfg.n_heads, 2):
            for of, other in (("step", patterns[i - 1]), ("distance", end)):
                for metric, value in measured(patterns[i][:, head], other[:, head]).items():
                    mean = float(found.mean(f"{metric}_{of}")[i, 1, head])
                    assert mean == pytest.approx(value, rel=1e-4, abs=1e-6)
            norm = patterns[i][:, head].norm(dim=(1, 2)).mean()
            assert float(found.mean("norm")[i, 1, head]) == pytest.approx(float(norm), rel=1e-5)
    assert found.mean("total_variation_step")[0].isnan().all()
    assert len(found.to_dataframe()) == found.mean("norm").numel()


def settled_by_hand(steps: list[float], tolerance: float) -> float:
    """The first iteration after which no step is over the tolerance; NaN if the last one is."""
    if steps[-1] > tolerance:
        return float("nan")
    return next(float(t) for t in range(len(steps)) if all(step <= tolerance for step in steps[t + 1 :]))


def test_heads_settle_where_the_steps_say_so() -> None:
    model = opened("huginn")
    model.set_recurrences(12)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, model.cfg.d_vocab, (3, 6), generator=generator)
    singles = [attention_settling(model, t) for t in tokens]
    found = attention_settling(model, tokens, tolerance=0.03)
    assert found.settled().isnan().any() or found.settled().unique().numel() > 1
    for tolerance in (0.003, 0.03, 0.3):
        at = found.settled(tolerance)
        for layer in range(at.shape[0]):
            for head in range(at.shape[1]):
                steps = found.mean("total_variation_step")[:, layer, head].tolist()
                by_hand = settled_by_hand(steps, tolerance)
                assert at[layer, head].item() == pytest.approx(by_hand, nan_ok=True)
    expected = torch.zeros_like(found.share_settled)
    for single in singles:
        steps = single.mean("total_variation_step")
        for layer in range(steps.shape[1]):
            for head in range(steps.shape[2]):
                at = settled_by_hand(steps[:, layer, head].tolist(), 0.03)
                if at == at:
                    expected[int(at) :, layer, head] += 1 / 3
    assert torch.allclose(found.share_settled, expected)
    table = found.heads()
    assert len(table) == found.mean("norm")[0].numel()
    for row in table.itertuples():
        at = found.settled()[row.layer, row.head]
        assert row.settled is None if at.isnan() else row.settled == int(at)
    assert len(found.plot().axes[0].get_lines()) == int((~found.settled().isnan()).sum())


def test_a_contracting_loop_settles_one_iteration_later_for_half_the_tolerance() -> None:
    model = linear_loop()
    d = model.cfg.d_model
    with torch.no_grad():
        model.original_model.model.injection.adapter.weight[:, :d] = 0.5 * torch.eye(d)
        for name, parameter in model.original_model.named_parameters():
            if "core" in name and "down_proj" in name:
                parameter.zero_()
    model.set_recurrences(16)
    found = attention_settling(model, torch.tensor([[1, 2, 3, 4]]), reference=40)
    step = found.mean("total_variation_step")[4].max().item()
    at = [found.settled(step * 0.5**k).amax() for k in range(3)]
    assert (at[1] - at[0]).item() == pytest.approx(1, abs=1) and at[2] > at[0]
    distances = found.mean("total_variation_distance")[:, 0].amax(-1).tolist()
    by_hand = next(t for t in range(16) if all(d <= step for d in distances[t:]))
    assert found.settled(step, of="distance").amax() == by_hand


def test_heads_that_never_settle_and_a_tolerance_below_rounding() -> None:
    model = wrapped()
    found = attention_settling(model, TEXTS, tolerance=1e-6)
    assert found.heads()["settled"].isna().all() and not found.share_settled.any()
    assert found.heads(1.0)["settled"].tolist() == [0] * len(found.heads())
    with pytest.raises(ValueError, match="below the rounding"):
        found.settled(1e-9)
    with pytest.raises(ValueError, match="reference=128"):
        found.settled(of="distance")
    assert float(found.floor("frobenius")[0, 0, 0]) == pytest.approx(
        torch.finfo(torch.float32).eps * float(found.mean("norm")[0, 0, 0])
    )
    half = wrapped().to(torch.bfloat16)
    assert float(attention_settling(half, TEXTS).floor().max()) == torch.finfo(torch.bfloat16).eps / 2


def test_padding_changes_nothing_and_parts_merge(tmp_path: Path) -> None:
    model = opened("retrofit_llama")
    generator = torch.Generator().manual_seed(1)
    each = [torch.randint(1, model.cfg.d_vocab, (n,), generator=generator) for n in (3, 9, 5)]
    options = {"reference": 6, "tolerance": 0.05}
    together = attention_settling(model, each, **options, batch_size=3)
    alone = [attention_settling(model, [p], **options) for p in each]
    merged = alone[0].merge(alone[1]).merge(alone[2])
    for metric in together.metrics:
        assert torch.allclose(
            together.mean(metric), merged.mean(metric), rtol=1e-5, atol=1e-6, equal_nan=True
        )
    halves = attention_settling(model, each[:2], **options).merge(
        attention_settling(model, each[2:], **options)
    )
    for metric in together.metrics:
        a, b = together.mean(metric, over="prompts"), halves.mean(metric, over="prompts")
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(together.settled_prompts, merged.settled_prompts) and merged.prompts == 3
    together.save(tmp_path / "found")
    again = AttentionSettling.load(tmp_path / "found")
    assert torch.equal(again.settled(), together.settled()) or again.settled().isnan().any()
    assert again.to_dataframe().equals(together.to_dataframe())
    with pytest.raises(ValueError, match="tolerance"):
        together.merge(attention_settling(model, each, reference=6))


def test_bad_requests() -> None:
    model = wrapped(injection="linear", initial_state="noise", recurrences=4)
    with pytest.raises(ValueError, match="prompt 1 has one token"):
        attention_settling(model, [torch.tensor([1, 2]), torch.tensor([3])])
    with pytest.raises(ValueError, match="metric 'cosine' is unknown"):
        attention_settling(model, TEXTS, metrics=("cosine",))
    with pytest.raises(ValueError, match="metric 'total_variation' is unknown"):
        attention_settling(model, TEXTS, metrics=("jensen_shannon",))
    with pytest.raises(ValueError, match="at least 2 iterations"), model.at_recurrences(1):
        attention_settling(model, TEXTS)
    name = model.name("resid_pre", iteration=2, layer=1)
    with (
        model.hooks(fwd_hooks=[(name, lambda value, hook: value * float("nan"))]),
        pytest.raises(DivergedError, match="iteration 2, layer 1"),
    ):
        attention_settling(model, TEXTS)


@pytest.mark.parametrize("measure", [attention_settling, attention_bound, firing_similarity])
def test_a_model_without_patterns_says_so(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoopedAttentionBridge, "_seen", lambda *arguments: (None, None, True))
    with pytest.raises(ValueError, match="never computes pattern"):
        measure(wrapped(), TEXTS)
