"""What a sweep measures: functions of logits [batch pos vocab], one value per prompt.

Any callable on logits is a metric. Those here also say at which position they read, so that a sweep
computes no logits that nobody reads, and take tokens as text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loop_lens.prompts.tokens import Tokens, token_ids

MetricLike = Callable[[Tensor], Any]

_AS_IDS = {"tokens": True}


@dataclass(frozen=True)
class Metric:
    """A function of the logits at one position.

    Attributes:
        position: Where it reads; the last position by default.

    Example:
        >>> from loop_lens.interventions import Metric
        >>> class Top(Metric):
        ...     def at(self, logits):
        ...         return logits.max(-1).values
        >>> Top()(torch.zeros(2, 5, 11))
        tensor([0., 0.])
    """

    def at(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
        """The metric, from the logits at its position."""
        raise NotImplementedError

    def __call__(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        """The metric, from all logits."""
        return self.at(logits[:, self.where(logits.shape[1])])

    def where(self, n_positions: int) -> int:
        """Its position among so many, from 0."""
        position: int = getattr(self, "position", -1)
        if not -n_positions <= position < n_positions:
            raise ValueError(
                f"position {position} does not exist: the prompts have positions 0-{n_positions - 1}"
            )
        return position % n_positions

    def bind(self, model: Any) -> Self:
        """The same metric with its tokens as ids.

        Raises:
            ValueError: If a text is not a single token of the model.
        """
        changed = {
            f.name: token_ids(model, getattr(self, f.name)) for f in fields(self) if f.metadata.get("tokens")
        }
        return replace(self, **changed) if changed else self


def _pick(values: Tensor, tokens: Any) -> Tensor:
    """Values [batch vocab] at each prompt's token."""
    index = torch.as_tensor(tokens, device=values.device).reshape(-1)
    if len(index) not in (1, len(values)):
        raise ValueError(f"{len(index)} tokens for {len(values)} prompts: give one, or one per prompt")
    return values.gather(-1, index.expand(len(values)).unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class LogitDiff(Metric):
    """Logit of one token minus that of another.

    Attributes:
        correct: The token that counts as right.
        wrong: The one that counts as wrong.
        position: Where to read.

    Example:
        >>> from loop_lens.interventions import LogitDiff
        >>> LogitDiff("c", "a", position=-3).bind(model)(model(prompt)).item() > 5
        True
    """

    correct: Tokens = field(metadata=_AS_IDS)
    wrong: Tokens = field(metadata=_AS_IDS)
    position: int = -1

    def at(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
        return _pick(logits, self.correct) - _pick(logits, self.wrong)


@dataclass(frozen=True)
class Probability(Metric):
    """Probability of a token; ``log=True`` for its natural logarithm.

    Attributes:
        token: The token.
        position: Where to read.
        log: Whether to give the logarithm.

    Example:
        >>> from loop_lens.interventions import Probability
        >>> Probability("c", position=-3).bind(model)(model(prompt)).item() > 0.99
        True
    """

    token: Tokens = field(metadata=_AS_IDS)
    position: int = -1
    log: bool = False

    def at(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
        logprob = _pick(logits.float().log_softmax(-1), self.token)
        return logprob if self.log else logprob.exp()


@dataclass(frozen=True)
class Rank(Metric):
    """How many tokens have a higher logit than this one: 0 for the top token.

    Attributes:
        token: The token.
        position: Where to read.

    Example:
        >>> from loop_lens.interventions import Rank
        >>> Rank("c", position=-3).bind(model)(model(prompt))
        tensor([0.])
    """

    token: Tokens = field(metadata=_AS_IDS)
    position: int = -1

    def at(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
        return (logits > _pick(logits, self.token).unsqueeze(-1)).sum(-1).to(torch.float32)


@dataclass(frozen=True)
class KL(Metric):
    """KL divergence, in nats, of a reference distribution from the model's: KL(reference || model).

    Attributes:
        reference: Logits [batch vocab] or [batch pos vocab] of the reference run.
        position: Where to read.

    Example:
        >>> from loop_lens.interventions import KL
        >>> logits = model(prompt)
        >>> KL(logits)(logits).item()
        0.0
    """

    reference: Tensor
    position: int = -1

    def at(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
        reference = self.reference
        if reference.ndim == 3:
            reference = reference[:, self.where(reference.shape[1])]
        wanted = reference.float().log_softmax(-1).to(logits.device)
        got = logits.float().log_softmax(-1)
        return (wanted.exp() * (wanted - got)).sum(-1).expand(len(logits))


@dataclass(frozen=True)
class NextTokenLoss:
    """Mean next-token cross-entropy, in nats, of each prompt.

    Attributes:
        tokens: The prompts' tokens [batch pos].

    Example:
        >>> from loop_lens.interventions import NextTokenLoss
        >>> tokens = torch.tensor([[0, 1, 2]])
        >>> NextTokenLoss(tokens)(torch.zeros(1, 3, 4)).item()  # the logarithm of 4 tokens
        1.386...
    """

    tokens: Int[Tensor, "batch pos"]

    def __call__(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        logprobs = logits[:, :-1].float().log_softmax(-1)
        next_tokens = self.tokens[:, 1:].to(logits.device).unsqueeze(-1)
        return -logprobs.gather(-1, next_tokens.expand(len(logits), -1, -1)).squeeze(-1).mean(-1)


def bind(metric: MetricLike, model: Any) -> MetricLike:
    """A metric ready for a model; callables stay as they are."""
    if not callable(metric):
        raise TypeError(
            f"metric is a {type(metric).__name__}: give a function of logits [batch pos vocab], or one of "
            "LogitDiff, Probability, KL, Rank, NextTokenLoss"
        )
    return metric.bind(model) if isinstance(metric, Metric) else metric


def per_prompt(value: Any, batch: int) -> tuple[Tensor, bool]:
    """A metric's value as a tensor, and whether it has one entry per prompt.

    Raises:
        ValueError: If it is neither a number nor one number per prompt.
    """
    result = torch.as_tensor(value)
    if result.ndim == 0:
        return result, False
    if result.shape == (batch,):
        return result, True
    raise ValueError(
        f"the metric returned a tensor of shape {tuple(result.shape)}, but it must return a number or one "
        f"per prompt ({batch}): e.g. reduce over positions, logits[:, -1]"
    )
