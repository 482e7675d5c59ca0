"""Looped models with random weights: three norms, with and without injection, in several initialisations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import loop_lens
from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.experiments.norms import NORMS, require_one_of
from loop_lens.models.native import LoopedConfig, LoopedTransformer

_WIDE = 2048  # d_model of Ouro-1.4B and of Llama-3.2-1B
_HUGINN_DEPTH = 132  # Huginn's effective_expected_depth: 2 + 32 * 4 + 2


@dataclass(frozen=True)
class RandomModel:
    """One model of the grid: ``layers`` blocks that are looped, without prelude and coda.

    Attributes:
        norm: ``"pre"``, ``"huginn"`` (on the stream, after each branch) or ``"ouro"`` (around each branch,
            and after each iteration).
        injection: Whether each iteration starts from a linear map of [state; embedding], and the loop from
            Gaussian noise; otherwise the loop starts from the embedding.
        layers: Blocks of the loop.
        seed: Of the weights and of the noise.
        width: d_model; the MLP is four times as wide, heads are 32 wide.
        init: One of `INITS`.
        double: Whether it computes in float64.
    """

    norm: str
    injection: bool
    layers: int
    seed: int = 0
    width: int = 128
    init: str = "huginn"
    double: bool = False

    def __post_init__(self) -> None:
        require_one_of("norm", self.norm, NORMS)
        require_one_of("init", self.init, INITS)
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")

    @property
    def name(self) -> str:
        """A name for files."""
        with_injection = "injection" if self.injection else "none"
        precision = "-f64" if self.double else ""
        return (
            f"{self.norm}-{with_injection}-{self.layers}x-w{self.width}-{self.init}{precision}-s{self.seed}"
        )

    @property
    def shape(self) -> tuple[Any, ...]:
        """What models must have in common for one to be given the other's weights in place."""
        return self.norm, self.injection, self.layers, self.width, self.double

    def config(self, recurrences: int, vocabulary: int = 512) -> LoopedConfig:
        """Its configuration."""
        return LoopedConfig(
            vocab_size=vocabulary,
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
        model = loop_lens.wrap(bare.double() if self.double else bare)
        self.initialise(model)
        return model

    def initialise(self, model: HookedLoopedTransformer) -> None:
        """Give an opened model of the same shape this one's weights and noise, in place.

        An opened model keeps what its firings share, so this is quicker than opening another.
        """
        native: Any = model.original_model
        generator = torch.Generator().manual_seed(self.seed)
        scales = INITS[self.init][1]
        with torch.no_grad():
            for name, module in native.named_modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    kind = "embedding" if isinstance(module, nn.Embedding) else _kind(name)
                    weight = module.weight
                    drawn = torch.randn(weight.shape, generator=generator) * scales(kind, weight, self.layers)
                    weight.copy_(drawn)
            if self.injection and self.init == "identity":
                eye = 0.7 * torch.eye(self.width)
                native.model.injection.adapter.weight.copy_(torch.cat([eye, eye], dim=1))
        if self.injection:
            model.initial_state = self.seed


Scale = Callable[[str, Tensor, int], float]
"""Standard deviation of a weight, by its kind, the weight [out in], and the number of layers."""


def _kind(name: str) -> str:
    if name.endswith(("o_proj", "down_proj")):
        return "output"
    return "injection" if "injection" in name else "input"


def _wide(kind: str, weight: Tensor, layers: int) -> float:
    return 0.02 if kind == "embedding" else 0.02 * math.sqrt(_WIDE / _d_model(weight))


def _scaled(kind: str, weight: Tensor, layers: int) -> float:
    return _wide(kind, weight, layers) / (math.sqrt(2 * layers) if kind == "output" else 1)


def _huginn(kind: str, weight: Tensor, layers: int) -> float:
    if kind == "embedding":
        return math.sqrt(2 / 5)  # sqrt(2 / 5 d) times the embedding's factor sqrt(d)
    std = math.sqrt(2 / (5 * _d_model(weight)))
    return std / math.sqrt(2 * _HUGINN_DEPTH) if kind == "output" else std


def _over_inputs(factor: int) -> Scale:
    def scale(kind: str, weight: Tensor, layers: int) -> float:
        return 1.0 if kind == "embedding" else 1 / math.sqrt(factor * weight.shape[1])

    return scale


def _small(kind: str, weight: Tensor, layers: int) -> float:
    return 0.02


def _d_model(weight: Tensor) -> int:
    return min(weight.shape)


INITS: dict[str, tuple[str, Scale]] = {
    "huginn": (
        "Huginn's: std sqrt(2/5d), output projections divided by sqrt(2 * 132), embedding and noise of std "
        "sqrt(2/5)",
        _huginn,
    ),
    "wide": (
        "transformers' normal(0, 0.02) as it acts at width 2048: std 0.02 sqrt(2048/d), embedding 0.02",
        _wide,
    ),
    "scaled": ("as wide, output projections divided by sqrt(2 * layers), as in GPT-2", _scaled),
    "identity": ("as scaled, but the injection is 0.7 [I, I]", _scaled),
    "fan-in": ("std 1/sqrt(inputs), embedding 1", _over_inputs(1)),
    "torch": ("PyTorch's variance: std 1/sqrt(3 inputs), embedding 1", _over_inputs(3)),
    "small": ("transformers' normal(0, 0.02) at this very width", _small),
}
"""Initialisations by name: what they are, and their standard deviations. All are normal distributions."""
