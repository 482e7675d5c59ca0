"""How to train, in one value."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from loop_lens.models.native.config import LoopedConfig
from loop_lens.training.curriculum import Curriculum
from loop_lens.training.losses import LastIteration, Loss
from loop_lens.training.recurrences import Fixed, Ramp, Recurrences
from loop_lens.unrolling.numbers import whole

SCHEDULES = ("constant", "cosine", "1-sqrt")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train a looped model.

    Attributes:
        steps: Number of steps, at most where a curriculum may end training earlier.
        batch_size: Sequences per step, of all processes together.
        lr: Peak learning rate.
        warmup: Steps over which the learning rate rises linearly to its peak.
        schedule: ``"constant"``; ``"cosine"``: down to ``lr * final_lr`` at the last step; ``"1-sqrt"``:
            constant, then over the last ``cooldown`` steps lr * (1 - sqrt(done)).
        final_lr: Where the cosine and the cooldown end, as a fraction of the peak.
        cooldown: Number of steps of the cooldown, for ``"1-sqrt"``.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
        weight_decay: AdamW's decay of matrices; norms, biases and embeddings have none.
        clip: Largest norm of all gradients together; None for no limit.
        seed: Seed of data, iterations and initial states. Weights are the model's own.
        recurrences: Number of iterations of each step.
        ramp: Iterations that grow over the first steps.
        backprop_iterations: Gradients flow through this many last iterations only; None for all.
        loss: `LastIteration`, `WeightedIterations` or `ExitGateLoss`.
        level: Level of the task, where there is no curriculum.
        curriculum: Levels in order, and when to go on.
        gradient_checkpointing: Whether blocks are run again in the backward pass instead of being stored.
        mixed_precision: ``"no"``, or ``"bf16"`` for autocast.
        checkpoint_every: Steps between checkpoints; None for none but the last.
        log_every: Steps between rows of the log.

    Raises:
        ValueError: If a setting makes no sense, saying which.

    Example:
        >>> from loop_lens.training import TrainingConfig, Uniform
        >>> config = TrainingConfig(steps=100, lr=1e-3, warmup=10, schedule="cosine", recurrences=Uniform(2, 6))
        >>> [round(config.learning_rate(step, end=100), 5) for step in (0, 9, 99)]
        [0.0001, 0.001, 0.0]
    """

    steps: int
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 100
    schedule: str = "constant"
    final_lr: float = 0.0
    cooldown: int = 0
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip: float | None = 1.0
    seed: int = 0
    recurrences: Recurrences = field(default_factory=lambda: Fixed(4))
    ramp: Ramp | None = None
    backprop_iterations: int | None = None
    loss: Loss = field(default_factory=LastIteration)
    level: int = 1
    curriculum: Curriculum | None = None
    gradient_checkpointing: bool = False
    mixed_precision: str = "no"
    checkpoint_every: int | None = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        least = {"warmup": 0, "cooldown": 0, "seed": 0}
        for each in fields(self):
            value, kind = getattr(self, each.name), str(each.type)
            if kind.startswith("int") and not (value is None and kind.endswith("None")):
                object.__setattr__(self, each.name, whole(value, each.name, least.get(each.name, 1)))
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be a number above 0, got {self.lr}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay ({self.weight_decay}) must not be negative")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is unknown: choose one of {SCHEDULES}")
        if (self.schedule == "1-sqrt") != (self.cooldown > 0):
            raise ValueError(
                f"schedule {self.schedule!r} with cooldown={self.cooldown}: the cooldown is the number of steps "
                "of '1-sqrt', which needs at least one, and belongs to no other schedule"
            )
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"final_lr is a fraction of the peak, 0 to 1, got {self.final_lr}")
        if not all(0 <= beta < 1 for beta in self.betas) or not self.eps > 0:
            raise ValueError(f"betas {self.betas} must be in [0, 1) and eps ({self.eps}) above 0")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be above 0, or None for no limit, got {self.clip}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be 0 to 2**63 - 1, got {self.seed}")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision {self.mixed_precision!r} is unknown: choose 'no' or 'bf16'")
        if not isinstance(self.loss, Loss):
            raise TypeError(
                f"loss must be LastIteration(), WeightedIterations() or ExitGateLoss(), got {self.loss!r}"
            )
        if not isinstance(self.recurrences, Recurrences):
            raise TypeError(
                f"recurrences must be Fixed, Uniform or LogNormalPoisson, got {self.recurrences!r}: "
                "for one number give Fixed(n)"
            )

    def require_model(self, model: LoopedConfig) -> None:
        """Raise unless a model of this configuration can be trained like this."""
        constant = None if self.ramp is not None else self.recurrences.constant
        self.loss.require(model, constant)

    def learning_rate(self, step: int, end: int) -> float:
        """The learning rate of a step.

        Args:
            step: The step, from 0.
            end: The number of steps after which training ends.
        """
        lr = self.lr * min(1.0, (step + 1) / self.warmup) if self.warmup else self.lr
        if self.schedule == "cosine":
            done = min(1.0, max(0, step - self.warmup) / max(1, end - 1 - self.warmup))
            return lr * (self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * done)) / 2)
        if self.schedule == "1-sqrt":
            done = max(0.0, (step - (end - self.cooldown)) / self.cooldown)
            return lr * (self.final_lr + (1 - self.final_lr) * (1 - math.sqrt(min(1.0, done))))
        return lr

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON can say them, with the kinds of rules."""
        plain = asdict(self)
        plain["loss"] = {"kind": type(self.loss).__name__, **plain["loss"]}
        plain["recurrences"] = {"kind": type(self.recurrences).__name__, **plain["recurrences"]}
        return plain
