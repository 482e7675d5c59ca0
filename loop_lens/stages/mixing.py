"""How much attention mixes positions, and how many directions the stream has.

Patterns are attention [... query key] with rows that sum to 1, streams are [... pos d_model], and ``mask`` says which
positions count, all by default. Definitions are those of arXiv 2604.11791, sections on stages of inference; results are
NaN where a stream holds NaN or infinity.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loop_lens.measuring.vectors import wide

Mask = Bool[Tensor, "*#rest pos"]
"""Whether a position counts, broadcasting against what comes before the positions: for a pattern
[prompt head query key] and a mask [prompt pos], give ``mask[:, None]``."""


def _require_square(pattern: Tensor) -> int:
    if pattern.ndim < 2 or pattern.shape[-1] != pattern.shape[-2]:
        raise ValueError(
            f"a pattern is [... query key] with as many keys as queries, got {tuple(pattern.shape)}"
        )
    return pattern.shape[-1]


def _require_mask(mask: Tensor | None, n: int) -> None:
    if mask is not None and mask.shape[-1] != n:
        raise ValueError(f"the mask is [... {mask.shape[-1]}], but there are {n} positions")


def mean_over_queries(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of [... query *n] over the queries that count; padded rows may hold anything."""
    if mask is None:
        return rows.mean(-2)
    weights = mask.to(rows.dtype)
    kept = rows.masked_fill(~mask.unsqueeze(-1), 0.0)
    return kept.sum(-2) / weights.sum(-1).unsqueeze(-1)


def attention_received(
    pattern: Float[Tensor, "*rest query key"], *, mask: Mask | None = None
) -> Float[Tensor, "*rest key"]:
    """Mean attention that each key gets: the pattern's mean column."""
    n = _require_square(pattern)
    _require_mask(mask, n)
    return mean_over_queries(wide(pattern), mask)


def concentration_of(received: Tensor, length: Tensor | int) -> Tensor:
    """ColSum concentration of the mean attention [... key] over so many positions [...]."""
    entropy = torch.special.entr(received).sum(-1)
    return 1 - entropy / (math.log(length) if isinstance(length, int) else length.to(entropy.dtype).log())


def colsum_concentration(
    pattern: Float[Tensor, "*rest query key"], *, mask: Mask | None = None
) -> Float[Tensor, "*rest"]:
    """How concentrated attention is on few keys: 1 for a pure sink, 0 for keys attended to alike.

    C = 1 + (1 / log T) sum_j p_j log p_j with p_j the mean attention that key j gets. Uniform causal
    attention over T = 64 positions has about 0.097, so compare at equal T.

    T is the number of positions that count.

    Raises:
        ValueError: If the pattern is not square, or of one position.

    Example:
        >>> sink = torch.zeros(4, 4)
        >>> sink[:, 0] = 1
        >>> loop_lens.stages.colsum_concentration(torch.stack([sink, torch.eye(4)])).tolist()
        [1.0, 0.0]

    Source:
        arXiv 2604.11791, ColSum concentration, with the 1/T that the printed formula leaves out: without
        it a pure sink has 65 at T = 64, not 1.
    """
    received = attention_received(pattern, mask=mask)
    length = pattern.shape[-1] if mask is None else mask.sum(-1)
    if bool(torch.as_tensor(length < 2).any()):
        raise ValueError("concentration over one position has no meaning: give two or more")
    return concentration_of(received, length)


def sink_rate(
    pattern: Float[Tensor, "*rest head query key"],
    tau: float = 0.3,
    token: int = 0,
    *,
    mask: Mask | None = None,
) -> Float[Tensor, "*rest"]:
    """Share of heads that give a token (a key) at least ``tau`` of their attention, averaged over queries.

    Raises:
        ValueError: If there is no head dimension, or no such key.

    Example:
        >>> from loop_lens.stages import sink_rate
        >>> _, cache = model.run_with_cache(prompt)
        >>> sink_rate(cache["loop.7.blocks.0.attn.hook_pattern"]).tolist()  # of its four heads
        [0.25]
    """
    n = _require_square(pattern)
    if pattern.ndim < 3:
        raise ValueError(
            f"the sink rate is over heads: give [... head query key], got {tuple(pattern.shape)}"
        )
    if not -n <= token < n:
        raise ValueError(f"token {token} does not exist: there are 0-{n - 1}")
    if mask is not None and not bool(mask[..., token].all()):
        raise ValueError(f"token {token} is padding in some of the patterns: choose one that all have")
    return (attention_received(pattern, mask=mask)[..., token] >= tau).float().mean(-1)


def mixing_score(
    pattern: Float[Tensor, "*rest query key"], *, mask: Mask | None = None
) -> Float[Tensor, "*rest"]:
    """Mean entropy of attention over keys, in nats: 0 where each query looks at one key.

    Example:
        >>> round(loop_lens.stages.mixing_score(torch.full((4, 4), 0.25)).item(), 4)  # log 4
        1.3863
    """
    _require_mask(mask, _require_square(pattern))
    entropies = torch.special.entr(wide(pattern)).sum(-1, keepdim=True)
    return mean_over_queries(entropies, mask).squeeze(-1)


def spectrum(
    resid: Float[Tensor, "*rest pos d_model"], *, mask: Mask | None = None
) -> Float[Tensor, "*rest rank"]:
    """Shares of the squared singular values of a residual stream, ascending, in float64.

    They are the eigenvalues of the smaller Gram matrix over their sum: ten times faster than singular
    values, and in float64 equal to them within 1e-9. Positions that do not count become rows of zeros,
    which change no singular value. Where the stream holds NaN or infinity, or nothing, all are NaN.
    """
    if resid.ndim < 2:
        raise ValueError(f"a residual stream is [... pos d_model], got {tuple(resid.shape)}")
    _require_mask(mask, resid.shape[-2])
    x = resid.double()
    x = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)
    largest = x.abs().amax((-2, -1), keepdim=True)
    x = x / largest.where(largest > 0, 1.0)  # shares stay, and no square overflows or fades
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    # LAPACK may not return from a matrix with NaN: what is not finite is solved as zeros, divided by NaN.
    sound = total.isfinite() & (total > 0)
    gram = gram.masked_fill(~sound.unsqueeze(-1), 0.0)
    values = torch.linalg.eigvalsh(gram).clamp_min(0.0)
    return values / total.masked_fill(~sound, float("nan"))


def _spectrum_of_some(resid: Tensor, mask: Tensor | None) -> Tensor:
    """The `spectrum` of streams of which none may be all zeros."""
    shares = spectrum(resid, mask=mask)
    if bool(shares.isnan().any()):
        kept = resid if mask is None else resid.masked_fill(~mask.unsqueeze(-1), 0.0)
        if bool((kept == 0).all(-1).all(-1).any()):
            raise ValueError("a stream of zeros has no singular directions")
    return shares


def matrix_entropy(
    resid: Float[Tensor, "*rest pos d_model"], *, mask: Mask | None = None
) -> Float[Tensor, "*rest"]:
    """Entropy of the squared singular values of a residual stream, in nats: 0 for rank one.

    H = - sum_j p_j log p_j, p_j = s_j^2 / |X|_F^2. Its largest value is log min(pos, d_model).

    Raises:
        ValueError: If a stream is all zeros.

    Example:
        >>> round(loop_lens.stages.matrix_entropy(torch.eye(4)).item(), 4)  # log 4
        1.3863
    """
    return entropy_of(_spectrum_of_some(resid, mask)).to(resid.dtype)


def entropy_of(shares: Tensor) -> Tensor:
    """Entropy [...] of shares [... rank]."""
    return torch.special.entr(shares).sum(-1).clamp_min(0)


def anisotropy(
    resid: Float[Tensor, "*rest pos d_model"], *, mask: Mask | None = None
) -> Float[Tensor, "*rest"]:
    """Share p_1 of the largest squared singular value of a residual stream: 1 for rank one.

    Raises:
        ValueError: If a stream is all zeros.

    Example:
        >>> loop_lens.stages.anisotropy(torch.diag(torch.tensor([3.0, 1.0]))).item()  # 9 of 10
        0.8999...
    """
    return _spectrum_of_some(resid, mask)[..., -1].to(resid.dtype)
