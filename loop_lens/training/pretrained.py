"""Turn a pretrained feed-forward language model into a looped one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loop_lens.models.native.config import LoopedConfig
from loop_lens.models.native.layers import LinearInjection
from loop_lens.models.native.modeling import LoopedTransformer


@dataclass(frozen=True)
class _Kind:
    """How an architecture's blocks are written in the native model: fields, and names of its norms."""

    norms: dict[str, str]
    fields: dict[str, Any]


_PRE = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
_POST = {"post_attention_layernorm": "attn_post_norm", "post_feedforward_layernorm": "mlp_post_norm"}
KINDS = {
    "llama": _Kind(_PRE, {}),
    "mistral": _Kind(_PRE, {}),
    "qwen2": _Kind(_PRE, {"attention_bias": True}),
    "qwen3": _Kind(_PRE, {"qk_norm": "head"}),
    "olmo2": _Kind(_POST, {"block_norm": "post_branch", "qk_norm": "full"}),
}
"""Architectures that the native model can express, by ``model_type``."""


@torch.no_grad()
def retrofit(
    model: PreTrainedModel,
    *,
    recurrences: int,
    prelude: Sequence[int] = range(0, 4),
    core: Sequence[int] = range(6, 12),
    coda: Sequence[int] = range(12, 16),
    injection: str = "linear",
) -> LoopedTransformer:
    """Make a looped model of a pretrained decoder's layers; its weights are copied.

    The loop starts from the prelude's output, and the adapter starts as [I, 0], the identity on the state: at
    one iteration the looped model computes what the base model computes without the layers left out.

    Args:
        model: A Llama (SmolLM2 is one), Mistral, Qwen2, Qwen3 or OLMo2 of transformers.
        recurrences: Number of iterations.
        prelude: Layers before the loop. The defaults are the published split of a model of 16 layers.
        core: Layers of the loop.
        coda: Layers after it.
        injection: ``"linear"``, or ``"none"`` for a loop that never sees the prelude's output again.

    Returns:
        The looped model, in eval mode, with the base model's dtype and device. Qwen2's output projections get a
        bias of zero, since the native model has biases on all four projections or on none.

    Raises:
        ValueError: If layers do not exist, or the native model cannot express the architecture.

    Source:
        McLeish et al., arXiv 2511.07384 (the split of 16 layers). There the state starts from noise and the
        adapter from random weights.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        >>> llama = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=4, **size))
        >>> split = {"prelude": [0], "core": [1, 2], "coda": [3]}
        >>> looped = loop_lens.training.retrofit(llama, recurrences=3, **split)
        >>> looped.config.core_layers, looped.config.recurrences
        (2, 3)
    """
    config = model.config
    kind = _kind_of(config)
    layers = _layers(config.num_hidden_layers, prelude=prelude, core=core, coda=coda)
    if injection not in ("linear", "none"):
        raise ValueError(f"injection={injection!r} would change the base model: choose 'linear' or 'none'")
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None),
        "hidden_act": config.hidden_act,
        **{f"{segment}_layers": len(chosen) for segment, chosen in layers.items()},
        "recurrences": recurrences,
        "injection": injection,
        "initial_state": "prelude",
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": dict(config.rope_parameters),
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": bool(getattr(config, "attention_bias", False)),
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        **{name: getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        **kind.fields,
    }
    made = LoopedTransformer(LoopedConfig(**fields))
    cast(nn.Module, made).to(model.device, model.dtype)
    weights = _weights(model.state_dict(), layers, kind)
    if injection == "linear":
        eye = torch.eye(config.hidden_size)
        adapter = made.model.injection
        assert isinstance(adapter, LinearInjection)
        adapter.adapter.weight.copy_(torch.cat([eye, torch.zeros_like(eye)], dim=1))
    _fill(made, weights)
    return made.eval()


def _kind_of(config: Any) -> _Kind:
    if config.model_type not in KINDS:
        raise ValueError(
            f"a {config.model_type!r} model cannot be retrofitted: the native model expresses {', '.join(KINDS)}"
        )
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or [])
    if (window is not None and getattr(config, "use_sliding_window", True)) or "sliding_attention" in types:
        raise ValueError(
            f"the model attends within a window of {window} positions, which the native model cannot express: "
            "set sliding_window=None in its config where prompts are shorter than that"
        )
    return KINDS[config.model_type]


def _layers(n: int, **segments: Sequence[int]) -> dict[str, list[int]]:
    for name, chosen in segments.items():
        outside = [layer for layer in chosen if not 0 <= layer < n]
        if outside:
            raise ValueError(f"{name} layer {outside[0]} does not exist: the model has layers 0-{n - 1}")
    if not segments["core"]:
        raise ValueError("core is empty: give the layers to loop, e.g. range(6, 12)")
    return {name: list(chosen) for name, chosen in segments.items()}


def _weights(base: dict[str, Tensor], layers: dict[str, list[int]], kind: _Kind) -> dict[str, Tensor]:
    """The base model's tensors under native names."""
    weights = {
        name: base[name] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    }
    for segment, chosen in layers.items():
        for i, layer in enumerate(chosen):
            prefix = f"model.layers.{layer}."
            for name, tensor in base.items():
                if name.startswith(prefix):
                    part, _, rest = name.removeprefix(prefix).partition(".")
                    weights[f"model.{segment}.{i}.{kind.norms.get(part, part)}.{rest}"] = tensor
    return weights


def _fill(made: LoopedTransformer, weights: dict[str, Tensor]) -> None:
    parameters = dict(made.named_parameters(remove_duplicate=False))
    unknown = sorted(set(weights) - set(parameters))
    missing = sorted(set(parameters) - set(weights) - {"model.injection.adapter.weight"})
    unset = [name for name in missing if not name.endswith("o_proj.bias")]
    if unknown or unset:
        raise ValueError(
            f"the base model has weights that do not fit its architecture's blocks: {', '.join((unknown + unset)[:4])}"
        )
    for name, tensor in weights.items():
        parameters[name].copy_(tensor)
    for name in missing:
        parameters[name].zero_()
