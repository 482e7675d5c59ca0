"""The paper's grid of models with random weights: measured one by one, kept on disk, read again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.dynamics import LIMIT_KINDS, limiting_behaviours, spectral_radius
from loop_lens.dynamics.limits import LEAST
from loop_lens.experiments.random_models import NORMS, RandomModel
from loop_lens.measuring.moments import DivergedError
from loop_lens.measuring.results import Result

_ANGLE_FLOOR = math.sqrt(2 * torch.finfo(torch.float32).eps)  # what rounding of a cosine near 1 looks like

Kind = tuple[int, bool, str]
"""Layers, whether there is injection, and the norm."""


@dataclass(frozen=True)
class Settings:
    """How models are measured.

    Attributes:
        recurrences: Iterations that are measured, T.
        reference: Number of iterations whose last states are a reference beyond T.
        prompts: Prompts of uniformly random tokens.
        length: Tokens of each.
        krylov: Steps of the spectral radius; 0 leaves it out.
    """

    recurrences: int = 128
    reference: int = 160
    prompts: int = 2
    length: int = 32
    krylov: int = 24

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

    @property
    def name(self) -> str:
        """A name for files."""
        return f"{self.recurrences}-{self.reference}-{self.prompts}x{self.length}-k{self.krylov}"

    def tokens(self, vocabulary: int) -> Int[Tensor, "prompt pos"]:
        """The prompts, the same for all models."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocabulary, (self.prompts, self.length), generator=generator)


@dataclass(frozen=True)
class Measured(Result):
    """What was measured of one model, or of several that differ by seed alone.

    Attributes:
        model: The fields of its `RandomModel`.
        curves: Means over tokens [iteration layer]: ``norm``; ``step``, ``relative_step``, ``step_cosine`` (M1,
            M2); ``last_distance``, ``last_cosine`` (M4, M5, to the last measured iteration); ``distance``,
            ``relative_distance``, ``cosine`` to the reference beyond, and ``matrix_distance``, the relative
            distance of the whole [pos d_model] matrix.
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

    def late(self, curve: str) -> Tensor:
        """A curve's mean over the last quarter of the iterations [layer]."""
        return _late(self.curves[curve])

    @property
    def settled(self) -> float:
        """Cosine to the reference beyond, in the last quarter of the iterations, at the layer where it is least."""
        return float(self.late("cosine").min())

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

    @property
    def fixed(self) -> float:
        """Share of tokens that Algorithm 1 calls fixed points, over all layers, from 0 to 1."""
        return float(self.kinds[:, 0].sum() / self.kinds.sum())

    @property
    def relative_distance(self) -> float:
        """Distance to the reference over the norm, in the last quarter, at the layer where it is largest."""
        return float(self.late("relative_distance").max())

    def summary(self) -> dict[str, Any]:
        """One row: the model, then numbers of the last quarter and shares of limiting behaviours in percent."""
        kinds = 100 * self.kinds.sum(0) / self.kinds.sum()
        return {
            **self.model,
            "settled_cosine": self.settled,
            "one_point_cosine": self.one_point,
            "apart": self.apart,
            "relative_distance": self.relative_distance,
            "matrix_relative_distance": float(self.late("matrix_distance").max()),
            "last_relative_step": float(self.curves["relative_step"][-1].max()),
            "last_step_cosine": float(self.curves["step_cosine"][-1].min()),
            "last_norm": float(self.curves["norm"][-1].mean()),
            "radius": self.radius,
            **{
                f"percent_{kind.replace(' ', '_')}": float(x)
                for kind, x in zip(LIMIT_KINDS, kinds, strict=True)
            },
        }

    def to_dataframe(self) -> pd.DataFrame:
        """One row per iteration and layer with every curve, and M9 (the same at all layers)."""
        iterations, layers = self.curves["norm"].shape
        grid = {
            "iteration": torch.arange(iterations)[:, None].expand(-1, layers),
            "layer": torch.arange(layers).expand(iterations, -1),
            **self.curves,
            **{f"degeneracy_{name}": x[:, None].expand(-1, layers) for name, x in self.degeneracy.items()},
        }
        table = pd.DataFrame({name: values.flatten().tolist() for name, values in grid.items()})
        for name, value in reversed(self.model.items()):
            table.insert(0, name, value)
        return table


def _angle(cosine: float) -> float:
    return math.acos(min(max(cosine, -1.0), 1.0))


def _late(curve: Tensor) -> Tensor:
    return curve[-max(1, len(curve) // 4) :].mean(0)


@torch.no_grad()
def states_of(
    model: HookedLoopedTransformer, tokens: Tensor
) -> Float[Tensor, "iteration layer token d_model"]:
    """Every block's output, as plain hooks on the blocks see it, iteration after iteration."""
    native: Any = model.original_model
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, output: seen.append(output.flatten(0, 1)))
        for block in native.model.core
    ]
    try:
        native(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(seen).unflatten(0, (-1, len(handles)))


def measure_one(spec: RandomModel, model: HookedLoopedTransformer, settings: Settings) -> Measured:
    """Measure a model that has its weights and runs to the reference.

    All states are kept, so one run serves both references; where there is no room for them,
    `loop_lens.dynamics.convergence` measures the same.
    """
    tokens = settings.tokens(model.cfg.d_vocab)
    states = states_of(model, tokens)
    if not bool(states.isfinite().all()):
        first = int((~states.isfinite()).flatten(1).any(1).nonzero()[0])
        raise DivergedError(f"the states of {spec.name} became NaN or infinite, first at iteration {first}")
    x, end = states[: settings.recurrences], states[-1]
    last = x[-1]
    norm, apart = x.norm(dim=-1), (x - end).norm(dim=-1)
    step = torch.full_like(norm, math.nan)
    step[1:] = (x[1:] - x[:-1]).norm(dim=-1)
    turn = torch.full_like(norm, math.nan)
    turn[1:] = cosine_similarity(x[1:], x[:-1], dim=-1)
    to_last = cosine_similarity(x, last[None], dim=-1)
    curves = {
        "norm": norm,
        "step": step,
        "relative_step": step / norm,
        "step_cosine": turn,
        "last_distance": (x - last).norm(dim=-1),
        "last_cosine": to_last,
        "distance": apart,
        "relative_distance": apart / norm,
        "cosine": cosine_similarity(x, end[None], dim=-1),
    }
    whole = apart.unflatten(-1, tokens.shape).norm(dim=-1) / norm.unflatten(-1, tokens.shape).norm(dim=-1)
    degeneracy: dict[str, Tensor] = {}
    for name, goal in (("last_", last), ("", end)):
        degeneracy[f"{name}cosine"] = cosine_similarity(x[:, :1], goal[None], dim=-1).amin(1).mean(-1)
        degeneracy[f"{name}distance"] = (x[:, :1] - goal).norm(dim=-1).amax(1).mean(-1)
    kind = limiting_behaviours(to_last[:-1].permute(1, 2, 0)).kind[0, 0]  # layer token
    kinds = torch.nn.functional.one_hot(kind, len(LIMIT_KINDS)).sum(1)
    radius = math.nan
    if settings.krylov:
        few = tokens[:1, :16]
        radii = spectral_radius(model, few, iteration=settings.recurrences - 1, steps=settings.krylov)
        radius = float(radii.max())
    means = {name: values.mean(-1) for name, values in curves.items()}
    return Measured(spec.asdict(), {**means, "matrix_distance": whole.mean(-1)}, degeneracy, kinds, radius)


def grid(
    *,
    layers: Sequence[int] = (4, 12, 16),
    seeds: int = 3,
    width: int = 128,
    init: str = "huginn",
    double: bool = False,
) -> list[RandomModel]:
    """The models of the grid, those of one shape next to each other."""
    return [
        RandomModel(norm, injection, n, seed, width, init, double)
        for n, injection, norm, seed in product(layers, (True, False), NORMS, range(seeds))
    ]


def run_grid(
    models: Iterable[RandomModel],
    settings: Settings,
    *,
    cache: Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> list[Measured]:
    """Measure models, or read what an earlier run measured of them.

    Args:
        models: The models; those of one shape are quicker next to each other.
        settings: How to measure.
        cache: Folder for one file per model.
        resume: Whether to read the files that are there.
        progress: Whether to show a progress bar, for work beyond two seconds.

    Returns:
        What was measured, in the models' order.
    """
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / ".gitignore").write_text("*\n")
    found: list[Measured] = []
    every = list(models)
    with tqdm(total=len(every), desc="random models", delay=2, disable=not progress, leave=False) as bar:
        for _, alike in groupby(every, key=_shape):
            opened: HookedLoopedTransformer | None = None
            for spec in alike:
                file = cache / f"{spec.name}-{settings.name}.safetensors" if cache is not None else None
                if file is not None and resume and file.exists():
                    found.append(Measured.load(file))
                else:
                    if opened is None:
                        opened = spec.open(settings.reference)
                    else:
                        spec.initialise(opened)
                    result = measure_one(spec, opened, settings)
                    if file is not None:
                        # Under its own name only when it is whole.
                        part = file.with_suffix(".part")
                        result.save(part)
                        part.replace(file)
                    found.append(result)
                bar.update()
    return found


def _shape(spec: RandomModel) -> tuple[Any, ...]:
    return spec.norm, spec.injection, spec.layers, spec.width, spec.double


def pooled(results: Iterable[Measured]) -> dict[Kind, Measured]:
    """The models that differ by seed alone as one, by (layers, injection, norm): curves and radii averaged."""
    groups: dict[Kind, list[Measured]] = {}
    for result in results:
        groups.setdefault(kind_of(result), []).append(result)
    return {key: _mean(seeds) for key, seeds in groups.items()}


def kind_of(result: Measured) -> Kind:
    """(layers, injection, norm) of a measured model."""
    return result.of.layers, result.of.injection, result.of.norm


def _mean(seeds: list[Measured]) -> Measured:
    def mean(field: str) -> dict[str, Tensor]:
        first: dict[str, Tensor] = getattr(seeds[0], field)
        return {name: torch.stack([getattr(each, field)[name] for each in seeds]).mean(0) for name in first}

    kinds = torch.stack([each.kinds for each in seeds]).sum(0)
    radius = sum(each.radius for each in seeds) / len(seeds)
    return Measured(seeds[0].model, mean("curves"), mean("degeneracy"), kinds, radius)
