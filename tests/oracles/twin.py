"""An untied twin: a looped model's weights copied per firing into an ordinary Llama."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import loop_lens
from loop_lens import HookedLoopedTransformer, LoopedConfig, LoopedTransformer

VOCAB = 48


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0, w1, ... as tokens."""
    vocab = {f"w{i}": i for i in range(VOCAB - 2)} | {"<s>": VOCAB - 2, "</s>": VOCAB - 1}
    words = Tokenizer(WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        name_or_path="words",
        add_bos_token=True,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="w0",
    )


def randomize(model: torch.nn.Module, scale: float = 1.0) -> None:
    """Weights of a size that keeps streams O(1); norms and biases too, since ones hide errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(scale * noise * parameter.shape[-1] ** -0.5)


def small_looped(**options: Any) -> LoopedTransformer:
    """A small looped model with random weights of every kind."""
    defaults: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_attention_heads": 3,
        "prelude_layers": 1,
        "core_layers": 2,
        "coda_layers": 1,
        "recurrences": 3,
    }
    model = LoopedTransformer(LoopedConfig(**(defaults | options))).eval()
    randomize(model)
    model.set_attn_implementation("eager")
    return model


def looped_llama_twin(seed: int = 0, **options: Any) -> tuple[HookedLoopedTransformer, Any]:
    """A Llama with a window of its layers looped, and its twin with really copied layers."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_attention_heads": 3,
        "attn_implementation": "eager",
        **options,
    }
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes)).eval()
    randomize(llama)
    order = [0, *[1, 2] * 3, 3]
    copies = LlamaForCausalLM(LlamaConfig(num_hidden_layers=len(order), **sizes)).eval()
    weights = {n: t for n, t in llama.state_dict().items() if "layers" not in n}
    for index, layer in enumerate(order):
        for name, tensor in llama.model.layers[layer].state_dict().items():
            weights[f"model.layers.{index}.{name}"] = tensor.clone()
    copies.load_state_dict(weights)
    twin = build_bridge_from_module(
        copies, "LlamaForCausalLM", hf_config=copies.config, tokenizer=tokenizer()
    )
    return loop_lens.loopify(llama, layers=[1, 2], times=3, tokenizer=tokenizer()), twin


def untied_twin(seed: int = 0, **options: Any) -> tuple[HookedLoopedTransformer, Any]:
    """The looped model under loop_lens, and its twin under transformer-lens' own bridge."""
    torch.manual_seed(seed)
    model = small_looped(injection="none", initial_state="prelude", **options)
    config, schedule = model.config, model.config.schedule()
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            num_hidden_layers=len(schedule),
            rms_norm_eps=config.rms_norm_eps,
            attn_implementation="eager",
        )
    ).eval()
    blocks = [*model.model.prelude, *model.model.core, *model.model.coda]
    weights = {
        "model.embed_tokens.weight": model.model.embed_tokens.weight,
        "model.norm.weight": model.model.norm.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    for firing in schedule:
        for name, tensor in blocks[firing.block].state_dict().items():
            theirs = name.replace("attn_norm", "input_layernorm")
            theirs = theirs.replace("mlp_norm", "post_attention_layernorm")
            weights[f"model.layers.{firing.index}.{theirs}"] = tensor
    llama.load_state_dict({name: tensor.detach().clone() for name, tensor in weights.items()})
    twin = build_bridge_from_module(llama, "LlamaForCausalLM", hf_config=llama.config, tokenizer=tokenizer())
    return loop_lens.wrap(model, tokenizer=tokenizer()), twin
