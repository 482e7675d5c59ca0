"""What is measured of one model of the ablation, before training and after."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import loop_lens
from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.data.task import IGNORED, Task, TaskBatch
from loop_lens.dynamics import Convergence, convergence, extrapolate, spectral_radius
from loop_lens.measuring.moments import DivergedError
from loop_lens.measuring.results import Result
from loop_lens.models.native import LoopedTransformer
from loop_lens.stages import Stages, stages

STATES = ("initial", "trained")


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


@dataclass(frozen=True)
class Measured(Result):
    """What was measured of one model.

    Attributes:
        log: Columns of the training's log, by name: step, loss, accuracy, seconds, ... [row].
        said: Test loss (nats), accuracy, and KL divergence (nats) to what is said after the trained number of
            iterations, by ``recurrences`` [number].
        firings: Stages at the trained number of iterations, by state ``"initial"`` and ``"trained"``.
        moves: Convergence, likewise; without a state that diverged, and empty for a feed-forward model.
        radius: Spectral radius of the last followed iteration, likewise; NaN where states diverged.
    """

    log: dict[str, Tensor]
    said: dict[str, Tensor]
    firings: dict[str, Stages]
    moves: dict[str, Convergence]
    radius: dict[str, float]

    def to_dataframe(self) -> pd.DataFrame:
        """Loss and accuracy by number of iterations."""
        return pd.DataFrame({name: values.tolist() for name, values in self.said.items()})

    def training(self) -> pd.DataFrame:
        """The training's log."""
        return pd.DataFrame({name: values.tolist() for name, values in self.log.items()})

    def summary(self, state: str) -> dict[str, Any]:
        """How the loop behaves in the last quarter of the followed iterations, at the layer that settles least.

        ``relative_distance`` and ``cosine`` are to the reference and ``degeneracy`` is the least cosine between
        layer 0 and any layer's reference (M9), all three at the worst iteration: an orbit comes by its
        reference again and again, and one of period 2 sits on it in every other iteration. ``nearest`` is the
        relative distance at the best iteration, ``growth`` that of the norm over the second half of the
        iterations.
        """
        names = ("relative_distance", "nearest", "cosine", "relative_step", "degeneracy", "growth")
        found: dict[str, Any] = {"state": state, **dict.fromkeys(names, math.nan)}
        moves = self.moves.get(state)
        if moves is not None:
            n = len(moves.iterations)
            late = slice(n - max(2, n // 4), n)
            norm, far = moves.mean("norm"), moves.mean("relative_distance")[late].amax(1)
            found |= {
                "relative_distance": float(far.max()),
                "nearest": float(far.min()),
                "cosine": float(moves.mean("cosine")[late].min()),
                "relative_step": float(moves.mean("relative_step")[late].max()),
                "degeneracy": float(moves.mean("degeneracy_cosine")[late, 0].min()),
                "growth": float((norm[-1] / norm[n // 2 - 1]).max()),
            }
        return found | {"radius": self.radius.get(state, math.nan), "diverged": moves is None}

    def save(self, path: str | Path) -> None:
        """Write it as a folder."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for kind, results in (("stages", self.firings), ("moves", self.moves)):
            for state, result in results.items():
                result.save(folder / f"{kind}-{state}.safetensors")
        columns = {part: {k: v.tolist() for k, v in getattr(self, part).items()} for part in ("log", "said")}
        (folder / "numbers.json").write_text(json.dumps({**columns, "radius": self.radius}))

    @classmethod
    def load(cls, path: str | Path) -> Measured:
        """Read what `save` wrote."""
        folder = Path(path)
        numbers = json.loads((folder / "numbers.json").read_text())
        log, said = (
            {k: torch.tensor(v, dtype=torch.float64) for k, v in numbers[part].items()}
            for part in ("log", "said")
        )
        found: dict[str, Any] = {
            kind: {
                state: of.load(folder / f"{kind}-{state}.safetensors")
                for state in STATES
                if (folder / f"{kind}-{state}.safetensors").exists()
            }
            for kind, of in (("stages", Stages), ("moves", Convergence))
        }
        return cls(log, said, found["stages"], found["moves"], numbers["radius"])


def measure_cell(
    trained: LoopedTransformer,
    initial: LoopedTransformer,
    task: Task,
    level: int,
    log: pd.DataFrame,
    how: Measuring,
    *,
    progress: bool = True,
) -> Measured:
    """Measure a model on test sequences.

    Args:
        trained: The model after training; its own number of iterations is the trained one.
        initial: The same before.
        task: What it was trained on.
        level: The task's level.
        log: The training's log.
        how: How much to measure.
        progress: Whether to show progress bars.
    """
    generator = torch.Generator().manual_seed(how.seed)
    n = how.text_tested if task.name == "text" else how.tested
    batch = task.batch(n, level=level, generator=generator, split="test")
    prompts = batch.input_ids[: how.prompts]
    looped = trained.config.recurrences > 1
    firings: dict[str, Stages] = {}
    moves: dict[str, Convergence] = {}
    radius: dict[str, float] = {}
    said: dict[str, Tensor] = {}
    for state, native in zip(STATES, (initial, trained), strict=True):
        model = loop_lens.wrap(native.eval().requires_grad_(False))
        found = stages(model, prompts, progress=progress)
        firings[state] = found if looped else as_feed_forward(found)
        if looped:
            try:
                with model.at_recurrences(how.iterations):
                    moves[state] = convergence(
                        model, prompts, reference=how.reference, patterns=False, progress=progress
                    )
                    few = prompts[: how.krylov_prompts]
                    last = how.iterations - 1
                    radius[state] = float(spectral_radius(model, few, iteration=last, steps=how.krylov).max())
            except DivergedError:
                radius[state] = math.nan
        if state == "trained":
            said = _said(model, batch, how, progress) if looped else _said_once(model, batch)
    columns = {name: torch.tensor(log[name].to_numpy(), dtype=torch.float64) for name in log.columns}
    return Measured(columns, said, firings, moves, radius)


def _said(
    model: HookedLoopedTransformer, batch: TaskBatch, how: Measuring, progress: bool
) -> dict[str, Tensor]:
    found = extrapolate(
        model,
        batch.input_ids,
        recurrences=how.recurrences,
        labels=batch.labels,
        batch_size=32,
        progress=progress,
    )
    columns = {metric: found.mean(metric) for metric in ("loss", "accuracy", "kl")}
    return {"recurrences": torch.tensor(found.recurrences, dtype=torch.float64), **columns}


@torch.no_grad()
def _said_once(model: Any, batch: TaskBatch) -> dict[str, Tensor]:
    """The same of a feed-forward model, by its one forward."""
    kept = batch.labels != IGNORED
    right = batch.labels[kept]
    logits = model(batch.input_ids, return_type="logits")[kept].double()
    loss = torch.nn.functional.cross_entropy(logits, right)
    accuracy = (logits.argmax(-1) == right).double().mean()
    values = {"recurrences": 1.0, "loss": float(loss), "accuracy": float(accuracy), "kl": 0.0}
    return {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}


def as_feed_forward(found: Stages) -> Stages:
    """Stages of a model whose loop runs once, as those of its layers one after the other."""
    if found.recurrences != 1:
        raise ValueError(f"these stages are of {found.recurrences} iterations: a feed-forward model has one")
    return replace(found, firings=tuple(("blocks", None, k, k) for k in range(len(found.firings))))
