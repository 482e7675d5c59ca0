"""Results of several processes as one."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Mergeable(Protocol):
    """A result that takes in another one's prompts."""

    def merge(self, other: Any) -> Any: ...


def shared(result: T) -> T:
    """Under `torch.distributed`, the result of all processes' prompts; otherwise the result itself.

    Every process gets it. Launch with ``accelerate launch`` (and create ``accelerate.PartialState()``) or
    ``torchrun``.

    Example:
        >>> from loop_lens.dynamics import ConvergenceProbe
        >>> from loop_lens.measuring import measure, shared
        >>> probe = ConvergenceProbe(model)
        >>> measure(model, prompts, [probe], progress=False)  # this process's share of the prompts
        >>> shared(probe.result()).moments.prompts.max().item()  # all of them
        2.0
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return result
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, result)
    merged = every[0]
    for other in every[1:]:
        merged = merged.merge(other)
    return merged
