"""Ouro (arXiv 2510.25741): all layers loop, the final norm follows every iteration, an exit gate reads it.

The published names mislead: ``post_attention_layernorm`` is the norm before the MLP, and the two
norms that end in ``_2`` are on the branches' outputs.
"""

from __future__ import annotations

from loop_lens.models.native.config import LoopedConfig
from loop_lens.models.published.base import Config, Family, require_fields, rope_parameters, token_ids
from loop_lens.models.published.weights import Entry, same

_WITHIN_BLOCK = {
    "input_layernorm": "attn_norm",
    "input_layernorm_2": "attn_post_norm",
    "post_attention_layernorm": "mlp_norm",
    "post_attention_layernorm_2": "mlp_post_norm",
    **{f"self_attn.{p}_proj": f"self_attn.{p}_proj" for p in "qkvo"},
    **{f"mlp.{p}_proj": f"mlp.{p}_proj" for p in ("gate", "up", "down")},
}


def _config(published: Config) -> LoopedConfig:
    require_fields(
        published,
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "total_ut_steps",
        "vocab_size",
    )
    if published.get("use_sliding_window"):
        raise ValueError("use_sliding_window is not supported for Ouro: no released checkpoint uses it")
    heads, d_model = published["num_attention_heads"], published["hidden_size"]
    return LoopedConfig(
        vocab_size=published["vocab_size"],
        hidden_size=d_model,
        intermediate_size=published["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=published.get("num_key_value_heads") or heads,
        head_dim=published.get("head_dim") or d_model // heads,
        hidden_act=published.get("hidden_act", "silu"),
        prelude_layers=0,
        core_layers=published["num_hidden_layers"],
        coda_layers=0,
        recurrences=published["total_ut_steps"],
        block_norm="sandwich",
        injection="none",
        initial_state="prelude",
        loop_norm=True,
        exit_gate=True,
        rms_norm_eps=published.get("rms_norm_eps", 1e-6),
        max_position_embeddings=published.get("max_position_embeddings", 65536),
        rope_parameters=rope_parameters(published, 1e6),
        tie_word_embeddings=bool(published.get("tie_word_embeddings")),
        family="ouro",
        published=published,
        **token_ids(published),
    )


def _entries(config: LoopedConfig) -> list[Entry]:
    return [
        same("model.embed_tokens.weight", "model.embed_tokens.weight"),
        same("model.norm.weight", "model.norm.weight"),
        same("model.early_exit_gate.weight", "model.exit_gate.weight"),
        same("model.early_exit_gate.bias", "model.exit_gate.bias"),
        same("lm_head.weight", "lm_head.weight"),
        *(
            same(f"model.layers.{i}.{theirs}.weight", f"model.core.{i}.{ours}.weight")
            for i in range(config.core_layers)
            for theirs, ours in _WITHIN_BLOCK.items()
        ),
    ]


OURO = Family(
    name="ouro",
    model_type="ouro",
    hub_ids=(
        "ByteDance/Ouro-1.4B",
        "ByteDance/Ouro-2.6B",
        "ByteDance/Ouro-1.4B-Thinking",
        "ByteDance/Ouro-2.6B-Thinking",
    ),
    matches=lambda config, keys: config.get("model_type") == "ouro",
    config=_config,
    entries=_entries,
    prepends_bos=False,
)
