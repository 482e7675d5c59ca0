"""The one reader of prompts: whatever a user brings becomes tokens without padding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from loop_lens.prompts.forms import Form, forms_of
from loop_lens.unrolling.numbers import whole

_BUCKET = 32  # batches whose prompts are sorted by length together, so that little is padded
_CONTEXT = ("n_positions", "max_position_embeddings", "max_context_length", "seq_length", "max_seq_len")
"""Where a config says how many positions there are; without any, transformer-lens' ``n_ctx`` is a guess."""


@dataclass(frozen=True)
class Batch:
    """Prompts that run together, padded on the right: no token of a causal model sees what follows it.

    Attributes:
        tokens: [prompt pos].
        mask: Whether a position holds a token rather than padding [prompt pos].
        index: Each prompt's place among those that were given, from 0.

    Example:
        >>> from loop_lens.prompts import batches_of
        >>> batch = next(batches_of(model, prompts, 2))
        >>> batch.tokens.shape, batch.lengths.tolist(), batch.index
        (torch.Size([2, 11]), [9, 11], (1, 0))
    """

    tokens: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]
    index: tuple[int, ...]

    @property
    def lengths(self) -> Int[Tensor, " prompt"]:
        """Tokens of each prompt."""
        return self.mask.sum(-1)


def device_of(model: TransformerBridge) -> torch.device:
    """Where the model's weights are."""
    return next(model.original_model.parameters()).device


def read_prompts(
    model: TransformerBridge, prompts: Any, *, name: str = "prompts", any_length: bool = False
) -> Iterator[Int[Tensor, " pos"]]:
    """Prompts one by one, as tokens on the CPU without padding.

    Every function of loop_lens that takes prompts takes them through this one:

    ==================================  ============================================================
    text                                becomes the tokens of ``model.to_tokens``, never cut
    ids [pos] or [prompt pos]           a tensor, an array, or lists of numbers, ragged too
    a tokenizer's own output            any mapping with ``input_ids``, and perhaps ``attention_mask``
    chat messages                       a conversation is a list of mappings with ``role`` and ``content``
    rows of a data set                  with a column ``input_ids``, ``messages`` or ``text``, read in this order
    columns, generators, lists          of any of these, one prompt or more an item
    ==================================  ============================================================

    A conversation is rendered by the tokenizer's chat template, which writes the special tokens itself, so
    none are added. The template's generation prompt (the beginning of an answer) is added unless the last
    message is the assistant's.

    Padding, on either side, is told by ``attention_mask`` and left out. Without a mask, ids that begin or
    end with the tokenizer's pad token are refused, since a model would read padding as text. Where the pad
    token is the one that begins or ends texts (GPT-2), one of it is text and two or more are padding.

    Args:
        model: For its tokenizer, vocabulary and context.
        prompts: What to read. Iterables are read no further than asked for.
        name: The argument's name, for messages.
        any_length: Whether prompts may be longer than the model's context, because the caller cuts them.

    Raises:
        TypeError: If there is anything else in them; says what.
        ValueError: If there are no prompts, a prompt has no tokens, more than the model's context, ids that
            the vocabulary lacks, padding without a mask or a mask with holes, or if text or messages need
            what the tokenizer lacks.

    Example:
        >>> from loop_lens.prompts import read_prompts
        >>> [len(tokens) for tokens in read_prompts(model, prompts)]
        [11, 9]
        >>> padded = {"input_ids": [[10, 10, 0, 2]], "attention_mask": [[0, 0, 1, 1]]}
        >>> [tokens.tolist() for tokens in read_prompts(model, padded)]
        [[0, 2]]
    """
    tokens = _tokens_of_each(model, prompts, name, any_length)
    first = next(tokens, None)  # so that what cannot be read is refused here, not where it is iterated over
    if first is None:
        raise ValueError(f"{name} is empty: there are no prompts")
    return itertools.chain([first], tokens)


def batches_of(model: TransformerBridge, prompts: Any, batch_size: int) -> Iterator[Batch]:
    """Batches of prompts of similar length; under `torch.distributed`, this process's share of them.

    Args:
        model: The model.
        prompts: As for `read_prompts`.
        batch_size: Prompts a batch.

    Raises:
        ValueError: If ``batch_size`` is below 1.

    Example:
        >>> from loop_lens.prompts import batches_of
        >>> [batch.tokens.shape[1] for batch in batches_of(model, prompts, 1)]
        [9, 11]
    """
    batch_size = whole(batch_size, "batch_size", 1)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    numbered = enumerate(read_prompts(model, prompts))
    device = device_of(model)
    while bucket := list(itertools.islice(numbered, _BUCKET * batch_size * world)):
        bucket = sorted(bucket[rank::world], key=lambda row: len(row[1]))
        for start in range(0, len(bucket), batch_size):
            chunk = bucket[start : start + batch_size]
            index, rows = zip(*chunk, strict=True)
            yield _padded(rows, index, device)


def read_batch(model: TransformerBridge, prompts: Any) -> Batch:
    """All prompts as one batch, in the order in which they were given.

    Args:
        model: The model.
        prompts: As for `read_prompts`.
    """
    rows = list(read_prompts(model, prompts))
    return _padded(rows, range(len(rows)), device_of(model))


def _padded(rows: Sequence[Tensor], index: Sequence[int], device: torch.device) -> Batch:
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    return Batch(tokens.to(device), mask.to(device), tuple(index))


def read_together(model: TransformerBridge, prompts: Any, name: str) -> Int[Tensor, "prompt pos"]:
    """Prompts of equal length as one batch of tokens, on the model's device.

    Args:
        model: The model.
        prompts: As for `read_prompts`.
        name: The argument's name, for messages.

    Raises:
        ValueError: If their lengths differ.

    Example:
        >>> from loop_lens.prompts import read_together
        >>> read_together(model, [prompt, prompt], "prompts").shape
        torch.Size([2, 11])
    """
    each = list(read_prompts(model, prompts, name=name))
    lengths = sorted({len(tokens) for tokens in each})
    if len(lengths) > 1:
        which = name if name == "prompts" else f"{name} prompts"
        raise ValueError(
            f"the {which} have {', '.join(map(str, lengths))} tokens: give prompts of equal length"
        )
    return torch.stack(each).to(device_of(model))


def _tokens_of_each(model: TransformerBridge, prompts: Any, name: str, any_length: bool) -> Iterator[Tensor]:
    for i, form in enumerate(forms_of(prompts, name)):
        which = f"prompt {i}" if name == "prompts" else f"prompt {i} of {name}"
        tokens = _tokens(model, form, which)
        require_ids(model, tokens, which)
        if not any_length:
            require_context(model, len(tokens), which)
        yield tokens


def require_ids(model: TransformerBridge, tokens: Tensor, which: str) -> None:
    """Raise ValueError unless tokens are in the vocabulary, and there are some."""
    if not tokens.numel():
        raise ValueError(f"{which} has no tokens")
    vocab, low, high = model.cfg.d_vocab, int(tokens.min()), int(tokens.max())
    if low < 0 or 0 < vocab <= high:
        raise ValueError(
            f"{which} has the id {low if low < 0 else high}, and the vocabulary has 0-{vocab - 1}"
        )


def require_context(model: TransformerBridge, n: int, which: str) -> None:
    """Raise ValueError if so many tokens are more than the model has positions for."""
    config = getattr(model.original_model, "config", None)
    if n > model.cfg.n_ctx and any(getattr(config, field, None) for field in _CONTEXT):
        raise ValueError(
            f"{which} has {n} tokens and the model's context {model.cfg.n_ctx}: give it in parts, or raise "
            "model.cfg.n_ctx if the model is to run beyond what it was made for"
        )


def _tokens(model: TransformerBridge, form: Form, which: str) -> Tensor:
    """A prompt's tokens without padding."""
    content = form.content
    if isinstance(content, Tensor):
        ids = content.cpu()
        return unmasked(ids, form.mask, which) if form.mask is not None else _unpadded(model, ids, which)
    if model.tokenizer is None:
        raise ValueError(
            f"the model has no tokenizer: give {which} as ids, or open the model with tokenizer="
        )
    if isinstance(content, str):
        # transformer-lens decides on the BOS; its default would cut text to the context.
        ids = model.to_tokens(content, truncate=False, move_to_device=False)[0]
    else:
        text = _rendered(model.tokenizer, content, which)
        ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    return ids.long()


def _rendered(tokenizer: Any, messages: list[Any], which: str) -> str:
    """A conversation as text."""
    from jinja2 import TemplateError  # what transformers renders with, imported when it first does

    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"{which} is a conversation, and this tokenizer has no chat template: give its text, or set "
            "model.tokenizer.chat_template"
        )
    unanswered = messages[-1]["role"] != "assistant"
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=unanswered)
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses {which}: {error}") from error


def unmasked(ids: Tensor, mask: Tensor, which: str) -> Tensor:
    """The ids that a mask keeps."""
    (kept,) = mask.nonzero(as_tuple=True)
    if len(kept) and int(kept[-1] - kept[0]) + 1 != len(kept):
        raise ValueError(
            f"the attention_mask of {which} has holes: it may leave out padding before and after the tokens, "
            "none between them"
        )
    return ids[mask]


def _unpadded(model: TransformerBridge, ids: Tensor, which: str) -> Tensor:
    """Ids that came without a mask, if they are not padded."""
    tokenizer = model.tokenizer
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or not len(ids):
        return ids
    marks_texts = pad in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    run = 2 if marks_texts else 1  # one BOS begins a text, one EOS ends it
    for side, end in (("begins", ids[:run]), ("ends", ids[-run:])):
        if len(end) == run and bool((end == pad).all()):
            raise ValueError(
                f"{which} {side} with {'two pad tokens' if run == 2 else 'the pad token'} (id {pad}), which the "
                "model would read as text: pass attention_mask beside input_ids, of ones if it is text"
            )
    return ids
