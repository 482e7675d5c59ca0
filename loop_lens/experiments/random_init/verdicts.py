"""The paper's verdicts on models with random weights, each tested by one number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

import pandas as pd

from loop_lens.experiments.claims import Verdict, decide_strictly
from loop_lens.experiments.random_init.measures import RandomResult, by_kind

TAU = 0.05
"""Algorithm 1's tolerance of a cosine, which the verdicts take over.

With Huginn's initialisation, width 128, 4 to 16 layers and three seeds, cosines to the state at 160 iterations
were 0.964 to 1 in models that settle and -0.24 to 0.64 in those that do not.
"""

APART = 2.0
"""From how many times the angle that layers still move they count as apart.

Measured as above: 1.01 for pre-norm without injection, 130 to 305 for pre-norm with it.
"""

Side = Literal["above", "below"]


@dataclass(frozen=True)
class Claim:
    """What is said about one kind of model.

    Attributes:
        name: A short name.
        text: In words.
        injection: Of the models.
        norm: Of the models.
        measure: One number of a model.
        measured: What the number is.
        side: On which side of the threshold it must lie, for every seed.
        threshold: What it is compared with.
    """

    name: str
    text: str
    injection: bool
    norm: str
    measure: Callable[[RandomResult], float]
    measured: str
    side: Side
    threshold: float

    def met(self, value: float) -> bool:
        """Whether a number lies on the claim's side; NaN does not."""
        return value >= self.threshold if self.side == "above" else value < self.threshold


@dataclass(frozen=True)
class SeedsVerdict(Verdict):
    """Whether a claim holds for the models of one depth: for every seed, or it does not.

    Attributes:
        of: The claim.
        layers: Blocks in the loop.
        values: The number of each seed.
    """

    of: Claim
    layers: int
    values: tuple[float, ...]

    @property
    def worst(self) -> float:
        """The seed farthest from what is claimed."""
        return min(self.values) if self.of.side == "above" else max(self.values)


_SETTLED = "least cosine of a layer to its state beyond, seed by seed"
_ONE_POINT = "least cosine of layer 0 to any layer's state beyond, seed by seed"
_APART = "angle of layer 0 to the farthest layer over the angle that layers still move, seed by seed"


def _settled(name: str, text: str, injection: bool, norm: str, side: Side) -> Claim:
    return Claim(name, text, injection, norm, attrgetter("settled"), _SETTLED, side, 1 - TAU)


def _apart(name: str, text: str, injection: bool, norm: str, side: Side) -> Claim:
    return Claim(name, text, injection, norm, attrgetter("apart"), _APART, side, APART)


CLAIMS: tuple[Claim, ...] = (
    _settled("injection, pre", "injection gives pre-norm a stable fixed point", True, "pre", "above"),
    _settled(
        "injection, Huginn", "injection gives Huginn's norm a stable fixed point", True, "huginn", "above"
    ),
    _settled("injection, Ouro", "injection gives Ouro's norms no stable fixed point", True, "ouro", "below"),
    _settled("none, pre", "without injection, pre-norm is stable", False, "pre", "above"),
    _settled("none, Huginn", "without injection, Huginn's norm is not stable", False, "huginn", "below"),
    _settled("none, Ouro", "without injection, Ouro's norms are not stable", False, "ouro", "below"),
    Claim(
        "none, pre: M9",
        "without injection, all layers of pre-norm end at one point (M9)",
        False,
        "pre",
        attrgetter("one_point"),
        _ONE_POINT,
        "above",
        1 - TAU,
    ),
    _apart(
        "none, pre: one point",
        "without injection, the layers of pre-norm are no farther apart than they still move",
        False,
        "pre",
        "below",
    ),
    _apart(
        "injection, pre: apart",
        "with injection, the layers of pre-norm have fixed points of their own",
        True,
        "pre",
        "above",
    ),
    _apart(
        "injection, Huginn: apart",
        "with injection, the layers of Huginn's norm have fixed points of their own",
        True,
        "huginn",
        "above",
    ),
)
"""The paper's verdicts on random initialisation: on stability, on degeneracy, and what the last one implies."""


def judge(claim: Claim, layers: int, values: Sequence[float]) -> SeedsVerdict:
    """Compare a number of each seed with the claim's threshold.

    Raises:
        ValueError: If there is no number.
    """
    if not values:
        raise ValueError(f"no model of {layers} layers was measured to judge {claim.text!r} by")
    sign = ">=" if claim.side == "above" else "<"
    seeds = ", ".join(f"{value:.3g}" for value in values)
    numbers = f"{claim.measured} {seeds}, wanted {sign} {claim.threshold:g}"
    verdict = decide_strictly([claim.met(value) for value in values])
    return SeedsVerdict(claim.text, f"{layers} layers", verdict, numbers, claim, layers, tuple(values))


def verdicts(results: Iterable[RandomResult], claims: Sequence[Claim] = CLAIMS) -> list[SeedsVerdict]:
    """Every claim at every depth that was measured, by claim."""
    models = by_kind(results)
    depths = sorted({layers for layers, _, _ in models})
    return [
        judge(claim, layers, [claim.measure(each) for each in models[key]])
        for claim in claims
        for layers in depths
        if (key := (layers, claim.injection, claim.norm)) in models
    ]


def seeds_table(found: Iterable[SeedsVerdict]) -> pd.DataFrame:
    """One row per verdict."""
    return pd.DataFrame(
        {
            "claim": verdict.claim,
            "layers": verdict.layers,
            "verdict": verdict.verdict,
            "measured": verdict.of.measured,
            "seeds": " ".join(f"{value:.4f}" for value in verdict.values),
            "worst": verdict.worst,
            "wanted": ">=" if verdict.of.side == "above" else "<",
            "threshold": verdict.of.threshold,
        }
        for verdict in found
    )


def tally(variants: Mapping[str, Sequence[RandomResult]]) -> pd.DataFrame:
    """One row per variant: each claim's number (the worst seed's), with a mark where it does not hold."""
    rows: list[dict[str, str]] = []
    for name, results in variants.items():
        found = verdicts(results)
        row = {"variant": name, "hold": f"{sum(v.holds for v in found)} of {len(found)}"}
        row |= {v.of.name: f"{v.worst:.3g}{'' if v.holds else ' ✗'}" for v in found}
        rows.append(row)
    return pd.DataFrame(rows)
