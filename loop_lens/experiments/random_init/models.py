"""Looped models with random weights: three norms, with and without injection, in several initialisations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.experiments.norms import NORMS, require_one_of
from loop_lens.models.native import LoopedConfig, LoopedTransformer
from loop_lens.opening.entry import wrap

_WIDE = 2048  # d_model of Ouro-1.4B and of Llama-3.2-1B
_HUGINN_DEPTH = 132  # Huginn's effective_expected_depth: 2 + 32 * 4 + 2


@dataclass(frozen=True)
class RandomModel:
    """One model of the grid: ``layers`` blocks that are looped, without prelude and coda.

    With injection each iteration starts from a linear map of [state; embedding], and the loop from Gaussian noise;
    otherwise the loop starts from the embedding.
    """

    norm: str  # one of NORMS
    injection: bool
    layers: int
    seed: int = 0  # of the weights and of the noise
    width: int = 128  # d_model; the MLP is four times as wide, heads are 32 wide
    init: str = "huginn"  # one of INITS
    double: bool = False  # whether it computes in float64

    def __post_init__(self) -> None:
        require_one_of("norm", self.norm, NORMS)
        require_one_of("init", self.init, INITS)
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")

    @property
    def name(self) -> str:
        """A name for files."""
        kind = f"{self.norm}-{'injection' if self.injection else 'none'}-{self.layers}x"
        return f"{kind}-w{self.width}-{self.init}{'-f64' if self.double else ''}-s{self.seed}"

    @property
    def shape(self) -> tuple[Any, ...]:
        """What models must have in common for one to be given the other's weights in place."""
        return self.norm, self.injection, self.layers, self.width, self.double

    def config(self, recurrences: int) -> LoopedConfig:
        """Its configuration."""
        return LoopedConfig(
            vocab_size=512,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_attention_heads=max(1, self.width // 32),
            prelude_layers=0,
            core_layers=self.layers,
            coda_layers=0,
            recurrences=recurrences,
            injection="linear" if self.injection else "none",
            initial_state="noise" if self.injection else "prelude",
            # Huginn's initial state, at every width.
            initial_state_std=math.sqrt(2 / 5),
            **NORMS[self.norm],
        )

    def open(self, recurrences: int) -> HookedLoopedTransformer:
        """The model with its weights, which need no gradients."""
        bare = LoopedTransformer(self.config(recurrences)).eval().requires_grad_(False)
        model = wrap(bare.double() if self.double else bare)
        self.initialise(model)
        return model

    def initialise(self, model: HookedLoopedTransformer) -> None:
        """Give an opened model of the same shape this one's weights and noise, in place.

        An opened model keeps what its firings share, so this is quicker than opening another.
        """
        native: Any = model.original_model
        generator = torch.Generator().manual_seed(self.seed)
        init = INITS[self.init]
        with torch.no_grad():
            for name, module in native.named_modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    weight = module.weight
                    std = init.embedding
                    if isinstance(module, nn.Linear):
                        std = init.std(min(weight.shape), weight.shape[1])
                        std /= init.output(self.layers) if name.endswith(("o_proj", "down_proj")) else 1
                    weight.copy_(torch.randn(weight.shape, generator=generator) * std)
            if self.injection and self.init == "identity":
                eye = 0.7 * torch.eye(self.width)
                native.model.injection.adapter.weight.copy_(torch.cat([eye, eye], dim=1))
        if self.injection:
            model.initial_state = self.seed


class Init(NamedTuple):
    """An initialisation: normal distributions with these standard deviations."""

    text: str
    embedding: float
    std: Callable[[int, int], float]  # of other weights, by d_model and their number of inputs
    output: Callable[[int], float] = lambda layers: (
        1.0
    )  # output projections are divided by it, by the number of layers


def _wide(d_model: int, inputs: int) -> float:
    return 0.02 * math.sqrt(_WIDE / d_model)


def _gpt2(layers: int) -> float:
    return math.sqrt(2 * layers)


INITS: dict[str, Init] = {
    "huginn": Init(
        "Huginn's: std sqrt(2/5d), output projections divided by sqrt(2 * 132), embedding and noise of std "
        "sqrt(2/5)",
        math.sqrt(2 / 5),  # sqrt(2 / 5 d) times the embedding's factor sqrt(d)
        lambda d_model, inputs: math.sqrt(2 / (5 * d_model)),
        lambda layers: math.sqrt(2 * _HUGINN_DEPTH),
    ),
    "wide": Init(
        "transformers' normal(0, 0.02) as it acts at width 2048: std 0.02 sqrt(2048/d), embedding 0.02",
        0.02,
        _wide,
    ),
    "scaled": Init(
        "as wide, output projections divided by sqrt(2 * layers), as in GPT-2", 0.02, _wide, _gpt2
    ),
    "identity": Init("as scaled, but the injection is 0.7 [I, I]", 0.02, _wide, _gpt2),
    "fan-in": Init("std 1/sqrt(inputs), embedding 1", 1.0, lambda d, inputs: 1 / math.sqrt(inputs)),
    "torch": Init(
        "PyTorch's variance: std 1/sqrt(3 inputs), embedding 1",
        1.0,
        lambda d, inputs: 1 / math.sqrt(3 * inputs),
    ),
    "small": Init("transformers' normal(0, 0.02) at this very width", 0.02, lambda d, inputs: 0.02),
}
"""Initialisations by name."""
