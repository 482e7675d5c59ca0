"""How much attention mixes positions, and how many directions the stream has."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def _require_square(pattern: Tensor) -> int:
    if pattern.ndim < 2 or pattern.shape[-1] != pattern.shape[-2]:
        raise ValueError(
            f"a pattern is [... query key] with as many keys as queries, got {tuple(pattern.shape)}"
        )
    return pattern.shape[-1]


def _plogp(p: Tensor) -> Tensor:
    return torch.xlogy(p, p)


def colsum_concentration(pattern: Float[Tensor, "*rest query key"]) -> Float[Tensor, "*rest"]:
    """How concentrated attention is on few keys: 1 for a pure sink, 0 for keys attended to alike.

    C = 1 + (1 / log T) sum_j p_j log p_j with p_j the mean attention that key j gets. Uniform causal
    attention over T = 64 positions has about 0.097, so compare at equal T.

    Args:
        pattern: Attention [... query key], rows summing to 1.

    Raises:
        ValueError: If the pattern is not square, or of one position.

    Source:
        arXiv 2604.11791, ColSum concentration, with the 1/T that the printed formula leaves out: without
        it a pure sink has 65 at T = 64, not 1.
    """
    n = _require_square(pattern)
    if n < 2:
        raise ValueError("concentration over one position has no meaning: give two or more")
    p = pattern.float().mean(-2)
    return 1 + _plogp(p).sum(-1) / math.log(n)


def sink_rate(
    pattern: Float[Tensor, "*rest head query key"], tau: float = 0.3, token: int = 0
) -> Float[Tensor, "*rest"]:
    """Share of heads that give a token at least ``tau`` of their attention, averaged over queries.

    Args:
        pattern: Attention [... head query key].
        tau: Threshold.
        token: The key that counts, the first by default.

    Raises:
        ValueError: If there is no head dimension, or no such key.

    Source:
        arXiv 2604.11791, section on stages of inference.
    """
    n = _require_square(pattern)
    if pattern.ndim < 3:
        raise ValueError(
            f"the sink rate is over heads: give [... head query key], got {tuple(pattern.shape)}"
        )
    if not -n <= token < n:
        raise ValueError(f"token {token} does not exist: there are 0-{n - 1}")
    return (pattern[..., token].float().mean(-1) >= tau).float().mean(-1)


def mixing_score(pattern: Float[Tensor, "*rest query key"]) -> Float[Tensor, "*rest"]:
    """Mean entropy of attention over keys, in nats: 0 where each query looks at one key.

    Args:
        pattern: Attention [... query key], rows summing to 1.

    Source:
        arXiv 2604.11791, section on stages of inference.
    """
    _require_square(pattern)
    return -_plogp(pattern.float()).sum(-1).mean(-1)


def matrix_entropy(resid: Float[Tensor, "*rest pos d_model"]) -> Float[Tensor, "*rest"]:
    """Entropy of the squared singular values of a residual stream, in nats: 0 for rank one.

    H = - sum_j p_j log p_j, p_j = s_j^2 / |X|_F^2. Its largest value is log min(pos, d_model).

    Args:
        resid: The stream [... pos d_model].

    Raises:
        ValueError: If a stream is all zeros.

    Source:
        arXiv 2604.11791, matrix-based entropy.
    """
    if resid.ndim < 2:
        raise ValueError(f"a residual stream is [... pos d_model], got {tuple(resid.shape)}")
    squared = torch.linalg.svdvals(resid.double()) ** 2
    total = squared.sum(-1, keepdim=True)
    if bool((total == 0).any()):
        raise ValueError("a stream of zeros has no singular directions")
    return -_plogp(squared / total).sum(-1).clamp_max(0).to(resid.dtype)
