"""Norms whose scales are held: their value as it is, their derivative that of a constant scale."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loop_lens.bridge.model import HookedLoopedTransformer


def original(module: Any) -> Any:
    """The model's own module under a bridge."""
    return getattr(module, "original_component", None) or module


@contextmanager
def frozen_norms(model: HookedLoopedTransformer) -> Generator[None, None, None]:
    """Let every norm have its value, and the derivative that it has at a constant scale."""
    # The final norm's bridge, too: for layer norms it computes by itself.
    modules: dict[int, nn.Module] = {id(model.ln_final): model.ln_final}
    blocks = (model.blocks[firing.index] for firing in model.schedule)
    for tree in (model.original_model, *model.body.unregistered, *blocks):
        for module in tree.modules():
            # A bridge runs the model's own norm below its hook points, which must stay outside.
            if type(module).__name__.endswith("Norm"):
                modules[id(module)] = module
    handles = [module.register_forward_hook(_freeze) for module in modules.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _freeze(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    x = inputs[0]
    if not (isinstance(output, Tensor) and x.requires_grad):
        return None
    own = original(module)
    centred = isinstance(own, nn.LayerNorm)
    wide = x.float()
    linear = wide - wide.mean(-1, keepdim=True) if centred else wide
    shift = getattr(own, "bias", None)
    with torch.no_grad():
        value = output.float() - (shift.float() if isinstance(shift, Tensor) else 0.0)
        ratio = torch.where(linear == 0, torch.zeros_like(value), value / linear)
    moved = linear * ratio
    return output.detach() + (moved - moved.detach()).to(output.dtype)
