"""A head's attention scores as a form s x W_Q W_K^T y of its input: the norms of their weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class HeadNorms(NamedTuple):
    """What the scores of an attention's heads are made of."""

    kappa: Float[Tensor, " head"]
    """|W_Q W_K^T| of each query head, spectral."""
    product: Float[Tensor, " head"]
    """|W_Q| |W_K| of each."""
    scale: float
    """What scores are multiplied by."""
    biased: bool
    """Whether queries or keys have biases, which count as a row of the weights."""


@torch.no_grad()
def head_norms(attention: Any) -> HeadNorms:
    """Norms of each query head's weights in ``model.blocks[i].attn``, without a d_model x d_model matrix.

    Raises:
        ValueError: If it has no queries and keys that are linear in its input.
    """
    parts = getattr(attention, "submodules", None) or {}
    if "q_norm" in parts or "k_norm" in parts:
        raise ValueError(
            "the bound does not apply: this model norms its queries and keys (qk-norm), so its scores are not a "
            "bilinear form of the attention's input"
        )
    try:
        w_q, w_k = attention.W_Q, attention.W_K
    except (AttributeError, KeyError, NotImplementedError):
        w_q = w_k = None
    if not (isinstance(w_q, Tensor) and isinstance(w_k, Tensor) and w_q.ndim == w_k.ndim == 3):
        raise ValueError(
            f"the bound does not apply: {type(attention).__name__} has no W_Q and W_K [head d_model d_head]"
        )
    biases = [getattr(attention, name, None) for name in ("b_Q", "b_K")]
    biased = any(isinstance(bias, Tensor) for bias in biases)
    r_q, r_k = (_triangle(w, b, biased) for w, b in zip((w_q, w_k), biases, strict=True))
    r_k = r_k.repeat_interleave(len(r_q) // len(r_k), dim=0)
    kappa = torch.linalg.matrix_norm(r_q @ r_k.mT, ord=2)
    product = torch.linalg.matrix_norm(r_q, ord=2) * torch.linalg.matrix_norm(r_k, ord=2)
    scale = getattr(getattr(attention, "original_component", None), "scaling", None)
    scale = float(w_q.shape[-1]) ** -0.5 if scale is None else float(scale)
    return HeadNorms(kappa.cpu(), product.cpu(), scale, biased)


def _triangle(weight: Tensor, bias: Any, biased: bool) -> Float[Tensor, "head d_head d_head"]:
    """R of W = Q R: it has W's spectral norms, whatever stands on its right."""
    wide = weight.double()
    if biased:
        row = (
            bias.double().reshape(len(wide), -1) if isinstance(bias, Tensor) else torch.zeros_like(wide[:, 0])
        )
        wide = torch.cat([wide, row.unsqueeze(1)], dim=1)
    return torch.linalg.qr(wide, mode="r").R
