"""What is measured of the paper's grid of models with random weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.dynamics import LIMIT_KINDS, convergence, limit_table, spectral_radius
from loop_lens.dynamics.limits import LEAST
from loop_lens.experiments.grid_run import Kept, run_grid
from loop_lens.experiments.norms import NORMS
from loop_lens.experiments.random_init.models import RandomModel
from loop_lens.measuring.results import Result

_STEPS = ("norm", "step", "relative_step", "step_cosine")
_TO_A_STATE = ("distance", "cosine")
_ANGLE_FLOOR = math.sqrt(2 * torch.finfo(torch.float32).eps)  # what rounding of a cosine near 1 looks like

Kind = tuple[int, bool, str]
"""Layers, whether there is injection, and the norm."""


@dataclass(frozen=True)
class Settings:
    """How models are measured."""

    recurrences: int = 128
    reference: int = 160  # iterations whose last states are a reference beyond
    prompts: int = 2  # of uniformly random tokens
    length: int = 32
    krylov: int = 24  # steps of the spectral radius; 0 leaves it out

    def __post_init__(self) -> None:
        if self.recurrences < LEAST + 1:
            raise ValueError(
                f"recurrences={self.recurrences} is too few: limiting behaviour needs at least {LEAST + 1} "
                "iterations"
            )
        if self.reference <= self.recurrences:
            raise ValueError(
                f"reference={self.reference} is not beyond what is measured ({self.recurrences} iterations): "
                "give more"
            )
        if self.prompts < 1 or self.length < 2:
            raise ValueError(
                f"{self.prompts} prompts of {self.length} tokens are too few: give at least one of two tokens"
            )

    def tokens(self, vocabulary: int) -> Int[Tensor, "prompt pos"]:
        """The prompts, the same for all models."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocabulary, (self.prompts, self.length), generator=generator)


@dataclass(frozen=True)
class RandomResult(Result):
    """What was measured of one model, or of several that differ by seed alone.

    Attributes:
        model: The fields of its `RandomModel`.
        curves: Means over tokens [iteration layer]: ``norm``; ``step``, ``relative_step``, ``step_cosine`` (M1,
            M2); ``last_distance``, ``last_cosine`` (M4, M5, to the last measured iteration); ``distance``,
            ``relative_distance``, ``cosine`` to the reference beyond, and ``matrix_distance``, that of the whole
            [pos d_model] matrix, in the mean over prompts, relative to the matrix' norm.
        degeneracy: Means over tokens [iteration] of M9: ``last_cosine`` and ``last_distance``, the least cosine
            and the largest distance between layer 0 and any layer's last state; ``cosine`` and ``distance``
            to the states of the reference.
        kinds: Tokens by their limiting behaviour, in the order of `loop_lens.dynamics.LIMIT_KINDS`, from the cosines
            to the last state [layer kind].
        radius: Spectral radius of the last iteration's Jacobian; NaN if left out.
    """

    model: dict[str, Any]
    curves: dict[str, Tensor]
    degeneracy: dict[str, Tensor]
    kinds: Tensor
    radius: float

    @property
    def of(self) -> RandomModel:
        """The model."""
        return RandomModel(**self.model)

    @property
    def settled(self) -> float:
        """Cosine to the reference beyond, in the last quarter of the iterations, at the layer where it is least."""
        return float(_late(self.curves["cosine"]).min())

    @property
    def one_point(self) -> float:
        """Least cosine between layer 0 in the last quarter and any layer's state at the reference (M9)."""
        return float(_late(self.degeneracy["cosine"]))

    @property
    def apart(self) -> float:
        """Angle of `one_point` over the angle of `settled`: how much farther apart layers are than they move.

        About 1 where all layers are at one point, as far as can be told from how far they still move.
        """
        return _angle(self.one_point) / max(_angle(self.settled), _ANGLE_FLOOR)

    def summary(self) -> dict[str, Any]:
        """One row: the model, then numbers of the last quarter and shares of limiting behaviours in percent."""
        percent = (100 * self.kinds.sum(0) / self.kinds.sum()).tolist()
        return {
            **self.model,
            "settled_cosine": self.settled,
            "one_point_cosine": self.one_point,
            "apart": self.apart,
            "relative_distance": float(_late(self.curves["relative_distance"]).max()),
            "matrix_relative_distance": float(_late(self.curves["matrix_distance"]).max()),
            "last_relative_step": float(self.curves["relative_step"][-1].max()),
            "last_step_cosine": float(self.curves["step_cosine"][-1].min()),
            "last_norm": float(self.curves["norm"][-1].mean()),
            "radius": self.radius,
            **{f"percent_{kind.replace(' ', '_')}": x for kind, x in zip(LIMIT_KINDS, percent, strict=True)},
        }

    def to_dataframe(self) -> pd.DataFrame:
        """Its `summary`."""
        return pd.DataFrame([self.summary()])


def _angle(cosine: float) -> float:
    return math.acos(min(max(cosine, -1.0), 1.0))


def _late(curve: Tensor) -> Tensor:
    """Mean over the last quarter of the iterations."""
    return curve[-max(1, len(curve) // 4) :].mean(0)


def measure_one(spec: RandomModel, model: HookedLoopedTransformer, settings: Settings) -> RandomResult:
    """Measure a model that has its weights."""
    tokens = settings.tokens(model.cfg.d_vocab)
    options: dict[str, Any] = {"patterns": False, "progress": False}
    with model.at_recurrences(settings.recurrences):
        beyond = convergence(model, tokens, reference=settings.reference, **options)
        last = convergence(model, tokens, reference=settings.recurrences, keep=True, **options)
        limits = limit_table(model, tokens, progress=False)
        radius = math.nan
        if settings.krylov:
            few = tokens[:1, :16]
            radii = spectral_radius(model, few, iteration=settings.recurrences - 1, steps=settings.krylov)
            radius = float(radii.max())
    curves = {name: beyond.mean(name) for name in (*_STEPS, *_TO_A_STATE, "relative_distance")}
    # The Frobenius norm of the states of one prompt is the root mean square of its tokens' norms, times sqrt(pos).
    whole = (beyond.mean("norm") ** 2 + beyond.std("norm") ** 2).sqrt() * math.sqrt(settings.length)
    curves["matrix_distance"] = beyond.mean("matrix_distance") / whole
    curves |= {f"last_{name}": last.mean(name) for name in _TO_A_STATE}
    degeneracy = {
        f"{prefix}{name}": found.mean(f"degeneracy_{name}")[:, 0]
        for prefix, found in (("", beyond), ("last_", last))
        for name in _TO_A_STATE
    }
    return RandomResult(asdict(spec), curves, degeneracy, limits.counts[0, 0, 0, : spec.layers], radius)


def grid(*, layers: Sequence[int] = (4, 12, 16), seeds: int = 3, **fields: Any) -> list[RandomModel]:
    """The models of the grid, those of one shape next to each other; fields of `RandomModel` are the same for all."""
    kinds = product(layers, (True, False), NORMS, range(seeds))
    return [RandomModel(norm, injection, n, seed, **fields) for n, injection, norm, seed in kinds]


def measure_grid(
    models: Iterable[RandomModel],
    settings: Settings,
    *,
    cache: Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> list[RandomResult]:
    """Measure models in order, those of one shape next to each other; a file of each is kept in ``cache``."""
    opened: dict[tuple[Any, ...], HookedLoopedTransformer] = {}

    def measure(spec: RandomModel) -> RandomResult:
        if spec.shape in opened:
            spec.initialise(opened[spec.shape])
        else:
            opened.clear()
            opened[spec.shape] = spec.open(settings.reference)
        return measure_one(spec, opened[spec.shape], settings)

    kept = None if cache is None else Kept(cache, RandomResult, settings)
    return list(run_grid(models, measure, kept, resume=resume, progress=progress).values())


def by_kind(results: Iterable[RandomResult]) -> dict[Kind, list[RandomResult]]:
    """Results by (layers, injection, norm)."""
    groups: dict[Kind, list[RandomResult]] = {}
    for result in results:
        groups.setdefault((result.of.layers, result.of.injection, result.of.norm), []).append(result)
    return groups


def pooled(results: Iterable[RandomResult]) -> dict[Kind, RandomResult]:
    """The models that differ by seed alone as one: curves and radii averaged, tokens counted together."""

    def mean(seeds: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([each[name] for each in seeds]).mean(0) for name in seeds[0]}

    return {
        kind: RandomResult(
            seeds[0].model,
            mean([each.curves for each in seeds]),
            mean([each.degeneracy for each in seeds]),
            torch.stack([each.kinds for each in seeds]).sum(0),
            sum(each.radius for each in seeds) / len(seeds),
        )
        for kind, seeds in by_kind(results).items()
    }
