"""A task and models so small that a training step takes milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loop_lens import LoopedConfig, LoopedTransformer
from loop_lens.data.task import IGNORED, Split, Task, TaskBatch
from loop_lens.training import Fixed, TrainingConfig


class Copying(Task):
    """Say the first symbol again at the last ``level`` positions; the number of labels varies by row."""

    name = "copying"
    vocab_size = 7
    levels = 3
    tokenizer = None

    def batch(self, n: int, *, level: int, generator: torch.Generator, split: Split = "train") -> TaskBatch:
        ids = torch.randint(0, self.vocab_size, (n, 6), generator=generator)
        labels = torch.full_like(ids, IGNORED)
        labels[:, -level:] = ids[:, :1]
        left_out = torch.rand(n, generator=generator) < 0.3
        labels[left_out, -1] = IGNORED
        labels[0, -1] = ids[0, 0]
        return TaskBatch(ids, labels)


def tiny(seed: int = 0, **fields: Any) -> LoopedTransformer:
    """A model of a few thousand parameters."""
    torch.manual_seed(seed)
    given: dict[str, Any] = {
        "vocab_size": Copying.vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "core_layers": 1,
        "recurrences": 3,
    }
    return LoopedTransformer(LoopedConfig(**{**given, **fields}))


def quick(steps: int = 6, **options: Any) -> TrainingConfig:
    """A few steps of training."""
    given: dict[str, Any] = {
        "batch_size": 8,
        "lr": 1e-2,
        "warmup": 2,
        "recurrences": Fixed(3),
        "checkpoint_every": 2,
        "log_every": 1,
    }
    return TrainingConfig(steps=steps, **{**given, **options})


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether all parameters are equal, bit for bit."""
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
