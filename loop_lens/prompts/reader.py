"""The one reader of prompts: whatever a user brings becomes tokens without padding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from loop_lens.bridge.model import HookedLoopedTransformer

_BUCKET = 32  # batches whose prompts are sorted by length together, so that little is padded


@dataclass(frozen=True)
class Batch:
    """Prompts that run together, padded on the right: no token of a causal model sees what follows it.

    Attributes:
        tokens: [prompt pos].
        mask: Whether a position holds a token rather than padding [prompt pos].
        index: Each prompt's place among those that were given, from 0.
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


def read_prompts(model: TransformerBridge, prompts: Any) -> Iterator[Int[Tensor, " pos"]]:
    """Prompts one by one, as tokens without padding.

    Args:
        model: For its tokenizer.
        prompts: Text; tokens [prompt pos]; a list (or any iterable) of texts or of tokens [pos]; or a
            ``datasets.Dataset`` (or any iterable of rows) with a column ``input_ids``, and perhaps
            ``attention_mask``, or a column ``text``.

    Raises:
        ValueError: If a prompt is none of these, or empty.
    """
    if isinstance(prompts, str) or (isinstance(prompts, Tensor) and prompts.ndim == 1):
        prompts = [prompts]
    for i, row in enumerate(prompts):
        mask = None
        if isinstance(row, dict):
            if "input_ids" not in row and "text" not in row:
                raise ValueError(
                    f"rows have the columns {', '.join(map(str, row))}: give one called 'text' or 'input_ids'"
                )
            mask, row = row.get("attention_mask"), row.get("input_ids", row.get("text"))
        if isinstance(row, str):
            tokens = model.to_tokens(row)[0]
        else:
            tokens = torch.as_tensor(row)
            tokens = tokens[0] if tokens.ndim == 2 and len(tokens) == 1 else tokens
        if tokens.ndim != 1 or (tokens.is_floating_point() and tokens.numel()):
            raise ValueError(
                f"prompt {i} is neither text nor tokens [pos], but {tokens.dtype} {tuple(tokens.shape)}"
            )
        if mask is not None:
            tokens = tokens[torch.as_tensor(mask).bool()]
        if tokens.numel() == 0:
            raise ValueError(f"prompt {i} has no tokens")
        yield tokens.cpu()


def batches_of(model: TransformerBridge, prompts: Any, batch_size: int) -> Iterator[Batch]:
    """Batches of prompts of similar length; under `torch.distributed`, this process's share of them.

    Raises:
        ValueError: If there are no prompts, or ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = iter(enumerate(read_prompts(model, prompts)))
    device = device_of(model)
    some = False
    while bucket := list(itertools.islice(rows, _BUCKET * batch_size * world)):
        some = True
        bucket = sorted(bucket[rank::world], key=lambda row: len(row[1]))
        for start in range(0, len(bucket), batch_size):
            chunk = bucket[start : start + batch_size]
            lengths = torch.tensor([len(tokens) for _, tokens in chunk])
            tokens = torch.nn.utils.rnn.pad_sequence([tokens.long() for _, tokens in chunk], batch_first=True)
            mask = torch.arange(tokens.shape[1]) < lengths[:, None]
            yield Batch(tokens.to(device), mask.to(device), tuple(i for i, _ in chunk))
    if not some:
        raise ValueError("there are no prompts")


def read_together(model: HookedLoopedTransformer, prompts: Any, name: str) -> Int[Tensor, "prompt pos"]:
    """Text, texts or tokens as tokens on the model's device.

    Raises:
        ValueError: If they are of several lengths, or nothing.
    """
    if isinstance(prompts, Tensor):
        tokens = prompts if prompts.ndim == 2 else prompts.unsqueeze(0)
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(
                f"{name} must be text or tokens [prompt pos], got {prompts.dtype} {tuple(prompts.shape)}"
            )
    else:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        each = [model.to_tokens(text) for text in texts]
        lengths = {t.shape[1] for t in each}
        if len(lengths) > 1:
            raise ValueError(
                f"the {name} prompts have {', '.join(map(str, sorted(lengths)))} tokens: give prompts of equal "
                "length"
            )
        tokens = torch.cat(each)
    if tokens.numel() == 0:
        raise ValueError(f"{name} has no tokens")
    return tokens.to(next(model.original_model.parameters()).device)
