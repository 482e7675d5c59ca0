"""Prompts and tokens as users give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer

Tokens = str | int | Sequence[str] | Sequence[int] | Tensor
"""One token, or several: as text that is a single token, or as an id."""


def words_of(model: HookedLoopedTransformer, tokens: Tensor) -> tuple[str, ...]:
    """Tokens [pos] as text, one by one; as numbers without a tokenizer."""
    if model.tokenizer is None:
        return tuple(str(int(t)) for t in tokens)
    return tuple(model.to_single_str_token(int(t)) for t in tokens)


def token_ids(model: Any, tokens: Tokens) -> Int[Tensor, " token"]:
    """Tokens as ids.

    Raises:
        ValueError: If a text is not a single token of the model, or an id not in its vocabulary.
    """
    if isinstance(tokens, Tensor):
        return tokens.reshape(-1)
    several = [tokens] if isinstance(tokens, str | int) else list(tokens)
    return torch.tensor([_token_id(model, token) for token in several])


def _token_id(model: Any, token: str | int) -> int:
    vocab = model.cfg.d_vocab
    if isinstance(token, int):
        if not 0 <= token < vocab:
            raise ValueError(f"token {token} does not exist: the vocabulary has tokens 0-{vocab - 1}")
        return token
    if model.tokenizer is None:
        raise ValueError(f"the model has no tokenizer, so the token {token!r} must be given as an id")
    ids = model.to_tokens(token, prepend_bos=False)[0].tolist()
    if len(ids) != 1:
        pieces = [model.to_single_str_token(i) for i in ids]
        raise ValueError(f"{token!r} is {len(ids)} tokens, {pieces}: give a single token, or its id")
    return ids[0]
