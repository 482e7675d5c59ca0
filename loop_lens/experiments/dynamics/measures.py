"""All measurements of a loop's dynamics on one model and its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.dynamics import (
    AttentionSettling,
    AttentionSettlingProbe,
    Convergence,
    ConvergenceProbe,
    Extrapolation,
    FiringSimilarity,
    JacobianSpectrum,
    LimitTable,
    StepGeometry,
    Trajectories,
    extrapolate,
    firing_similarity,
    jacobian_spectrum,
    limit_table,
    step_geometry,
    trajectories,
)
from loop_lens.measuring.processes import shared
from loop_lens.measuring.results import Result
from loop_lens.measuring.run import measure

_FEW = 4  # prompts for what is kept by pairs of firings, drawn, or differentiated


@dataclass(frozen=True)
class Dynamics:
    """What was measured of one model.

    Attributes:
        convergence: M1 to M6 and M9.
        limits: Limiting behaviour of tokens, to the last state, as in the paper.
        settling: Where each head settles.
        local: Contraction, angles, drift.
        pairs: Attention and stream of every two firings (M7, M8), on few prompts.
        spectrum: Of the first, a middle and the last iteration's Jacobian, on the first prompt's first tokens.
        trajectories: The last token's states of few prompts, in principal components.
        extrapolation: What the model answers against the number of iterations.
    """

    convergence: Convergence
    limits: LimitTable
    settling: AttentionSettling
    local: StepGeometry
    pairs: FiringSimilarity
    spectrum: JacobianSpectrum
    trajectories: Trajectories
    extrapolation: Extrapolation

    @property
    def parts(self) -> dict[str, Result]:
        """The results by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def measure_dynamics(
    model: HookedLoopedTransformer,
    prompts: Sequence[Tensor],
    *,
    reference: int,
    trained: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Dynamics:
    """Measure a model at the number of iterations that it is set to.

    Args:
        model: The model.
        prompts: Tokens of each.
        reference: Number of iterations of the reference, at or beyond the model's.
        trained: The number of iterations that the model was made for; the one that it is set to by default.
        batch_size: Prompts a forward.
        progress: Whether to show progress bars.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    moves = ConvergenceProbe(model, reference=reference)
    heads = AttentionSettlingProbe(model, reference=reference)
    measure(model, prompts, [moves, heads], reference=reference, what="convergence", **options)
    few = list(prompts[:_FEW])
    schedule = model.schedule
    iterations = schedule.iterations(schedule.innermost_loop)
    probed = dict.fromkeys((iterations[0], iterations[len(iterations) // 2], iterations[-1]))
    with torch.enable_grad():
        spectrum = jacobian_spectrum(
            model, few[0][:16].unsqueeze(0), iterations=list(probed), steps=20, progress=progress
        )
    every = sorted({r for r in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128) if r < model.recurrences})
    return Dynamics(
        convergence=shared(moves.result()),
        limits=limit_table(model, prompts, **options),
        settling=shared(heads.result()),
        local=step_geometry(model, prompts, **options),
        pairs=firing_similarity(model, few, metrics=("frobenius", "cosine"), progress=progress),
        spectrum=spectrum,
        trajectories=trajectories(model, few, batch_size=batch_size, progress=progress),
        extrapolation=extrapolate(
            model, prompts, recurrences=[*every, model.recurrences], trained=trained, **options
        ),
    )


def summary(found: Dynamics) -> pd.DataFrame:
    """One row per layer of the loop: where it is at the last iteration, and how its tokens behave."""
    last = found.convergence
    limits: Any = found.limits.to_dataframe()
    limits = limits[limits["site"] == "resid_post"].drop_duplicates("layer")
    columns: dict[str, Any] = {"layer": last.layers}
    for metric in (
        "norm",
        "step",
        "relative_step",
        "step_cosine",
        "relative_distance",
        "cosine",
        "pattern_step",
    ):
        columns[metric] = last.mean(metric)[-1].tolist()
    for kind in ("not_fixed", "orbit", "slider", "unknown"):
        columns[f"% {kind.replace('_', ' ')}"] = limits[kind].tolist()
    heads = found.settling.heads()
    columns["heads settled"] = heads.groupby("layer")["settled"].count().tolist()
    return pd.DataFrame(columns)
