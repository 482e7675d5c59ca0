"""Distances between two attention patterns, as functions on tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from loop_lens.measuring.vectors import distances, wide

_TINY = torch.finfo(torch.float32).tiny


def total_variation(
    a: Float[Tensor, "*lead query key"], b: Float[Tensor, "*lead query key"]
) -> Float[Tensor, "*lead query"]:
    """Half the sum of absolute differences of two firings' attention: what moved, 0 to 1.

    Example:
        >>> _, cache = model.run_with_cache(prompt)
        >>> patterns = cache.over_iterations("pattern", layer=1)  # iteration batch head query key
        >>> moved = loop_lens.dynamics.total_variation(patterns[1:], patterns[:-1])
        >>> moved.shape, bool(moved[-1].max() < moved[0].max())
        (torch.Size([7, 1, 4, 11]), True)
    """
    return (wide(a) - wide(b)).abs().sum(-1) / 2


def jensen_shannon(
    a: Float[Tensor, "*lead query key"], b: Float[Tensor, "*lead query key"]
) -> Float[Tensor, "*lead query"]:
    """Square root of the Jensen-Shannon divergence in nats, 0 to sqrt(ln 2): a metric.

    It is written in d = (a - b) / (a + b), whose divergence has no difference of nearly equal terms, so that
    patterns which differ by rounding alone are as close as they should be.

    Example:
        >>> from loop_lens.dynamics import jensen_shannon
        >>> round(jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).item(), 3)  # sqrt(ln 2)
        0.833
    """
    a, b = wide(a), wide(b)
    both = a + b
    edge = (
        1 - torch.finfo(a.dtype).eps / 2
    )  # the number below 1: where one probability is far above, 2e-6 is lost
    d = ((a - b) / both.clamp_min(_TINY)).clamp(-edge, edge)
    divergence = (both * (2 * d * d.atanh() + (-d * d).log1p())).sum(-1) / 4
    return divergence.clamp_min(0).sqrt()


def frobenius_rows(
    a: Float[Tensor, "*lead query key"], b: Float[Tensor, "*lead query key"]
) -> Float[Tensor, "*lead query"]:
    """Euclidean norm of each query's difference; their norm is the Frobenius norm of the pattern's."""
    return distances(a, b)


PER_QUERY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "frobenius": frobenius_rows,
    "total_variation": total_variation,
    "jensen_shannon": jensen_shannon,
}
"""Distances of two patterns, per query; that of whole patterns is the norm of Frobenius', the mean of the others'."""
DISTANCES = tuple(PER_QUERY)


def require_distances(metrics: tuple[str, ...], allowed: tuple[str, ...] = DISTANCES) -> None:
    """Raise unless every metric is one of those that exist, and there is one."""
    unknown = [metric for metric in metrics if metric not in allowed]
    if unknown or not metrics:
        raise ValueError(
            f"metric {unknown[0] if unknown else '(none)'!r} is unknown: choose from {', '.join(allowed)}"
        )


def require_two_tokens(lengths: Tensor, index: tuple[int, ...]) -> None:
    """Raise if a prompt has one token, which can attend to itself alone."""
    for prompt, length in zip(index, lengths.tolist(), strict=True):
        if length < 2:
            raise ValueError(
                f"prompt {prompt} has one token, which attends to itself alone: give prompts of at least two"
            )
