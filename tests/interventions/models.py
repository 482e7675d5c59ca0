"""Looped models of every family, and patches by hand as the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import loop_lens
from loop_lens import HookedLoopedTransformer
from tests.conftest import GOLDENS
from tests.oracles.twin import small_looped, tokenizer
from tests.oracles.unrolled import decoder

FAMILIES = ("huginn", "ouro", "retrofit_llama", "retrofit_olmo", "hrm_text")
MODELS: dict[str, Callable[[], HookedLoopedTransformer]] = {
    **{name: (lambda name=name: loop_lens.boot(GOLDENS / name)) for name in FAMILIES},
    "looped_llama": lambda: loop_lens.loopify(decoder("llama"), layers=[2, 3], times=3),
    "looped_mistral": lambda: loop_lens.loopify(decoder("mistral"), layers=[2, 3], times=2),
    "looped_gpt2": lambda: loop_lens.loopify(decoder("gpt2"), layers=[2, 3], times=3),
    "damped_llama": lambda: loop_lens.loopify(decoder("llama"), layers=[2, 3], times=3, rule="euler"),
    "anchored_llama": lambda: loop_lens.loopify(
        decoder("llama"), layers=[2, 3], times=3, rule="input_anchor", alpha=0.7
    ),
    "no_prelude": lambda: wrapped(prelude_layers=0, injection="add", initial_state="noise"),
    "given_state": lambda: given_state(),
}


def wrapped(**options: Any) -> HookedLoopedTransformer:
    """A small native model, opened."""
    return loop_lens.wrap(small_looped(**options), tokenizer=tokenizer())


def given_state() -> HookedLoopedTransformer:
    """A model whose state before iteration 0 is a tensor, one per prompt."""
    model = wrapped(injection="linear", initial_state="noise")
    model.initial_state = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(5))
    return model


def opened(name: str) -> HookedLoopedTransformer:
    """A model by name, with seeded weights."""
    torch.manual_seed(0)
    return MODELS[name]()


def prompts(model: HookedLoopedTransformer, n: int = 2, length: int = 7) -> tuple[Tensor, Tensor]:
    """Clean and corrupted tokens that share their first two positions."""
    generator = torch.Generator().manual_seed(3)
    clean, corrupted = torch.randint(1, model.cfg.d_vocab, (2, n, length), generator=generator)
    corrupted[:, :2] = clean[:, :2]
    return clean, corrupted


def difference(logits: Tensor) -> Tensor:
    """Logit difference at the last position [prompt]."""
    return logits[:, -1, 3] - logits[:, -1, 5]


def by_hand(model: HookedLoopedTransformer, tokens: Tensor, patch: dict[str, Callable[..., Any]]) -> Tensor:
    """One whole forward with torch-like hooks; the metric of each prompt."""
    return difference(model.run_with_hooks(tokens, fwd_hooks=list(patch.items())))
