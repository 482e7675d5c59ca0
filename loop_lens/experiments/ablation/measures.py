"""What is measured of one model of the ablation, before training and after."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.data.task import IGNORED, Task, TaskBatch
from loop_lens.dynamics import Convergence, convergence, extrapolate, spectral_radius
from loop_lens.measuring.moments import DivergedError
from loop_lens.measuring.results import Result
from loop_lens.models.native import LoopedTransformer
from loop_lens.opening.entry import wrap
from loop_lens.stages import Stages, stages

STATES = ("initial", "trained")
"""What is measured of a model: before training, and after it."""


@dataclass(frozen=True)
class Measuring:
    """How much is measured.

    Attributes:
        recurrences: The numbers of iterations whose loss and accuracy are measured.
        tested: Test sequences for these, on a synthetic task.
        text_tested: The same on text, whose sequences are long.
        iterations: Iterations in which convergence is followed.
        reference: Number of iterations whose last states distances are to.
        prompts: Test sequences for convergence and stages.
        krylov: Steps of the spectral radius.
        krylov_prompts: Test sequences for it.
        seed: Of the test sequences.
    """

    recurrences: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 16, 17, 32)
    tested: int = 384
    text_tested: int = 96
    iterations: int = 64
    reference: int = 128
    prompts: int = 8
    krylov: int = 40
    krylov_prompts: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 4 or self.reference <= self.iterations:
            raise ValueError(
                f"iterations={self.iterations}, reference={self.reference}: follow at least 4 iterations, and "
                "take the reference beyond them"
            )
        if min(self.tested, self.text_tested, self.prompts, self.krylov, self.krylov_prompts) < 1:
            raise ValueError("measure at least one sequence, and with at least one Krylov step")

    def batch(self, task: Task, level: int) -> TaskBatch:
        """The test sequences."""
        n = self.text_tested if task.name == "text" else self.tested
        return task.batch(n, level=level, generator=torch.Generator().manual_seed(self.seed), split="test")


@dataclass(frozen=True)
class StateResult(Result):
    """What was measured of one model before training, or after.

    Attributes:
        stages: Stages at the trained number of iterations.
        convergence: Over more iterations; None of a feed-forward model, or where states diverged.
        radius: Spectral radius of the last of these iterations; NaN where there is no convergence.
    """

    stages: Stages
    convergence: Convergence | None
    radius: float

    def to_dataframe(self) -> pd.DataFrame:
        """One row per firing of `Stages`."""
        return self.stages.to_dataframe()

    def summary(self) -> dict[str, Any]:
        """How the loop behaves in the last quarter of the followed iterations, at the layer that settles least.

        ``relative_distance`` and ``cosine`` are to the reference and ``degeneracy`` is the least cosine between
        layer 0 and any layer's reference (M9), all three at the worst iteration: an orbit comes by its
        reference again and again, and one of period 2 sits on it in every other iteration. ``nearest`` is the
        relative distance at the best iteration, ``growth`` that of the norm over the second half of the
        iterations.
        """
        names = ("relative_distance", "nearest", "cosine", "relative_step", "degeneracy", "growth")
        numbers: dict[str, Any] = dict.fromkeys(names, math.nan)
        moves = self.convergence
        if moves is not None:
            n = len(moves.iterations)
            late = slice(n - max(2, n // 4), n)
            norm, far = moves.mean("norm"), moves.mean("relative_distance")[late].amax(1)
            numbers = {
                "relative_distance": float(far.max()),
                "nearest": float(far.min()),
                "cosine": float(moves.mean("cosine")[late].min()),
                "relative_step": float(moves.mean("relative_step")[late].max()),
                "degeneracy": float(moves.mean("degeneracy_cosine")[late, 0].min()),
                "growth": float((norm[-1] / norm[n // 2 - 1]).max()),
            }
        return {**numbers, "radius": self.radius, "diverged": moves is None}


@dataclass(frozen=True)
class CellResult(Result):
    """What was measured of one model.

    Attributes:
        log: Columns of the training's log, by name: step, loss, accuracy, seconds, ... [row].
        answers: Test loss (nats), accuracy, and KL divergence (nats) to the answers after the trained number of
            iterations, by ``recurrences`` [number].
        initial: Of the model before training.
        trained: Of the model after it.
    """

    log: dict[str, Tensor]
    answers: dict[str, Tensor]
    initial: StateResult
    trained: StateResult

    @property
    def states(self) -> dict[str, StateResult]:
        """By the names of `STATES`."""
        return dict(zip(STATES, (self.initial, self.trained), strict=True))

    def to_dataframe(self) -> pd.DataFrame:
        """Loss and accuracy by number of iterations."""
        return pd.DataFrame({name: values.tolist() for name, values in self.answers.items()})

    def training(self) -> pd.DataFrame:
        """The training's log."""
        return pd.DataFrame({name: values.tolist() for name, values in self.log.items()})


def measure_cell(
    trained: LoopedTransformer,
    initial: LoopedTransformer,
    batch: TaskBatch,
    log: pd.DataFrame,
    how: Measuring,
    *,
    progress: bool = True,
) -> CellResult:
    """Measure a model on test sequences.

    Args:
        trained: The model after training; its own number of iterations is the trained one.
        initial: The same before.
        batch: The test sequences.
        log: The training's log.
        how: How much to measure.
        progress: Whether to show progress bars.
    """
    before, after = (wrap(net.eval().requires_grad_(False)) for net in (initial, trained))
    first, second = (_measure_state(model, batch.input_ids, how, progress) for model in (before, after))
    answers = _answers(after, batch, how, progress) if after.recurrences > 1 else _answers_once(after, batch)
    return CellResult({str(name): _column(log[name].to_numpy()) for name in log}, answers, first, second)


def _measure_state(
    model: HookedLoopedTransformer, tokens: Tensor, how: Measuring, progress: bool
) -> StateResult:
    prompts = tokens[: how.prompts]
    found = stages(model, prompts, progress=progress)
    if model.recurrences == 1:
        return StateResult(as_feed_forward(found), None, math.nan)
    moves = None
    try:
        with model.at_recurrences(how.iterations):
            moves = convergence(model, prompts, reference=how.reference, patterns=False, progress=progress)
            few = prompts[: how.krylov_prompts]
            radii = spectral_radius(model, few, iteration=how.iterations - 1, steps=how.krylov)
            radius = float(radii.max())
    except DivergedError:
        radius = math.nan
    return StateResult(found, moves, radius)


def _answers(
    model: HookedLoopedTransformer, batch: TaskBatch, how: Measuring, progress: bool
) -> dict[str, Tensor]:
    """Loss and accuracy by number of iterations."""
    options: dict[str, Any] = {"labels": batch.labels, "batch_size": 32, "progress": progress}
    found = extrapolate(model, batch.input_ids, recurrences=how.recurrences, **options)
    columns = {metric: found.mean(metric) for metric in ("loss", "accuracy", "kl")}
    return {"recurrences": _column(found.recurrences), **columns}


@torch.no_grad()
def _answers_once(model: HookedLoopedTransformer, batch: TaskBatch) -> dict[str, Tensor]:
    """The same of a feed-forward model, by its one forward."""
    asked = batch.labels != IGNORED
    right = batch.labels[asked]
    logits: Any = model(batch.input_ids)
    loss = torch.nn.functional.cross_entropy(logits[asked].double(), right)
    accuracy = (logits[asked].argmax(-1) == right).double().mean()
    values = {"recurrences": 1.0, "loss": float(loss), "accuracy": float(accuracy), "kl": 0.0}
    return {name: _column([value]) for name, value in values.items()}


def _column(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def as_feed_forward(found: Stages) -> Stages:
    """Stages of a model whose loop runs once, as those of its layers one after the other."""
    if found.recurrences != 1:
        raise ValueError(f"these stages are of {found.recurrences} iterations: a feed-forward model has one")
    return replace(found, firings=tuple(("blocks", None, k, k) for k in range(len(found.firings))))
