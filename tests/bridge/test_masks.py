"""Attention masks mean the same however they are written, whoever looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loop_lens
from tests.oracles.twin import small_looped
from tests.oracles.unrolled import FUSED, MODELS, decoder

GOLDENS = Path(__file__).parent.parent / "goldens"
TOKENS = torch.randint(1, 48, (2, 7), generator=torch.Generator().manual_seed(1))
CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 1, 7, 7)
TAKES_NONE = ("opt", "bloom", "falcon, one key head")
"""Whose positions are made of the mask: transformers raises on one for every query."""
KINDS = ["native", "hrm_text", *(name for name in MODELS | FUSED if name not in TAKES_NONE)]


def opened(kind: str, attention: str) -> Any:
    if kind == "native":
        torch.manual_seed(0)
        model = small_looped()
        model.set_attn_implementation(attention)
        return loop_lens.wrap(model)
    if kind == "hrm_text":
        return loop_lens.boot(GOLDENS / "hrm_text", attn_implementation=attention)
    model = decoder(kind)
    if kind == "gemma2" and attention == "sdpa":
        pytest.skip("its softcap is in eager attention alone")
    model.set_attn_implementation(attention)
    return loop_lens.loopify(model, layers=range(2, 5), times=2)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_boolean_mask_is_the_additive_one(kind: str, attention: str) -> None:
    model = opened(kind, attention)
    blind = CAUSAL.clone()
    blind[:, :, 3:, 1] = False  # nothing from position 3 on attends to position 1
    added = torch.zeros(blind.shape).masked_fill(~blind, torch.finfo(torch.float32).min)
    name = model.names("z")[0]
    hooks = [(name, lambda value, hook: None)] if kind != "codegen" else []
    expected = model(TOKENS, attention_mask=added)
    assert (expected - model(TOKENS)).abs().max() > 1e-3
    assert (model(TOKENS, attention_mask=blind) - expected).abs().max() < 1e-5
    assert (model.run_with_hooks(TOKENS, fwd_hooks=hooks, attention_mask=blind) - expected).abs().max() < 1e-5
