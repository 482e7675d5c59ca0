"""Published families as a kind: their weights become a native model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from loop_lens.models.checkpoint import Checkpoint
from loop_lens.models.files import reading
from loop_lens.models.kind import Kind, UnknownFamilyError, Unrolled
from loop_lens.models.native.kind import NATIVE, build_native
from loop_lens.models.native.modeling import LoopedTransformer
from loop_lens.models.published.base import Family
from loop_lens.models.published.families import FAMILIES


class PublishedKind(Kind):
    """Every family of `FAMILIES`, as a checkpoint or in that family's own code."""

    model_types = tuple(sorted({family.model_type for family in FAMILIES}))

    def matches_model(self, model: Any) -> bool:
        """Whether a model names a family in its config and has its weights."""
        config = _config_of(model)
        return self.matches(config) and _family(config, model.state_dict()) is not None

    def load(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype | None, attn_implementation: str | None
    ) -> LoopedTransformer:
        """A native model with the weights of a published checkpoint.

        Raises:
            UnknownFamilyError: If its weights are of no family of its ``model_type``.
        """
        family = _family(checkpoint.config, checkpoint.weights)
        if family is None:
            raise UnknownFamilyError(
                f"{checkpoint.name}: its weights are of no family of model_type {checkpoint.model_type!r}"
            )
        with reading(checkpoint.config_path):
            config = family.config(checkpoint.config)
        return build_native(
            config,
            checkpoint.weights,
            dtype=dtype,
            attn_implementation=attn_implementation,
            source=checkpoint.name,
        )

    def unroll(self, model: nn.Module, *, name: str, tokenizer: Any) -> Unrolled:
        """A native model with a copy of the weights of a model in its family's own code."""
        config, weights = _config_of(model), model.state_dict()
        family = _family(config, weights)
        assert family is not None, "the model is not of this kind"
        native = build_native(family.config(config), weights, source=type(model).__name__)
        return NATIVE.unroll(native.train(model.training), name=name, tokenizer=tokenizer)


PUBLISHED = PublishedKind()


def _config_of(model: Any) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else {}


def _family(config: Mapping[str, Any], keys: Iterable[str]) -> Family | None:
    published, names = dict(config), frozenset(keys)
    return next((family for family in FAMILIES if family.matches(published, names)), None)
