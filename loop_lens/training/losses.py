"""What training minimises: cross-entropy at the last iteration, or at every iteration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from loop_lens.lenses.exit_rules import exit_log_probabilities
from loop_lens.models.native.config import LoopedConfig


class Loss(ABC):
    """A loss over iterations, summed over the labelled places.

    Example:
        >>> from loop_lens.training import ExitGateLoss, LastIteration, Loss
        >>> [isinstance(loss, Loss) and loss.reads_iterations for loss in (LastIteration(), ExitGateLoss())]
        [False, True]
    """

    reads_iterations = True

    @abstractmethod
    def total(
        self,
        logits: Float[Tensor, "iteration place vocab"],
        targets: Int[Tensor, " place"],
        gates: Float[Tensor, "iteration place"] | None,
    ) -> Float[Tensor, ""]:
        """The sum over places; logits hold the last iteration alone if no other is needed.

        Args:
            logits: What the model says after each iteration.
            targets: The tokens it should name.
            gates: Logits of the exit gate, where the model has one.
        """

    def require(self, config: LoopedConfig, recurrences: int | None) -> None:  # noqa: B027 (most losses fit all)
        """Raise unless a model can be trained by this loss.

        Args:
            config: The model's configuration.
            recurrences: The number of iterations if every step runs the same number.
        """


@dataclass(frozen=True)
class LastIteration(Loss):
    """Cross-entropy of the last iteration alone.

    Example:
        >>> from loop_lens.training import LastIteration
        >>> logits, targets = torch.zeros(3, 2, 8), torch.tensor([0, 5])  # 3 iterations, 2 places, 8 tokens
        >>> round(LastIteration().total(logits, targets, None).item(), 3)  # 2 log 8
        4.159
    """

    reads_iterations = False

    def total(self, logits: Tensor, targets: Tensor, gates: Tensor | None) -> Tensor:
        """The last iteration's cross-entropy."""
        return cross_entropy(logits[-1], targets, reduction="sum")


@dataclass(frozen=True)
class WeightedIterations(Loss):
    """Cross-entropy of every iteration, in a weighted mean.

    Attributes:
        weights: ``"uniform"``, ``"linear"`` (iteration t counts t + 1), or one weight per iteration, for
            trainings whose number of iterations never changes.

    Example:
        >>> from loop_lens.training import WeightedIterations
        >>> WeightedIterations("linear").shares(4)
        tensor([0.1000, 0.2000, 0.3000, 0.4000])
    """

    weights: str | tuple[float, ...] = "uniform"

    def __post_init__(self) -> None:
        if isinstance(self.weights, str):
            if self.weights not in ("uniform", "linear"):
                raise ValueError(
                    f"weights={self.weights!r} is unknown: choose 'uniform', 'linear' or give numbers"
                )
        elif not self.weights or min(self.weights) < 0 or not sum(self.weights) > 0:
            raise ValueError(f"weights {self.weights} must not be negative and must not all be zero")

    def total(self, logits: Tensor, targets: Tensor, gates: Tensor | None) -> Tensor:
        """The weighted mean over iterations, summed over places."""
        return torch.dot(self.shares(len(logits)).to(logits.device), _cross_entropies(logits, targets).sum(1))

    def shares(self, n: int) -> Tensor:
        """The weight of each of n iterations, as shares of 1 [iteration]."""
        if self.weights == "uniform":
            raw = torch.ones(n)
        elif self.weights == "linear":
            raw = torch.arange(1.0, n + 1)
        else:
            raw = torch.tensor(self.weights)
        return raw / raw.sum()

    def require(self, config: LoopedConfig, recurrences: int | None) -> None:
        """Numbers must fit the iterations."""
        if not isinstance(self.weights, str) and len(self.weights) != recurrences:
            runs = "a number that varies" if recurrences is None else str(recurrences)
            raise ValueError(
                f"{len(self.weights)} weights cannot weigh the iterations of every step ({runs}): give as many "
                "as Fixed(n) runs, or 'uniform' or 'linear'"
            )


@dataclass(frozen=True)
class ExitGateLoss(Loss):
    """Expected cross-entropy under the exit gate's distribution, which is kept spread out.

    With lambda_t the gate's sigmoid, p_t = lambda_t prod_{j<t} (1 - lambda_j), the last iteration takes the
    remaining mass, and the loss is sum_t p_t CE_t - beta H(p).

    Attributes:
        beta: Weight of the entropy, in nats.

    Source:
        Ouro, arXiv 2510.25741, section 3.3 (entropy-regularised objective with a uniform prior).

    Example:
        >>> from loop_lens.training import ExitGateLoss
        >>> logits, targets, gates = torch.zeros(2, 1, 8), torch.tensor([5]), torch.zeros(2, 1)
        >>> round(ExitGateLoss(beta=0.1).total(logits, targets, gates).item(), 3)  # log 8 - 0.1 log 2
        2.01
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")

    def total(self, logits: Tensor, targets: Tensor, gates: Tensor | None) -> Tensor:
        """The expected cross-entropy minus the entropy, summed over places."""
        assert gates is not None
        log_p = exit_log_probabilities(gates.float())
        p = log_p.exp()
        # p log p is 0 where p is 0; log p may be large and negative there, never infinite.
        return (p * (_cross_entropies(logits, targets) + self.beta * log_p)).sum()

    def require(self, config: LoopedConfig, recurrences: int | None) -> None:
        """There must be a gate."""
        if not config.exit_gate:
            raise ValueError(
                "ExitGateLoss needs a model with an exit gate: set LoopedConfig(exit_gate=True) or choose another loss"
            )


def _cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each iteration and place [iteration place]."""
    n_iterations, n_places, _ = logits.shape
    repeated = targets.expand(n_iterations, n_places).flatten()
    return cross_entropy(logits.flatten(0, 1), repeated, reduction="none").view(n_iterations, n_places)
