"""A forward that starts at a firing gives what the whole forward gives, whatever blocks return."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import loop_lens
from tests.oracles.unrolled import FUSED, MODELS, decoder

TOKENS = torch.randint(1, 48, (2, 7), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS | FUSED)
def test_a_forward_resumes_at_every_firing(name: str) -> None:
    model: Any = loop_lens.loopify(decoder(name), layers=range(2, 5), times=2)
    streams = {firing.index: f"{firing.prefix}.hook_resid_pre" for firing in model.schedule}
    whole = model(TOKENS)
    for start in (3, 6, 0, 8):
        # Each from a model of its own, so that nothing is known of its blocks but what was asked.
        fresh: Any = loop_lens.loopify(decoder(name), layers=range(2, 5), times=2)
        _, cache = model.run_with_cache(TOKENS, names_filter=streams[start])
        resumed = fresh(cache[streams[start]], start_at_layer=start)
        assert (resumed - whole).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_bigcode", "mpt"])
def test_a_forward_resumes_behind_a_prefix(name: str) -> None:
    model: Any = loop_lens.loopify(decoder(name), layers=range(2, 5), times=2)
    site = "loop.1.blocks.0.hook_resid_pre"
    logits, whole = model.run_with_cache(TOKENS, names_filter=site)
    _, past = model(TOKENS[:, :4], return_type="logits_and_cache", use_cache=True)
    later = model(whole[site][:, 4:], start_at_layer=5, past_key_values=past)
    assert (later - logits[:, 4:]).abs().max() < 1e-5
