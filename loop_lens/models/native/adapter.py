"""Architecture adapters: how transformer-lens reads the blocks of looped models."""

from __future__ import annotations

from typing import Any

from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    MLPBridge,
    RMSNormalizationBridge,
    RotaryEmbeddingBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from loop_lens.models.native.attention import LoopedAttentionBridge
from loop_lens.models.native.config import LoopedConfig

_NORM_NAMES = {
    "pre": {"ln1": "attn_norm", "ln2": "mlp_norm"},
    "sandwich": {
        "ln1": "attn_norm",
        "ln1_post": "attn_post_norm",
        "ln2": "mlp_norm",
        "ln2_post": "mlp_post_norm",
    },
    "post_branch": {"ln1_post": "attn_post_norm", "ln2_post": "mlp_post_norm"},
    # Not called ln1_post: transformer-lens takes that for a norm of the branch and would move
    # hook_attn_out behind it, but here it is a norm of the stream.
    "post_residual": {
        "ln1": "attn_norm",
        "ln1_resid": "attn_post_norm",
        "ln2": "mlp_norm",
        "ln2_resid": "mlp_post_norm",
    },
}


class LoopedAdapter(ArchitectureAdapter):
    """Reads the native looped decoder.

    The path ``model.layers`` exists while a bridge is built only: it holds one prototype of every
    physical block, see `loop_lens.bridge.firings`.
    """

    supports_hf_output_attentions = False

    def __init__(self, cfg: TransformerBridgeConfig, native: LoopedConfig) -> None:
        super().__init__(cfg)
        self._set_rms_rotary_defaults(gated=native.gated_mlp)
        if native.qk_norm == "head_after_rope":
            self.cfg.qk_norm_after_rope = True
        self.logit_scale = native.logit_scale
        self.supports_fold_ln = native.block_norm == "pre"
        self.weight_processing_conversions = {**self._qkvo_weight_conversions()}
        submodules: dict[str, GeneralizedComponent] = {
            name: RMSNormalizationBridge(name=module, config=self.cfg)
            for name, module in _NORM_NAMES[native.block_norm].items()
        }
        submodules["attn"] = self._attention(native)
        submodules["mlp"] = self._gated_mlp() if native.gated_mlp else self._plain_mlp()
        self.component_mapping = {
            "embed": EmbeddingBridge(name="model.embed_tokens"),
            "rotary_emb": RotaryEmbeddingBridge(name="model.rotary_emb"),
            "blocks": BlockBridge(name="model.layers", submodules=submodules),
            "ln_final": RMSNormalizationBridge(name="model.norm", config=self.cfg),
            "unembed": UnembeddingBridge(name="lm_head", config=self.cfg),
        }

    def apply_output_logits_transform(self, logits: Any) -> Any:
        """Scale logits as the model does."""
        return super().apply_output_logits_transform(logits) * self.logit_scale

    def _attention(self, native: LoopedConfig) -> LoopedAttentionBridge:
        parts: dict[str, GeneralizedComponent] = {p: LinearBridge(name=f"{p}_proj") for p in "qkvo"}
        if native.qk_norm != "none":
            for p in "qk":
                parts[f"{p}_norm"] = RMSNormalizationBridge(name=f"{p}_norm", config=self.cfg)
        return LoopedAttentionBridge(name="self_attn", config=self.cfg, submodules=parts)

    def _plain_mlp(self) -> MLPBridge:
        parts: dict[str, GeneralizedComponent] = {
            "in": LinearBridge(name="up_proj"),
            "out": LinearBridge(name="down_proj"),
        }
        return MLPBridge(name="mlp", config=self.cfg, submodules=parts)
