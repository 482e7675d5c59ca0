"""What there is to know about one kind of loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

from loop_lens.models.checkpoint import Checkpoint
from loop_lens.unrolling.body import LoopBody


class UnknownFamilyError(ValueError):
    """A model of no kind that loop_lens knows.

    Example:
        >>> loop_lens.wrap(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        loop_lens.models.kind.UnknownFamilyError: Linear is no looped model that loop_lens knows...
    """


@dataclass(frozen=True)
class Unrolled:
    """What a bridge is made of.

    Attributes:
        model: The model that runs: the given one, or a native one with its weights.
        body: What unrolls it; says too what a saved config and weights are called.
        adapter: How transformer-lens reads its blocks.
    """

    model: nn.Module
    body: LoopBody
    adapter: ArchitectureAdapter


class Kind:
    """One kind of loop: which models are of it, how they load and how they unroll.

    Attributes:
        model_types: Each ``model_type`` that its config.json may name.
        classes: The config and model class that transformers' Auto classes are to open these with; None to load
            the model by this kind.
    """

    model_types: tuple[str, ...] = ()
    classes: tuple[type[Any], type[Any]] | None = None

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this config.json is of this kind."""
        return config.get("model_type") in self.model_types

    def matches_model(self, model: nn.Module) -> bool:
        """Whether a model in memory is of this kind."""
        return self.classes is not None and isinstance(model, self.classes[1])

    def load(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype | None, attn_implementation: str | None
    ) -> nn.Module:
        """The model of a checkpoint of this kind.

        Raises:
            WeightsError: If its weights do not fit its config.
        """
        raise NotImplementedError

    def unroll(self, model: Any, *, name: str, tokenizer: Any) -> Unrolled:
        """Make what a bridge needs. The model is left without slots until the bridge installs them.

        Args:
            model: A model of this kind.
            name: What the bridge calls it.
            tokenizer: The bridge's tokenizer, None for none.
        """
        raise NotImplementedError


def bridge_config(model: Any, name: str, architecture: str | None = None) -> Any:
    """transformer-lens' configuration of a model."""
    parameter = next(model.parameters())
    cfg = build_bridge_config_from_hf(
        model.config, architecture or type(model).__name__, name, parameter.dtype
    )
    cfg.device = str(parameter.device)
    return cfg
