"""Huginn-0125 (Geiping et al., arXiv 2502.05171): norms on the residual stream itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loop_lens.models.native.config import LoopedConfig
from loop_lens.models.published.base import Config, Family
from loop_lens.models.published.raven import MODEL_TYPE, raven_config, raven_entries
from loop_lens.models.published.weights import Entry, rope_to_half, rope_to_interleaved

_NORMS = {
    "norm_1": "attn_norm",
    "norm_2": "attn_post_norm",
    "norm_3": "mlp_norm",
    "norm_4": "mlp_post_norm",
}


def _matches(config: Config, keys: frozenset[str]) -> bool:
    if config.get("model_type") != MODEL_TYPE:
        return False
    if keys:
        return any(key.endswith(".norm_3.weight") for key in keys)
    return bool(config.get("qk_bias"))


def _config(published: Config) -> LoopedConfig:
    return raven_config(
        published,
        block_norm="post_residual",
        post_loop_norm=True,
        qk_bias=bool(published.get("qk_bias")),
        upcast_logits=True,
        max_position_embeddings=published.get("block_size", 4096),
        rope_parameters={"rope_type": "default", "rope_theta": float(published.get("rope_base", 50000))},
        family="huginn",
    )


def _entries(config: LoopedConfig) -> list[Entry]:
    entries = raven_entries(config, _NORMS, interleaved=True)
    if not config.qk_bias:
        return entries
    heads, d_head = config.num_attention_heads, config.head_dim or 0

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        q, k = tensor.reshape(2, heads * d_head)
        return rope_to_half(q, heads), rope_to_half(k, heads)

    def join(q: Tensor, k: Tensor) -> Tensor:
        both = [rope_to_interleaved(q, heads), rope_to_interleaved(k, heads)]
        return torch.stack(both).reshape(2, 1, heads, d_head)

    segments = (("prelude", "prelude"), ("core_block", "core"), ("coda", "coda"))
    for theirs, ours in segments:
        for i in range(getattr(config, f"{ours}_layers")):
            biases = tuple(f"model.{ours}.{i}.self_attn.{p}_proj.bias" for p in "qk")
            entries.append(Entry(f"transformer.{theirs}.{i}.attn.qk_bias", biases, split, join))
    return entries


def rope_table(config: LoopedConfig) -> dict[str, Tensor]:
    """The table of RoPE cosines and sines that the checkpoint stores [1 pos 1 d_head/2 2]."""
    d_head = config.head_dim or 0
    rope: dict[str, Any] = {**(config.rope_parameters or {})}
    theta = float(rope["rope_theta"])
    frequencies = theta ** (-torch.arange(0, d_head, 2).float() / d_head)
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies)
    return {"freqs_cis": torch.stack([angles.cos(), angles.sin()], dim=-1)[None, :, None]}


HUGINN = Family(
    name="huginn",
    model_type=MODEL_TYPE,
    hub_ids=("tomg-group-umd/huginn-0125",),
    matches=_matches,
    config=_config,
    entries=_entries,
    derived=rope_table,
)
