"""How transformer-lens reads HRM-Text."""

from __future__ import annotations

from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    PositionEmbeddingsAttentionBridge,
    RMSNormalizationBridge,
    RotaryEmbeddingBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent


class HrmTextLoopedAdapter(ArchitectureAdapter):
    """Reads transformers' HRM-Text with both stacks in one list of blocks."""

    supports_hf_output_attentions = False
    supports_fold_ln = False

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        self._set_rms_rotary_defaults()
        self.weight_processing_conversions = {**self._qkvo_weight_conversions()}
        parts: dict[str, GeneralizedComponent] = {p: LinearBridge(name=f"{p}_proj") for p in "qkvo"}
        parts["gate"] = LinearBridge(name="gate_proj")
        submodules: dict[str, GeneralizedComponent] = {
            "ln1": RMSNormalizationBridge(name="input_layernorm", config=self.cfg),
            "ln2": RMSNormalizationBridge(name="post_attention_layernorm", config=self.cfg),
            "attn": PositionEmbeddingsAttentionBridge(name="self_attn", config=self.cfg, submodules=parts),
            "mlp": self._gated_mlp(),
        }
        self.component_mapping = {
            "embed": EmbeddingBridge(name="model.embed_tokens"),
            "rotary_emb": RotaryEmbeddingBridge(name="model.rotary_emb", config=self.cfg),
            "blocks": BlockBridge(name="model.layers", submodules=submodules),
            # The high-level stack ends in it; only its last run is the model's final norm.
            "ln_final": RMSNormalizationBridge(name="model.H_module.final_norm", config=self.cfg),
            "unembed": UnembeddingBridge(name="lm_head", config=self.cfg),
        }
