"""How blocks are called and what they return, whatever their architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Bare = Callable[..., Any]


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The stream that enters a block, however its caller passes it."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    return kwargs["hidden_states"]


def with_hidden_states(
    value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with another stream entering the block."""
    if args and isinstance(args[0], Tensor):
        return (value, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": value}


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean attention mask, True where attended to, as what eager attention adds to its scores."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def map_output(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Apply a function to the stream that leaves a block, a tensor or the first of a tuple."""
    if isinstance(output, tuple):
        return (function(output[0]), *output[1:])
    return function(output)


def output_stream(output: Any) -> Tensor:
    """The stream that leaves a block."""
    return output[0] if isinstance(output, tuple) else output


def common_parent(model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
    """The innermost module that contains all blocks and has a forward of its own."""
    names = {id(module): name for name, module in model.named_modules()}
    missing = [block for block in blocks if id(block) not in names]
    if missing:
        raise ValueError(f"{type(missing[0]).__name__} is not a submodule of {type(model).__name__}")
    paths = [names[id(block)].split(".") for block in blocks]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    if len(blocks) == 1:
        shared = shared[:-1]
    while shared and isinstance(model.get_submodule(".".join(shared)), nn.ModuleList | nn.ModuleDict):
        shared.pop()
    return model.get_submodule(".".join(shared)) if shared else model
