"""Norms with hooks: the model's own norm until someone changes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import NormalizationBridge

from loop_lens.models.native.attention import ValueAndGraph, mix_in, show
from loop_lens.models.native.layers import widened


class _OwnNorm(NormalizationBridge):
    """Over a transformer-lens norm: the result and its type are the module's own, whoever looks.

    transformer-lens computes the norm anew in float32, or casts its result to its input's type. Here
    scale and normalized stream are computed only if hooked, and the result follows from them only
    where a hook changed one. Where gradients are recorded they pass through both.
    """

    def _python_norm_forward(self, hidden_states: Tensor) -> Tensor:
        return self._hf_autograd_forward_with_hooks(hidden_states)

    def _hf_autograd_forward_with_hooks(self, x: Tensor) -> Tensor:
        norm: Any = self.original_component
        if isinstance(norm, nn.Identity):
            return super()._hf_autograd_forward_with_hooks(x)
        own: Tensor = norm(x)
        if not (self.hook_scale.has_hooks() or self.hook_normalized.has_hooks()):
            return own
        wide = widened(x)
        if not self.uses_rms_norm:
            wide = wide - wide.mean(-1, keepdim=True)
        square = wide.pow(2).mean(-1, keepdim=True) + self._eps(wide.dtype)
        scale, scale_kept = show(self.hook_scale, square.sqrt())
        normalized = wide / scale
        if scale_kept:  # as norms compute it, to the last bit
            exact = wide * torch.rsqrt(square)
            normalized = ValueAndGraph.apply(exact.detach(), normalized) if scale.requires_grad else exact
        normalized, kept = show(self.hook_normalized, normalized)
        kept = kept and scale_kept
        if kept and not normalized.requires_grad:
            return own
        rebuilt = self._apply_weight_and_bias(normalized, own.dtype)
        return ValueAndGraph.apply(own.detach(), rebuilt) if kept else rebuilt

    def _apply_weight_and_bias(self, hidden_states: Tensor, input_dtype: torch.dtype) -> Tensor:
        if isinstance(getattr(self.original_component, "weight", None), Tensor):
            return super()._apply_weight_and_bias(hidden_states, input_dtype)
        return hidden_states.to(input_dtype)

    def _eps(self, dtype: torch.dtype) -> Any:
        for name in ("eps", "variance_epsilon"):
            if hasattr(self.original_component, name):
                eps = getattr(self.original_component, name)
                return torch.finfo(dtype).eps if eps is None else eps
        return getattr(self.config, "eps", 1e-5)


def keep_own_norms(bridge: nn.Module) -> None:
    """Let every norm within a bridge give what its module gives."""
    for module in bridge.modules():
        if isinstance(module, NormalizationBridge):
            mix_in(module, _OwnNorm)
