"""What a body claims is tried before a sweep relies on it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from loop_lens import HookedLoopedTransformer, patch_sweep
from loop_lens.interventions import claims
from loop_lens.models.native.body import NativeBody
from loop_lens.unrolling import LoopBody
from tests.interventions.models import MODELS, difference, opened, prompts


def swept_and_by_hand(model: HookedLoopedTransformer) -> tuple[Tensor, Tensor]:
    """One patch in the middle of the loop, by a sweep and by a whole forward."""
    clean, corrupted = prompts(model)
    t = model.schedule.iterations(model.schedule.innermost_loop)[1]
    key = model.name("resid_post", iteration=t, layer=0)
    _, given = model.run_with_cache(clean, names_filter=key)

    def patch(value: Tensor, hook: Any) -> Tensor:
        value[:, 4] = given[key][:, 4]
        return value

    swept = patch_sweep(
        model, clean, corrupted, lambda x: difference(x[:, :6]), site="resid_post", positions=[4], over=AXES
    )
    assert swept.per_prompt is not None
    index = swept.labels["iteration"].index(t)
    logits = model.run_with_hooks(corrupted, fwd_hooks=[(key, patch)])
    return swept.per_prompt[index, 0, 0], difference(logits[:, :6])


AXES = ("iteration", "layer", "position")


def resumes_anywhere(model: HookedLoopedTransformer) -> None:
    """Claim that one residual is all that a forward needs."""
    body: Any = model.body
    body.resume_at = lambda firing: firing
    body.require_resumable = lambda start, prelude_out: {}


def looks_ahead(model: HookedLoopedTransformer) -> None:
    """Let every position read all of them, in front of the final norm."""
    module: Any = model.ln_final
    module.original_component.register_forward_pre_hook(lambda m, x: (x[0] + x[0].mean(1, keepdim=True),))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        ("damped_llama", resumes_anywhere, "resumes from one residual,"),
        ("anchored_llama", resumes_anywhere, "resumes from one residual,"),
        ("hrm_text", resumes_anywhere, "resumes from one residual,"),
        ("ouro", looks_ahead, "says that keys and values of earlier positions"),
        ("hrm_text", lambda model: (resumes_anywhere(model), looks_ahead(model)), "residual and that keys"),
    ],
)
def test_a_wrong_claim_costs_speed_and_one_warning(name: str, spoil: Any, says: str) -> None:
    model = opened(name)
    spoil(model)
    with pytest.warns(UserWarning, match=says):
        swept, expected = swept_and_by_hand(model)
    assert (swept - expected).abs().max() < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swept_and_by_hand(model)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_claims_of_every_family_hold(name: str) -> None:
    model = opened(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        held = claims.abilities_of(model, prompts(model)[1])
    assert held.cached and held.resumed == (name != "hrm_text")


@torch.no_grad()
def test_a_body_that_claims_nothing_is_swept_by_whole_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    for claim in ("resume_at", "keeps_prefix", "require_resumable"):
        monkeypatch.setattr(NativeBody, claim, getattr(LoopBody, claim))
    model = opened("huginn")
    swept, expected = swept_and_by_hand(model)
    assert (swept - expected).abs().max() < 1e-5
    held = claims.abilities_of(model, prompts(model)[1])
    assert not (held.cached or held.resumed or held.joins)
    _, cache = model.run_with_cache(prompts(model)[1])
    with pytest.raises(ValueError, match="NativeBody does not say that this model can"):
        model(cache["blocks.3.hook_resid_pre"], start_at_layer=3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_claims_hold_in_other_precisions(dtype: torch.dtype) -> None:
    model = opened("huginn").to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert claims.abilities_of(model, prompts(model)[1]).joins
