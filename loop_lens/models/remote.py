"""Checkpoints that bring their own code along, which runs only where the caller trusts it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from loop_lens.models.checkpoint import Checkpoint
from loop_lens.models.kind import Kind, UnknownFamilyError


class RemoteKind(Kind):
    """Loads a model by its checkpoint's code; of which kind it is then, the other kinds are asked."""

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether config.json names code for transformers to run."""
        return "auto_map" in config

    def load(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype | None, attn_implementation: str | None
    ) -> nn.Module:
        """The model that the checkpoint's code makes.

        Raises:
            UnknownFamilyError: If the checkpoint is not trusted.
        """
        if not checkpoint.trusted:
            raise UnknownFamilyError(
                f"{checkpoint.name}: model_type {checkpoint.model_type!r} is no family that loop_lens knows, and "
                "its own code is not allowed to run: pass trust_remote_code=True if you trust it"
            )
        return checkpoint.open_with(
            AutoModelForCausalLM, dtype=dtype, attn_implementation=attn_implementation
        )


REMOTE = RemoteKind()
