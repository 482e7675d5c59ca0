"""Latent attention with a key-value cache: looking changes nothing, and the cache stays the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import loop_lens

TOKENS = torch.randint(1, 48, (2, 7), generator=torch.Generator().manual_seed(1))

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek v2": ("DeepseekV2", {"first_k_dense_replace": 2, "topk_method": "greedy"}),
    "deepseek v3": ("DeepseekV3", {"first_k_dense_replace": 4}),
    "deepseek v3, no query latents": ("DeepseekV3", {"first_k_dense_replace": 4, "q_lora_rank": None}),
    "deepseek v3, halves": ("DeepseekV3", {"first_k_dense_replace": 4, "rope_interleave": False}),
    # More tokens than there are: transformers' own choice of few is not the same cached, where they tie.
    "glm": (
        "GlmMoeDsa",
        {"mlp_layer_types": ["dense"] * 4, "index_topk": 16, "index_head_dim": 8, "index_n_heads": 2},
    ),
}


@pytest.fixture(params=[(name, attention) for name in MODELS for attention in ("eager", "sdpa")], ids=str)
def model(request: pytest.FixtureRequest) -> Any:
    name, attention = request.param
    family, more = MODELS[name]
    torch.manual_seed(0)
    base = getattr(hf, f"{family}ForCausalLM")(getattr(hf, f"{family}Config")(**SIZES | more)).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    base.set_attn_implementation(attention)
    return loop_lens.loopify(base, layers=[1, 2], times=2)


def look(value: Tensor, hook: Any) -> None:
    pass


def in_steps(model: Any, looks: tuple[bool, bool, bool], name: str = "z") -> Tensor:
    """Logits of a cached forward in three steps, of which some are hooked inside every firing."""
    outputs, past = list[Tensor](), None
    for (start, stop), hooked in zip(((0, 4), (4, 5), (5, 7)), looks, strict=True):
        options: dict[str, Any] = {"use_cache": True} if past is None else {"past_key_values": past}
        hooks = [(site, look) for site in model.names(name)] if hooked else []
        with model.hooks(fwd_hooks=hooks):
            logits, past = model(TOKENS[:, start:stop], return_type="logits_and_cache", **options)
        outputs.append(logits)
    return torch.cat(outputs, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("looks", [(True, True, True), (False, True, False), (True, False, True)])
def test_looks_with_a_cache(model: Any, looks: tuple[bool, bool, bool]) -> None:
    whole = model(TOKENS)
    assert (in_steps(model, (False, False, False)) - whole).abs().max() < 2e-5
    assert (in_steps(model, looks) - whole).abs().max() < 2e-5


@torch.no_grad()
def test_generation_while_somebody_looks(model: Any) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 5,
        "do_sample": False,
        "verbose": False,
        "stop_at_eos": False,
    }
    plain = model.generate(TOKENS, use_past_kv_cache=False, **options)
    with model.hooks(fwd_hooks=[(name, look) for name in model.names("pattern")]):
        assert torch.equal(model.generate(TOKENS, use_past_kv_cache=True, **options), plain)


@torch.no_grad()
def test_patched_latents_stay_in_the_cache(model: Any) -> None:
    def double(value: Tensor, hook: Any) -> Tensor:
        return 2 * value

    options: dict[str, Any] = {
        "max_new_tokens": 5,
        "do_sample": False,
        "verbose": False,
        "stop_at_eos": False,
    }
    with model.hooks(fwd_hooks=[(name, double) for name in model.names("attn.hook_kv_latent")]):
        whole = model.generate(TOKENS, use_past_kv_cache=False, **options)
        assert torch.equal(model.generate(TOKENS, use_past_kv_cache=True, **options), whole)


@torch.no_grad()
def test_what_the_cache_cannot_keep_is_refused(model: Any) -> None:
    name = model.names("attn.hook_v")[0]
    with model.hooks(fwd_hooks=[(name, lambda value, hook: 2 * value)]):
        model(TOKENS, use_cache=False)
        with pytest.raises(ValueError, match="holds latents"):
            model(TOKENS, use_cache=True)
