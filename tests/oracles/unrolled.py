"""A decoder whose layers are really copied: what looping a window must compute."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers as hf

PATHS = {
    "GPT2": "transformer.h",
    "GPTNeoX": "gpt_neox.layers",
    "GPTJ": "transformer.h",
    "OPT": "model.decoder.layers",
}


def _sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **more,
    }


def _gpt(**more: Any) -> dict[str, Any]:
    tokens = {"bos_token_id": None, "eos_token_id": None}
    return {"vocab_size": 64, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64, **tokens, **more}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _sizes(num_key_value_heads=2)),
    "qwen2": ("Qwen2", _sizes(num_key_value_heads=2)),
    "qwen3": ("Qwen3", _sizes(num_key_value_heads=2, head_dim=8)),
    "mistral": ("Mistral", _sizes(num_key_value_heads=2, sliding_window=4)),
    "gemma2": ("Gemma2", _sizes(num_key_value_heads=2, head_dim=8, sliding_window=4)),
    "olmo2": ("Olmo2", _sizes(num_key_value_heads=2)),
    "phi": ("Phi", _sizes()),
    "gpt2": ("GPT2", _gpt()),
    "gptj": ("GPTJ", _gpt(rotary_dim=4)),
    "gpt_neox": ("GPTNeoX", _sizes()),
    "opt": (
        "OPT",
        {k: v for k, v in _sizes(ffn_dim=48, word_embed_proj_dim=32).items() if k != "intermediate_size"},
    ),
}

_BLOOM = {
    "vocab_size": 64,
    "hidden_size": 32,
    "n_layer": 6,
    "n_head": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}

FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": MODELS["gpt2"],
    "gpt_neox": MODELS["gpt_neox"],
    "phi3": ("Phi3", _sizes(num_key_value_heads=2)),
    "glm": ("Glm", _sizes(num_key_value_heads=2, head_dim=8)),
    "bloom": ("Bloom", _BLOOM),
    "codegen": ("CodeGen", _gpt(rotary_dim=4, n_ctx=64)),
    "gpt_bigcode": ("GPTBigCode", _gpt()),
    "mpt": ("Mpt", {"vocab_size": 64, "d_model": 32, "n_layers": 6, "n_heads": 4, "max_seq_len": 64}),
    "falcon": ("Falcon", _sizes(multi_query=False)),
    "falcon, one key head": ("Falcon", _sizes(multi_query=True, alibi=True)),
}
"""Architectures whose queries, keys and values, or gates, come from one fused projection."""


def decoder(name: str) -> Any:
    """A tiny random decoder of one architecture."""
    family, sizes = (MODELS | FUSED)[name]
    heads = {"GPT2": "LMHeadModel"}.get(family, "ForCausalLM")
    torch.manual_seed(0)
    model = getattr(hf, f"{family}{heads}")(getattr(hf, f"{family}Config")(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.2 if parameter.ndim == 1 else 0.1) * torch.randn_like(parameter))
    return model


def layers_of(model: Any) -> tuple[Any, str]:
    """The module that holds a decoder's layers, and their name in it."""
    family = type(model).__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    parent, _, name = PATHS.get(family, "model.layers").rpartition(".")
    return model.get_submodule(parent), name


def unrolled(model: Any, order: list[int]) -> Any:
    """A copy of a decoder with copies of its layers in the given order."""
    model = copy.deepcopy(model)
    parent, name = layers_of(model)
    old = list(getattr(parent, name))
    new = [copy.deepcopy(old[i]) for i in order]
    for index, layer in enumerate(new):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    setattr(parent, name, torch.nn.ModuleList(new))
    config = model.config
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in order]
    setattr(config, "n_layer" if hasattr(config, "n_layer") else "num_hidden_layers", len(order))
    return model


def layer_outputs(model: Any, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Run a decoder and give each layer's output, by torch hooks."""
    parent, name = layers_of(model)
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    handles = [layer.register_forward_hook(keep) for layer in getattr(parent, name)]
    model(tokens)
    for handle in handles:
        handle.remove()
    return iter(seen)
