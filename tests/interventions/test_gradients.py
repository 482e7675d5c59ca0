"""Estimates from gradients against autograd by hand, closed forms and transformer-lens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.tools.analysis.attribution_patching import attribution_patch

from loop_lens import patch_sweep
from loop_lens.interventions import LogitDiff, Rank, skip
from tests.interventions.models import MODELS, difference, opened, prompts, wrapped
from tests.oracles.twin import untied_twin


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("site", ["resid_post", "attn_out", "z", "q", "pattern", "mlp_out"])
def test_first_order_is_the_derivative_of_patching(name: str, site: str) -> None:
    """Finite differences: move a site a little towards the donor, see the metric move."""
    model = opened(name)
    clean, corrupted = prompts(model)
    with torch.no_grad():
        _, given = model.run_with_cache(clean)
    axes = ("iteration", "layer", "position")
    result = patch_sweep(model, clean, corrupted, difference, site=site, over=axes, method="attribution")
    assert result.method == "attribution" and result.per_prompt is not None
    t = result.labels["iteration"][1]
    key = model.name(site, iteration=t, layer=0)
    for p in (3, clean.shape[1] - 1):
        slopes: list[Tensor] = []
        for step in (1e-2, -1e-2):  # norms and softmax round to fp32

            def nudge(value: Tensor, hook: Any, p: int = p, step: float = step) -> Tensor:
                where = (slice(None), slice(None), p) if site == "pattern" else (slice(None), p)
                moved = value.clone()
                moved[where] += step * (given[key][where] - value[where])
                return moved

            with torch.no_grad():
                slopes.append(difference(model.run_with_hooks(corrupted, fwd_hooks=[(key, nudge)])))
        slope = (slopes[0] - slopes[1]) / 2e-2
        effect = result.per_prompt[1, 0, p] - difference(model(corrupted)).detach()
        assert (effect - slope).abs().max() < 1e-4 + 1e-2 * float(slope.abs().max())


def test_transformer_lens_own_tool_on_the_untied_twin() -> None:
    model, twin = untied_twin()
    clean, corrupted = prompts(model)
    theirs = attribution_patch(twin, clean, corrupted, lambda logits: difference(logits).mean())
    scores = {
        (node.kind, node.layer, node.position, node.head): score for node, score in theirs.node_scores.items()
    }
    z = patch_sweep(
        model,
        clean,
        corrupted,
        difference,
        site="z",
        over=("firing", "position", "head"),
        method="attribution",
    )
    mlp = patch_sweep(
        model, clean, corrupted, difference, site="mlp_out", over=("firing", "position"), method="attribution"
    )
    n, seen = len(model.schedule), 0
    for layer in range(n):
        for p in range(clean.shape[1]):
            for head in range(3):
                score = float(scores["attn_head_out", layer, p, head])
                assert z.effect[layer, p, head] == pytest.approx(score, abs=1e-5)
                seen += abs(score) > 1e-4
            assert mlp.effect[layer, p] == pytest.approx(float(scores["mlp_out", layer, p, None]), abs=1e-5)
    assert seen > n


@pytest.mark.parametrize("name", ["huginn", "ouro", "hrm_text", "looped_gpt2", "anchored_llama"])
@pytest.mark.parametrize("site", ["resid_post", "z", "state_out"])
def test_integrated_gradients_add_up_to_the_patch(name: str, site: str) -> None:
    model = opened(name)
    clean, corrupted = prompts(model)
    over = ("iteration",) if site == "state_out" else ("iteration", "layer")
    whole = patch_sweep(model, clean, corrupted, difference, site=site, over=over)
    parts = patch_sweep(
        model,
        clean,
        corrupted,
        difference,
        site=site,
        over=(*over, "position"),
        method="integrated",
        steps=64,
    )
    scale = float(whole.effect.abs().max())
    assert (parts.effect.sum(-1) - whole.effect).abs().max() < 2e-2 * scale
    assert scale > 1e-4


def test_scalar_metrics_and_surgery() -> None:
    model = opened("ouro")
    clean, corrupted = prompts(model)
    each = patch_sweep(model, clean, corrupted, difference, site="resid_post", method="attribution")
    mean = patch_sweep(
        model, clean, corrupted, lambda x: difference(x).mean(), site="resid_post", method="attribution"
    )
    assert torch.allclose(each.values, mean.values, atol=1e-6) and mean.per_prompt is None
    with skip(model, 1):
        skipped = patch_sweep(model, clean, corrupted, difference, site="resid_post", method="attribution")
    assert skipped.effect[1].abs().max() == 0 and skipped.effect[0].abs().max() > 0
    model.set_recurrences(3)
    assert all(p.grad is None for p in model.original_model.parameters())


def test_bad_requests() -> None:
    model = wrapped()
    clean, corrupted = prompts(model)
    with pytest.raises(ValueError, match="method 'ig' is unknown"):
        patch_sweep(model, clean, corrupted, difference, site="z", method="ig")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps"):
        patch_sweep(model, clean, corrupted, difference, site="z", method="integrated", steps=0)
    with pytest.raises(ValueError, match="has no gradient of its own"):
        patch_sweep(model, clean, corrupted, difference, site="resid_mid", method="attribution")
    with pytest.raises(ValueError, match="metric has no gradient"):
        patch_sweep(model, clean, corrupted, Rank(3), site="z", method="attribution")
    with pytest.raises(ValueError, match="equal length"):
        patch_sweep(model, clean, corrupted[:, :5], LogitDiff(3, 4), site="z", method="attribution")
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.registry.existing())
