"""The native model's attention with hooks: the model's own attention until someone changes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import (
    ALiBiJointQKVAttentionBridge,
    AttentionBridge,
    PositionEmbeddingsAttentionBridge,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    apply_rotary_pos_emb,
    eager_attention_forward,
    repeat_kv,
)


class LoopedAttentionBridge(PositionEmbeddingsAttentionBridge):
    """Fires transformer-lens' hooks around the attention that the model itself runs.

    transformer-lens' own bridge computes the output from the pattern that it exposes. Here scores
    and pattern are computed only if hooked, and the output comes from the model's own attention
    (e.g. SDPA) unless a hook changed them: looking changes nothing, bit for bit, and costs less.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Attend within [batch pos d_model]; returns the output and, if hooked, the pattern."""
        if self._runs_stock():
            return super().forward(*args, **kwargs)
        attn: Any = self.original_component
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        positions, mask = kwargs.pop("position_embeddings"), kwargs.pop("attention_mask", None)
        hidden = self.hook_in(hidden)
        shape = (*hidden.shape[:-1], -1, attn.head_dim)
        q, k, v = self.q(hidden), self.k(hidden), self.v(hidden)
        if self._qk_norm_phase == "pre_reshape":
            q, k = self.hook_q_normed(self.q_norm(q)), self.hook_k_normed(self.k_norm(k))
        q, k, v = (x.view(shape).transpose(1, 2) for x in (q, k, v))
        after_rope = bool(getattr(self.config, "qk_norm_after_rope", False))
        per_head = self._qk_norm_phase == "post_reshape"
        if per_head and not after_rope:
            q, k = self.hook_q_normed(self.q_norm(q)), self.hook_k_normed(self.k_norm(k))
        q, k = apply_rotary_pos_emb(q, k, *self._apply_position_embedding_hooks(positions))
        q, k = self.hook_rot_q(q), self.hook_rot_k(k)
        if per_head and after_rope:
            q, k = self.hook_q_normed(self.q_norm(q)), self.hook_k_normed(self.k_norm(k))
        k, v = self._update_kv_cache(k, v, **kwargs)
        seen, pattern, kept = self._seen(q, k, v, mask, attn)
        out: Any = seen
        if kept:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                attn.config._attn_implementation, eager_attention_forward
            )
            out, _ = attend(attn, q, k, v, mask, dropout=0.0, scaling=attn.scaling)
            if seen is not None:
                out = ValueAndGraph.apply(out.detach(), seen)
        out = self.o(out.reshape(*hidden.shape[:-1], -1).contiguous())
        return self.hook_out(out), pattern

    def _runs_stock(self) -> bool:
        flags = ("use_split_qkv_input", "use_attn_in", "use_attn_result")
        return (
            self.compatibility_mode
            or any(getattr(self.config, flag, False) for flag in flags)
            or (self.training and self.original_component.attention_dropout > 0)  # type: ignore[union-attr]
        )

    def _seen(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attn: Any
    ) -> tuple[Tensor | None, Tensor | None, bool]:
        """Scores and pattern as their hooks see them.

        Returns:
            The output that follows from them, where it is needed; the pattern, if hooked; and
            whether the hooks left everything as it was.
        """
        if not (self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks()):
            return None, None, True
        scores = torch.matmul(q, repeat_kv(k, attn.num_key_value_groups).transpose(-2, -1)) * attn.scaling
        scores = self._apply_reconstruct_attention_mask(scores, mask, k.shape[-2], q.shape[-2])
        scores, scores_kept = show(self.hook_attn_scores, scores)
        pattern = torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        pattern, pattern_kept = show(self.hook_pattern, pattern)
        kept = scores_kept and pattern_kept
        if kept and not pattern.requires_grad:
            return None, pattern, True
        out = torch.matmul(pattern, repeat_kv(v, attn.num_key_value_groups))
        return out.transpose(1, 2).contiguous(), pattern, kept


class ValueAndGraph(torch.autograd.Function):
    """One tensor's value with another's derivative, where both are the same up to rounding."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, graph: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[1]


class _EitherCacheName:
    """Over a transformer-lens attention: finds the key-value cache under transformers' newer name.

    transformers 5.24 calls it ``cache``; transformer-lens 4.3 looks for ``past_key_values`` alone, and
    silently attends to the new tokens only.
    """

    def _update_kv_cache(self, k: Tensor, v: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if kwargs.get("past_key_values") is None and kwargs.get("cache") is not None:
            kwargs["past_key_values"] = kwargs["cache"]
        return super()._update_kv_cache(k, v, **kwargs)  # type: ignore[misc]


class _AlibiOnce:
    """Over transformer-lens' ALiBi attention: under SDPA transformers' Falcon has the bias in the mask alone."""

    def _reconstruct_attention(self: Any, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        config = getattr(self.original_component, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            kwargs["alibi"] = None
        return super()._reconstruct_attention(q, k, v, **kwargs)  # type: ignore[misc]


def take_what_transformers_passes(block: nn.Module) -> None:
    """Let a block's attention read the key-value cache and the biases that transformers passes it."""
    for module in block.modules():
        if isinstance(module, AttentionBridge):
            mix_in(module, _EitherCacheName)
        if isinstance(module, ALiBiJointQKVAttentionBridge):
            mix_in(module, _AlibiOnce)


def mix_in(module: nn.Module, mixin: type) -> None:
    """Put a class over a module's own, once."""
    own = type(module)
    if not issubclass(own, mixin):
        both: Any = type(own.__name__, (mixin, own), {"__module__": own.__module__})
        module.__class__ = both


def show(point: HookPoint, value: Tensor) -> tuple[Tensor, bool]:
    """What a hook point makes of a value, and whether it is known to have left it as it was."""
    before = value.clone() if value.is_inference() else value  # inference tensors count no versions
    version = None if value.is_inference() else value._version
    seen = point(value)
    kept = seen is value if before is value else torch.equal(seen, before)
    return seen, kept and (version is None or value._version == version)
