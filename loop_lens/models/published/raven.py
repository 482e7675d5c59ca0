"""What Huginn and the retrofits share: config fields, key names and the fused projections."""

from __future__ import annotations

from typing import Any

from loop_lens.models.native.config import LoopedConfig
from loop_lens.models.published.base import Config, require_fields, token_ids
from loop_lens.models.published.weights import Entry, fused, same

MODEL_TYPE = "huginn_raven"


def raven_config(published: Config, **own: Any) -> LoopedConfig:
    """The fields that Huginn and the retrofits share, and a family's own on top."""
    require_fields(
        published,
        "n_embd",
        "n_heads",
        "intermediate_size",
        "n_layers_in_prelude",
        "n_layers_in_recurrent_block",
        "n_layers_in_coda",
        "mean_recurrence",
        "init_values",
    )
    require_linear_injection(published)
    heads, scale = published["n_heads"], published["init_values"].get("embed_scale", 1.0)
    return LoopedConfig(
        vocab_size=published.get("padded_vocab_size") or published["vocab_size"],
        hidden_size=published["n_embd"],
        intermediate_size=published["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=published.get("num_key_value_heads") or heads,
        head_dim=published.get("head_dim") or published["n_embd"] // heads,
        prelude_layers=published["n_layers_in_prelude"],
        core_layers=published["n_layers_in_recurrent_block"],
        coda_layers=published["n_layers_in_coda"],
        recurrences=published["mean_recurrence"],
        injection="linear",
        initial_state="zeros" if published.get("state_init") == "zero" else "noise",
        initial_state_std=published["init_values"]["std"] * scale,
        embedding_scale=scale,
        rms_norm_eps=published["norm_eps"],
        tie_word_embeddings=bool(published.get("tie_embeddings", published.get("tie_word_embeddings"))),
        published=published,
        **token_ids(published),
        **own,
    )


def require_linear_injection(published: Config) -> None:
    """Raise for the injections that no released checkpoint of the family uses."""
    kind = published.get("injection_type", "linear")
    if kind != "linear":
        raise ValueError(f"injection_type {kind!r} is not supported for this family: only 'linear' is")


def raven_entries(config: LoopedConfig, norms: dict[str, str], *, interleaved: bool) -> list[Entry]:
    """Key map of Huginn and the retrofits.

    Args:
        config: The native configuration.
        norms: Published norm names within a block to native ones.
        interleaved: Whether queries and keys are in interleaved RoPE order.
    """
    d_head, heads = config.head_dim or 0, config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    entries = [
        same("transformer.wte.weight", "model.embed_tokens.weight"),
        same("transformer.adapter.weight", "model.injection.adapter.weight"),
        same("transformer.ln_f.weight", "model.norm.weight"),
        same("lm_head.weight", "lm_head.weight"),
    ]
    segments = (
        ("prelude", "prelude", config.prelude_layers),
        ("core_block", "core", config.core_layers),
        ("coda", "coda", config.coda_layers),
    )
    for theirs, ours, size in segments:
        for i in range(size):
            old, new = f"transformer.{theirs}.{i}", f"model.{ours}.{i}"
            qkv = [f"{new}.self_attn.{p}_proj.weight" for p in "qkv"]
            rows = [heads * d_head, kv_heads * d_head, kv_heads * d_head]
            order = [heads, kv_heads] if interleaved else []
            halves = [f"{new}.mlp.{p}_proj.weight" for p in ("gate", "up")]
            entries += [
                fused(f"{old}.attn.Wqkv.weight", qkv, rows, order),
                same(f"{old}.attn.proj.weight", f"{new}.self_attn.o_proj.weight"),
                fused(f"{old}.mlp.fc.weight", halves, [config.intermediate_size] * 2),
                same(f"{old}.mlp.proj.weight", f"{new}.mlp.down_proj.weight"),
                *(same(f"{old}.{a}.weight", f"{new}.{b}.weight") for a, b in norms.items()),
            ]
    return entries
