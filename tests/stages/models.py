"""Feed-forward references for the stages of looped models."""

from __future__ import annotations

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from tests.oracles.unrolled import decoder


def feed_forward(name: str) -> TransformerBridge:
    """A tiny random decoder of one architecture, as transformer-lens opens it."""
    torch.manual_seed(0)
    module = decoder(name)
    return build_bridge_from_module(module, type(module).__name__, hf_config=module.config, tokenizer=None)
