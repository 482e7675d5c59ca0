"""What a training gives back."""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from loop_lens.figures.canvas import new_figure
from loop_lens.measuring.results import Result
from loop_lens.models.checkpoint import Checkpoint
from loop_lens.models.native.kind import NATIVE
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
class TrainingResult(Result):
    """A training that came to its end.

    Saved, it holds the log; the model lies in the training's folder already, and is opened there when it is asked for.

    Attributes:
        path: The training's folder.
        columns: The log: one row per `TrainingConfig.log_every` steps with step, loss and accuracy (means since the
            row before), lr, level, recurrences, grad_norm and seconds [row].
        steps: Number of steps done.
        levels_passed: The levels of the curriculum that were passed, each with the number of steps after which.
        seconds: Time spent, that of interrupted runs included up to their last checkpoint.
        trained: The trained model in memory.

    Example:
        >>> from loop_lens.training import TrainingConfig, TrainingResult, train
        >>> task = loop_lens.data.AdditionTask()
        >>> size = loop_lens.LoopedConfig(vocab_size=task.vocab_size, hidden_size=16, intermediate_size=16)
        >>> net = loop_lens.LoopedTransformer(size)
        >>> config = TrainingConfig(steps=4, batch_size=4, log_every=2)
        >>> result = train(net, task, config, folder="run", progress=False)
        >>> result.log["step"].tolist(), result.passed
        ([2, 4], {})
        >>> result.save("result.safetensors")
        >>> TrainingResult.load("result.safetensors").model.config.recurrences
        4
    """

    path: str
    columns: dict[str, Tensor]
    steps: int
    levels_passed: tuple[tuple[int, int], ...]
    seconds: float
    trained: InitVar[LoopedTransformer | None] = None

    def __post_init__(self, trained: LoopedTransformer | None) -> None:
        object.__setattr__(self, "_model", trained)

    @property
    def model(self) -> LoopedTransformer:
        """The trained model, in eval mode.

        Raises:
            UnreadableError: If the folder's model is damaged.
        """
        model: LoopedTransformer | None = getattr(self, "_model")  # noqa: B009 (no field of the dataclass)
        if model is None:
            checkpoint = Checkpoint(self.folder / "model")
            model = NATIVE.load(checkpoint, dtype=None, attn_implementation=None)
            object.__setattr__(self, "_model", model)
        return model

    @property
    def folder(self) -> Path:
        """Where the log, the last checkpoint and, under ``model``, the model itself lie."""
        return Path(self.path)

    @property
    def log(self) -> pd.DataFrame:
        """The log as a table."""
        return pd.DataFrame({name: column.numpy() for name, column in self.columns.items()})

    @property
    def passed(self) -> dict[int, int]:
        """For each level of the curriculum that was passed, after how many steps."""
        return dict(self.levels_passed)

    def to_dataframe(self) -> pd.DataFrame:
        """The log."""
        return self.log

    def plot(self) -> Any:
        """Draw loss and accuracy over the steps; a matplotlib figure, not shown."""
        figure, (above, below) = new_figure(7, 4.5, rows=2, sharex=True)
        log = self.log
        above.plot(log["step"], log["loss"], linewidth=1)
        below.plot(log["step"], log["accuracy"], linewidth=1)
        for level, step in self.passed.items():
            for axes in (above, below):
                axes.axvline(step, color="grey", linewidth=0.6, linestyle=":")
            below.annotate(f"{level}", (step, 0.02), fontsize=7, color="grey", ha="right")
        above.set(ylabel="loss (nats)", yscale="log")
        below.set(ylabel="accuracy", xlabel="step", ylim=(0, 1.02))
        return figure
