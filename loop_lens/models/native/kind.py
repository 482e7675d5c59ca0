"""The native looped decoder as a kind: built from a config and weights, unrolled by `NativeBody`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from loop_lens.models.checkpoint import Checkpoint, WeightsError, require_blocks
from loop_lens.models.files import reading
from loop_lens.models.kind import Kind, Unrolled, bridge_config
from loop_lens.models.native.adapter import LoopedAdapter
from loop_lens.models.native.body import NativeBody
from loop_lens.models.native.config import LoopedConfig
from loop_lens.models.native.modeling import LoopedTransformer
from loop_lens.models.published.families import family_of
from loop_lens.models.published.weights import same, to_native


class NativeKind(Kind):
    """`LoopedTransformer`, under its own names or those of the family that its config names."""

    model_types = (LoopedConfig.model_type,)
    classes = (LoopedConfig, LoopedTransformer)

    def load(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype | None, attn_implementation: str | None
    ) -> LoopedTransformer:
        """The model of a checkpoint that `LoopedTransformer` saved."""
        with reading(checkpoint.config_path):
            config = LoopedConfig.from_dict(checkpoint.config)
        return build_native(
            config,
            checkpoint.weights,
            dtype=dtype,
            attn_implementation=attn_implementation,
            source=checkpoint.name,
        )

    def unroll(self, model: LoopedTransformer, *, name: str, tokenizer: Any) -> Unrolled:
        """The model with its `NativeBody`."""
        adapter = LoopedAdapter(bridge_config(model, name), model.config)
        adapter.cfg.default_prepend_bos = _prepends_bos(model.config, tokenizer)
        return Unrolled(model, NativeBody(model), adapter)


NATIVE = NativeKind()


def _prepends_bos(config: LoopedConfig, tokenizer: Any) -> bool:
    family = family_of(config)
    if family is not None:
        return family.prepends_bos
    return tokenizer is None or tokenizer.bos_token is not None or config.bos_token_id is not None


def build_native(
    config: LoopedConfig,
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    source: str,
) -> LoopedTransformer:
    """A native model with weights under its own names or its family's.

    Raises:
        WeightsError: If weights are missing, unknown or misshapen.
        UnreadableError: If no model can be made of the config.
    """
    require_blocks(source, config, weights)
    with reading(f"{source}: its config.json"), torch.device("meta"):
        model = LoopedTransformer(config)
    native = model.state_dict()
    family = family_of(config)
    if family is not None and not set(weights) <= set(native):
        with torch.device("meta"):
            derived = set(family.derived(config))
        entries = family.entries(config)
    else:
        entries, derived = [same(name, name) for name in native], set[str]()
    if config.tie_word_embeddings and "lm_head.weight" not in weights:
        entries = [entry for entry in entries if entry.native != ("lm_head.weight",)]
    loaded = to_native(weights, entries, native, ignored=derived, source=source)
    if dtype is not None:
        loaded = {name: t.to(dtype) if t.is_floating_point() else t for name, t in loaded.items()}
    model.load_state_dict(loaded, strict=False, assign=True)
    with reading(f"{source}: its config.json"):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)  # pyright: ignore[reportArgumentType]
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise WeightsError(f"{source} does not hold {name}")
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    return model.eval()
