"""The state before the first iteration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loop_lens.models.native.config import LoopedConfig
from loop_lens.unrolling.numbers import whole

InitialState = int | str | Tensor
"""A seed of the family's own noise, ``"zeros"``, or a state [batch pos d_model]."""


def require_initial_state(value: Any, d_model: int) -> InitialState:
    """A value that can serve as an initial state, seeds as Python's own numbers.

    Raises:
        ValueError: If it cannot.
    """
    if isinstance(value, Tensor) and value.ndim:
        if value.ndim != 3 or value.shape[-1] != d_model:
            raise ValueError(
                f"initial_state has shape {tuple(value.shape)}, but a state is [batch pos d_model={d_model}]"
            )
        return value
    if isinstance(value, str) and value == "zeros":
        return value
    return whole(value, f"initial_state is 'zeros', a tensor [batch pos {d_model}], or a seed, which")


def draw_initial_state(
    spec: InitialState, config: LoopedConfig, e: Tensor, position_ids: Tensor, past: int, cached: bool
) -> Tensor:
    """The state before iteration 0.

    Noise belongs to the position alone: every row of a batch gets the same, a longer prompt extends
    it, and it is drawn on the CPU, so that devices agree.

    Args:
        spec: What the caller asked for.
        config: The model's configuration.
        e: The prelude's output [batch pos d_model].
        position_ids: Positions [batch or 1, pos].
        past: Number of positions already in the key-value cache.
        cached: Whether a cache is in use, so that a given state may cover later positions too.
    """
    spec = require_initial_state(spec, config.hidden_size)
    if isinstance(spec, Tensor):
        return _given_state(spec, e, past, cached)
    if spec == "zeros" or config.initial_state == "zeros":
        return torch.zeros_like(e)
    if config.initial_state == "prelude":
        return e
    table = _noise(int(spec), int(position_ids.max()) + 1, config.hidden_size, config.initial_state_std)
    return table.to(e.device, e.dtype)[position_ids].expand_as(e).clone()


def _given_state(state: Tensor, e: Tensor, past: int, cached: bool) -> Tensor:
    batch, n_pos, _ = e.shape
    long_enough = state.shape[1] >= past + n_pos if cached else state.shape[1] == n_pos
    if state.shape[0] not in (1, batch) or not long_enough:
        raise ValueError(
            f"initial_state has shape {tuple(state.shape)}, but this forward has batch {batch} and "
            f"positions {past}-{past + n_pos - 1}: give [{batch} {past + n_pos} {e.shape[-1]}]"
        )
    return state[:, past : past + n_pos].to(e.device, e.dtype).expand_as(e).clone()


def _noise(seed: int, n_pos: int, d_model: int, std: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Uniform numbers come one after the other, so more positions only add to the table.
    edge = torch.tensor(3.0 / 2**0.5).erf().item()
    uniform = torch.rand(n_pos, d_model, generator=generator, dtype=torch.float64)
    return (torch.erfinv((2 * uniform - 1) * edge) * 2**0.5 * std).float()
