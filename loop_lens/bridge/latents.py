"""Key-value caches of multi-head latent attention (DeepSeek, GLM), as blocks hooked inside use them.

transformers caches latents, from which keys and values are expanded anew at every step; transformer-lens 4.3 caches
keys and values, and only under a name that transformers 5.24 no longer uses.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import MLAAttentionBridge

from loop_lens.models.native.attention import mix_in
from loop_lens.unrolling.calls import additive


class _LatentCache:
    """A cache of latents that takes and gives keys and values [batch head pos d_head]."""

    def __init__(self, cache: Any, attention: Any, latents: list[Tensor]) -> None:
        self._cache, self._attention, self._latents = cache, attention, latents

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Add the latents of these keys and values; returns all keys and values."""
        latent, rotated = self._latents[0].unsqueeze(1), keys[:, :1, :, self._attention.qk_nope_head_dim :]
        own = self._expand(latent, rotated)
        if not all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(own, (keys, values), strict=True)
        ):
            raise ValueError(
                "the key-value cache of this attention holds latents, so it cannot keep what a hook made of keys "
                "or values: patch hook_kv_latent or hook_rot_k, or run without a cache (use_past_kv_cache=False)"
            )
        return self._expand(*self._cache.update(latent, rotated, layer_idx))

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        """Add keys of the indexer; returns all of them."""
        return self._cache.update_indexer(keys, layer_idx)

    def _expand(self, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of latents [batch 1 pos rank] and rotated keys [batch 1 pos d_rope]."""
        attention = self._attention
        sizes = [attention.qk_nope_head_dim, attention.v_head_dim]
        project = attention.kv_b_proj
        project = getattr(project, "original_component", project)  # its hooks have seen these tokens
        both = project(latent.squeeze(1)).unflatten(-1, (-1, sum(sizes))).transpose(1, 2)
        plain, values = both.split(sizes, dim=-1)
        return torch.cat([plain, rotated.expand(*plain.shape[:-1], -1)], dim=-1), values


class _KeepsLatents:
    """Over a transformer-lens latent attention: its key-value cache is the model's own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        attention: Any = self.original_component  # type: ignore[attr-defined]
        mask, cache = kwargs.get("attention_mask"), kwargs.pop("cache", None)
        if mask is not None and mask.dtype == torch.bool:
            kwargs["attention_mask"] = additive(mask, attention.o_proj.weight.dtype)  # it is added to scores
        cache = kwargs.pop("past_key_values", None) if cache is None else cache
        if cache is None or not hasattr(attention, "expand_kv"):
            return super().forward(*args, past_key_values=cache, **kwargs)  # type: ignore[misc]
        latents, thread = list[Tensor](), threading.get_ident()

        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if threading.get_ident() == thread:
                latents.append(inputs[0])

        handle = attention.kv_b_proj.register_forward_pre_hook(note)
        try:
            kwargs["past_key_values"] = _LatentCache(cache, attention, latents)
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            handle.remove()


class _LongIndices:
    """Over the indexer of sparse attention: transformer-lens scatters with its indices, which takes int64."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs).long()  # type: ignore[misc]


def keep_latents(block: nn.Module) -> None:
    """Let a block's latent attention use the model's own key-value cache."""
    for module in block.modules():
        if isinstance(module, MLAAttentionBridge):
            mix_in(module, _KeepsLatents)
            indexer = getattr(module.original_component, "indexer", None)
            if isinstance(indexer, nn.Module):
                mix_in(indexer, _LongIndices)
