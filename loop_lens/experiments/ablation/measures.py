"""What is measured of one model of the ablation, before training and after."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.data.task import Task, TaskBatch
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
    """How much is measured of a model."""

    recurrences: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 16, 17, 32)  # whose loss and accuracy
    tested: int = 384  # sequences for these, on a synthetic task
    text_tested: int = 96  # the same on text, whose sequences are long
    iterations: int = 64  # in which convergence is followed
    reference: int = 128  # iterations whose last states distances are to
    prompts: int = 8  # sequences for convergence and stages
    krylov: int = 40  # steps of the spectral radius
    krylov_prompts: int = 2

    def __post_init__(self) -> None:
        if self.iterations < 4 or self.reference <= self.iterations:
            raise ValueError(
                f"iterations={self.iterations}, reference={self.reference}: follow at least 4 iterations, and "
                "take the reference beyond them"
            )

    def batch(self, task: Task, level: int) -> TaskBatch:
        """The test sequences."""
        n = self.text_tested if task.name == "text" else self.tested
        return task.batch(n, level=level, generator=torch.Generator().manual_seed(0), split="test")


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
        moves = self.convergence
        if moves is None:
            names = ("relative_distance", "nearest", "cosine", "relative_step", "degeneracy", "growth")
            numbers: dict[str, float] = dict.fromkeys(names, math.nan)
        else:
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
    """Measure a model after training, at its own number of iterations and others, and before it, on one batch."""
    before, after = (wrap(net.eval().requires_grad_(False)) for net in (initial, trained))
    first, second = (_measure_state(model, batch.input_ids, how, progress) for model in (before, after))
    numbers = how.recurrences if after.recurrences > 1 else (1, 2)  # of a feed-forward model the first counts
    options: dict[str, Any] = {"labels": batch.labels, "batch_size": 32, "progress": progress}
    found = extrapolate(after, batch.input_ids, recurrences=numbers, **options)
    answers = {"recurrences": torch.tensor(found.recurrences, dtype=torch.float64)}
    answers |= {metric: found.mean(metric) for metric in ("loss", "accuracy", "kl")}
    if after.recurrences == 1:
        answers = {name: values[:1] for name, values in answers.items()}
    columns = {str(name): torch.tensor(log[name].tolist(), dtype=torch.float64) for name in log}
    return CellResult(columns, answers, first, second)


def _measure_state(
    model: HookedLoopedTransformer, tokens: Tensor, how: Measuring, progress: bool
) -> StateResult:
    prompts = tokens[: how.prompts]
    found = stages(model, prompts, progress=progress)
    if model.recurrences == 1:
        return StateResult(as_feed_forward(found), None, math.nan)
    moves, radius = None, math.nan
    try:
        with model.at_recurrences(how.iterations):
            moves = convergence(model, prompts, reference=how.reference, patterns=False, progress=progress)
            few = prompts[: how.krylov_prompts]
            radii = spectral_radius(model, few, iteration=how.iterations - 1, steps=how.krylov)
            radius = float(radii.max())
    except DivergedError:
        pass
    return StateResult(found, moves, radius)


def as_feed_forward(found: Stages) -> Stages:
    """Stages of a model whose loop runs once, as those of its layers one after the other."""
    if found.recurrences != 1:
        raise ValueError(f"these stages are of {found.recurrences} iterations: a feed-forward model has one")
    return replace(found, firings=tuple(("blocks", None, k, k) for k in range(len(found.firings))))
