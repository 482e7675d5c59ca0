"""Parts of the native looped decoder: embedding, attention, MLP, block, injections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from loop_lens.models.native.config import LoopedConfig


class ScaledEmbedding(nn.Embedding):
    """Token embedding times a constant."""

    def __init__(self, vocab_size: int, d_model: int, padding_idx: int | None, scale: float) -> None:
        super().__init__(vocab_size, d_model, padding_idx)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """Embed tokens [...] as [... d_model]."""
        embedded = super().forward(input)
        return embedded if self.scale == 1.0 else embedded * self.scale


def widened(x: Tensor) -> Tensor:
    """A value in the type in which norms are computed: float32, or its own if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LoopedRMSNorm(LlamaRMSNorm):
    """RMS norm over the last dimension, in float64 where the model is."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Norm [... d]."""
        wide = widened(hidden_states)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


class UnitRMSNorm(nn.Module):
    """RMS norm without weights over the last dimension."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm [... d]."""
        return nn.functional.rms_norm(widened(x), (x.shape[-1],), eps=self.eps).to(x.dtype)


class LoopedAttention(nn.Module):
    """Causal self-attention with RoPE, grouped heads, and the families' qk-norms and biases."""

    def __init__(self, config: LoopedConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        d_head, heads, kv_heads = (
            config.head_dim or 0,
            config.num_attention_heads,
            config.num_key_value_heads or 0,
        )
        self.head_dim, self.num_key_value_groups = d_head, heads // kv_heads
        self.scaling, self.attention_dropout = d_head**-0.5, config.attention_dropout
        qk_bias = config.qk_bias or config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, heads * d_head, bias=qk_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * d_head, bias=qk_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * d_head, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * d_head, config.hidden_size, bias=config.attention_bias)
        if config.qk_norm == "full":
            self.q_norm = LoopedRMSNorm(heads * d_head, config.rms_norm_eps)
            self.k_norm = LoopedRMSNorm(kv_heads * d_head, config.rms_norm_eps)
        elif config.qk_norm == "head":
            self.q_norm = LoopedRMSNorm(d_head, config.rms_norm_eps)
            self.k_norm = LoopedRMSNorm(d_head, config.rms_norm_eps)
        elif config.qk_norm == "head_after_rope":
            self.q_norm, self.k_norm = UnitRMSNorm(config.rms_norm_eps), UnitRMSNorm(config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within [batch pos d_model]; returns the output and, under eager, the pattern."""
        norm, shape = self.config.qk_norm, (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.view(shape).transpose(1, 2) for x in (q, k, v))
        if norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if norm == "head_after_rope":
            q, k = self.q_norm(q), self.k_norm(k)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        out, pattern = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), pattern


class LoopedMLP(nn.Module):
    """Gated or plain MLP."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        d_model, d_mlp, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        if config.gated_mlp:
            self.gate_proj = nn.Linear(d_model, d_mlp, bias=bias)
        self.up_proj = nn.Linear(d_model, d_mlp, bias=bias)
        self.down_proj = nn.Linear(d_mlp, d_model, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.gated = config.gated_mlp

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch pos d_model] to itself."""
        if self.gated:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.act_fn(self.up_proj(x)))


class LoopedBlock(GradientCheckpointingLayer):
    """One transformer block with the residual convention of its family."""

    def __init__(self, config: LoopedConfig, layer_idx: int) -> None:
        super().__init__()
        self.convention = config.block_norm
        self.self_attn = LoopedAttention(config, layer_idx)
        self.mlp = LoopedMLP(config)
        if self.convention != "post_branch":
            self.attn_norm = LoopedRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.mlp_norm = LoopedRMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.convention != "pre":
            self.attn_post_norm = LoopedRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.mlp_post_norm = LoopedRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map the stream [batch pos d_model] to itself."""
        x, convention = hidden_states, self.convention
        branch, _ = self.self_attn(x if convention == "post_branch" else self.attn_norm(x), **kwargs)
        if convention == "post_residual":
            x = self.attn_post_norm(branch + x)
        else:
            x = x + (branch if convention == "pre" else self.attn_post_norm(branch))
        branch = self.mlp(x if convention == "post_branch" else self.mlp_norm(x))
        if convention == "post_residual":
            return self.mlp_post_norm(branch + x)
        return x + (branch if convention == "pre" else self.mlp_post_norm(branch))


class LinearInjection(nn.Module):
    """W [state; e], the state first."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.adapter = nn.Linear(2 * d_model, d_model, bias=False)

    def forward(self, state: Tensor, e: Tensor) -> Tensor:
        """Mix two streams [batch pos d_model]."""
        return self.adapter(torch.cat([state, e.to(state.dtype)], dim=-1))


class AddInjection(nn.Module):
    """state + e."""

    def forward(self, state: Tensor, e: Tensor) -> Tensor:
        """Mix two streams [batch pos d_model]."""
        return state + e


class DiagonalInjection(nn.Module):
    """exp(-dt A) state + dt (e B^T), dt = softplus(dt_bias), A = exp(A_log), as in Parcae."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(d_model))
        self.dt_bias = nn.Parameter(torch.zeros(d_model))
        self.B = nn.Parameter(torch.eye(d_model))

    def forward(self, state: Tensor, e: Tensor) -> Tensor:
        """Mix two streams [batch pos d_model]."""
        dt = nn.functional.softplus(self.dt_bias)
        return torch.exp(-dt * torch.exp(self.A_log)) * state + dt * (e @ self.B.T)
