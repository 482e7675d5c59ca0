"""One small model of every kind of loop, opened, and what says the right thing about it: its bare copy."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, HrmTextConfig, HrmTextForCausalLM

import loop_lens
from loop_lens import HookedLoopedTransformer
from tests.oracles.twin import VOCAB, randomize, small_looped

TOKENS = torch.randint(0, VOCAB - 2, (2, 6), generator=torch.Generator().manual_seed(1))
KINDS = ("native", "hrm", "window")


@dataclass
class Pair:
    """An open model and a bare one with the same weights, never opened."""

    model: HookedLoopedTransformer
    bare: Any
    kind: str

    def expected(self, tokens: Tensor, recurrences: int) -> Tensor:
        """The bare model's logits at a number of iterations."""
        if self.kind == "window":
            return _window(self.bare, tokens, recurrences)
        bare = copy.deepcopy(self.bare)
        if self.kind == "native":
            bare.config.recurrences = recurrences
        else:
            bare.config.H_cycles = recurrences
            bare.config.num_hidden_layers = 2 * recurrences * (bare.config.L_cycles + 1)
        return bare(tokens).logits


def pair(kind: str, times: int = 3) -> Pair:
    """A pair of a kind, at three iterations of its outer loop."""
    torch.manual_seed(0)
    if kind == "native":
        bare: Any = small_looped(recurrences=times)
    elif kind == "hrm":
        sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 3}
        config = HrmTextConfig(
            vocab_size=VOCAB,
            num_layers_per_stack=2,
            H_cycles=times,
            L_cycles=2,
            num_key_value_heads=3,
            **sizes,
        )
        config.num_hidden_layers = 2 * times * 3
        bare = HrmTextForCausalLM(config).eval()
        randomize(bare)
    else:
        bare = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_layer=4, n_embd=24, n_head=3)).eval()
        randomize(bare)
        bare.set_attn_implementation("eager")
        opened = loop_lens.loopify(copy.deepcopy(bare), layers=[1, 2], times=times)
        return Pair(opened, bare, kind)
    return Pair(loop_lens.wrap(copy.deepcopy(bare)), bare, kind)


def _window(gpt2: GPT2LMHeadModel, tokens: Tensor, times: int) -> Tensor:
    """GPT-2 with layers 1 and 2 run several times, as a longer list of the same layers."""
    unrolled = copy.deepcopy(gpt2)
    layers = unrolled.transformer.h
    unrolled.transformer.h = torch.nn.ModuleList([layers[i] for i in [0, *[1, 2] * times, 3]])
    return unrolled(tokens, use_cache=False).logits
