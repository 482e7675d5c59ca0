"""What a training gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from loop_lens.figures.canvas import new_figure
from loop_lens.models.native.modeling import LoopedTransformer


@dataclass(frozen=True)
class StepRecord:
    """One step, as callbacks see it.

    Attributes:
        step: Number of steps done, this one included.
        loss: Mean loss over labelled positions, in nats.
        accuracy: Share of labelled positions that the last iteration names, 0 to 1.
        lr: Learning rate.
        level: Level of the task.
        recurrences: Number of iterations.
        grad_norm: Norm of all gradients together, before clipping.

    Example:
        >>> from loop_lens.training import TrainingConfig, train
        >>> task = loop_lens.data.AdditionTask()
        >>> size = loop_lens.LoopedConfig(vocab_size=task.vocab_size, hidden_size=16, intermediate_size=16)
        >>> net = loop_lens.LoopedTransformer(size)
        >>> config, records = TrainingConfig(steps=2, batch_size=4), []
        >>> result = train(net, task, config, folder="run", progress=False, on_step=records.append)
        >>> [(record.step, record.level, record.recurrences) for record in records]
        [(1, 1, 4), (2, 1, 4)]
    """

    step: int
    loss: float
    accuracy: float
    lr: float
    level: int
    recurrences: int
    grad_norm: float


@dataclass(frozen=True)
class TrainingResult:
    """A training that came to its end.

    Attributes:
        model: The trained model, in eval mode.
        folder: Where its log, its last checkpoint and, under ``model``, the model itself lie.
        log: One row per `TrainingConfig.log_every` steps: step, loss and accuracy (means since the row
            before), lr, level, recurrences, grad_norm, seconds.
        steps: Number of steps done.
        passed: For each level of the curriculum that was passed, after how many steps.
        seconds: Time spent, that of interrupted runs included up to their last checkpoint.

    Example:
        >>> from loop_lens.training import TrainingConfig, train
        >>> task = loop_lens.data.AdditionTask()
        >>> size = loop_lens.LoopedConfig(vocab_size=task.vocab_size, hidden_size=16, intermediate_size=16)
        >>> net = loop_lens.LoopedTransformer(size)
        >>> config = TrainingConfig(steps=4, batch_size=4, log_every=2)
        >>> result = train(net, task, config, folder="run", progress=False)
        >>> result.log["step"].tolist(), result.passed
        ([2, 4], {})
    """

    model: LoopedTransformer
    folder: Path
    log: pd.DataFrame
    steps: int
    passed: dict[int, int]
    seconds: float

    def to_dataframe(self) -> pd.DataFrame:
        """The log."""
        return self.log

    def plot(self) -> Any:
        """Draw loss and accuracy over the steps; a matplotlib figure, not shown."""
        figure, (above, below) = new_figure(7, 4.5, rows=2, sharex=True)
        above.plot(self.log["step"], self.log["loss"], linewidth=1)
        below.plot(self.log["step"], self.log["accuracy"], linewidth=1)
        for level, step in self.passed.items():
            for axes in (above, below):
                axes.axvline(step, color="grey", linewidth=0.6, linestyle=":")
            below.annotate(f"{level}", (step, 0.02), fontsize=7, color="grey", ha="right")
        above.set(ylabel="loss (nats)", yscale="log")
        below.set(ylabel="accuracy", xlabel="step", ylim=(0, 1.02))
        return figure
