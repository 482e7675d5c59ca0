"""What differentiates through a model, whatever mode its caller is in."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from loop_lens.bridge.model import HookedLoopedTransformer

P = ParamSpec("P")
T = TypeVar("T")


def differentiates(
    function: Callable[Concatenate[HookedLoopedTransformer, P], T],
) -> Callable[Concatenate[HookedLoopedTransformer, P], T]:
    """A function of a model that records gradients, under ``no_grad`` and ``inference_mode``, too.

    Weights may be frozen: what is differentiated by are values within the forward.

    Raises:
        ValueError: If the weights themselves were made under ``inference_mode``, which autograd refuses.
    """

    @wraps(function)
    def recording(model: HookedLoopedTransformer, *args: P.args, **kwargs: P.kwargs) -> T:
        if any(parameter.is_inference() for parameter in model.original_model.parameters()):
            raise ValueError(
                "the model was made under torch.inference_mode(), and gradients cannot pass through its weights: open "
                "it outside of that mode"
            )
        with torch.inference_mode(False), torch.enable_grad():
            args, kwargs = tree_map(_recordable, (args, kwargs))
            return function(model, *args, **kwargs)

    return recording


def _recordable(value: Any) -> Any:
    """What autograd takes in place of a tensor that was made under ``inference_mode``."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
