"""Loops whose dynamics are known in closed form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loop_lens import HookedLoopedTransformer
from tests.interventions.test_paths import linear_loop


@torch.no_grad()
def loop_of(matrix: Tensor, *, inject: float = 0.0, recurrences: int = 8) -> HookedLoopedTransformer:
    """A loop that maps its state s to ``matrix @ s`` plus the prelude's output times ``inject``."""
    model = linear_loop()
    d = model.cfg.d_model
    wrapped: Any = model.original_model
    weight = wrapped.model.injection.adapter.weight
    weight[:, :d] = matrix
    weight[:, d:] = inject * torch.eye(d)
    for name, parameter in model.original_model.named_parameters():
        if "core" in name and "down_proj" in name:
            parameter.zero_()
    model.set_recurrences(recurrences)
    return model


def starting_at(model: HookedLoopedTransformer, rows: int, length: int) -> Tensor:
    """Give a model random initial states; returns them [prompt pos d_model]."""
    generator = torch.Generator().manual_seed(7)
    state = torch.randn(rows, length, model.cfg.d_model, generator=generator)
    model.initial_state = state
    return state


def rotation(d: int, angle: float, scale: float = 1.0) -> Tensor:
    """Rotates every pair of coordinates by an angle."""
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    return torch.block_diag(*[torch.tensor([[c, -s], [s, c]])] * (d // 2))
