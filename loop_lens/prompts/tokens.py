"""Single tokens as users give them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

Tokens = str | int | Sequence[str] | Sequence[int] | Tensor
"""One token, or several: as text that is a single token, or as an id."""


def words_of(model: TransformerBridge, tokens: Tensor) -> tuple[str, ...]:
    """Tokens [pos] as text, one by one; as numbers without a tokenizer.

    Example:
        >>> from loop_lens.prompts import words_of
        >>> words_of(model, torch.tensor([0, 2, 9]))
        ('a', 'c', '->')
    """
    if model.tokenizer is None:
        return tuple(str(int(t)) for t in tokens)
    return tuple(model.to_single_str_token(int(t)) for t in tokens)


def token_ids(model: TransformerBridge, tokens: Tokens) -> Int[Tensor, " token"]:
    """Tokens as ids.

    Args:
        model: For its tokenizer and vocabulary.
        tokens: A text or an id, or several. Numbers of numpy and torch are ids too.

    Raises:
        ValueError: If a text is not a single token of the model, an id not in its vocabulary, or if ids are
            nested, several to each of several prompts.
        TypeError: If a token is neither text nor a whole number.

    Example:
        >>> from loop_lens.prompts import token_ids
        >>> token_ids(model, ["a", "c"]), token_ids(model, 9)
        (tensor([0, 2]), tensor([9]))
    """
    if hasattr(tokens, "to_numpy"):  # a column or an index of pandas
        tokens = np.asarray(tokens)  # type: ignore[assignment]
    if isinstance(tokens, Tensor | np.ndarray):
        if tokens.ndim > 1 and len(tokens) > 1:
            raise ValueError(
                f"tokens of shape {list(tokens.shape)} are nested, but they are the same for all prompts here, or one "
                "a prompt: give one list, or each prompt's tokens in a call of its own"
            )
        ids = [_token_id(model, token) for token in tokens.reshape(-1).tolist()]
        return torch.tensor(ids, dtype=torch.long, device=getattr(tokens, "device", None))
    one = isinstance(tokens, str | set | dict) or not isinstance(tokens, Iterable)
    several: Any = [tokens] if one else tokens
    return torch.tensor([_token_id(model, token) for token in several], dtype=torch.long)


def _token_id(model: TransformerBridge, token: Any) -> int:
    if isinstance(token, Tensor | np.ndarray) and token.ndim == 0:
        token = token.item()
    if isinstance(token, Integral) and not isinstance(token, bool):
        number, vocab = int(token), model.cfg.d_vocab
        if not 0 <= number < vocab:
            raise ValueError(f"token {number} does not exist: the vocabulary has tokens 0-{vocab - 1}")
        return number
    if not isinstance(token, str):
        raise TypeError(f"a token is text or an id, got {token!r}")
    if model.tokenizer is None:
        raise ValueError(f"the model has no tokenizer, so the token {token!r} must be given as an id")
    ids = model.to_tokens(token, prepend_bos=False)[0].tolist()
    if len(ids) != 1:
        pieces = [model.to_single_str_token(i) for i in ids]
        raise ValueError(f"{token!r} is {len(ids)} tokens, {pieces}: give a single token, or its id")
    unknown = model.tokenizer.unk_token_id
    if ids[0] == unknown and token.strip() != model.tokenizer.unk_token:
        raise ValueError(
            f"{token!r} is not in the vocabulary: the tokenizer reads it as {model.tokenizer.unk_token!r}"
        )
    return ids[0]
