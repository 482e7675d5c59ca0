"""The paper's verdicts on models with random weights, each tested by one number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from loop_lens.experiments.random_init import Kind, Measured, kind_of

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
    measure: Callable[[Measured], float]
    measured: str
    side: Side
    threshold: float


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds for the models of one depth.

    Attributes:
        claim: The claim.
        layers: Blocks in the loop.
        values: The number of each seed.
        holds: Whether all are on the claim's side.
    """

    claim: Claim
    layers: int
    values: tuple[float, ...]
    holds: bool

    @property
    def worst(self) -> float:
        """The seed farthest from what is claimed."""
        return min(self.values) if self.claim.side == "above" else max(self.values)

    def __str__(self) -> str:
        sign = ">=" if self.claim.side == "above" else "<"
        seeds = ", ".join(f"{value:.3g}" for value in self.values)
        return (
            f"{'holds' if self.holds else 'does not hold'}: {self.layers} layers, {self.claim.text}: "
            f"{self.claim.measured} {seeds}, wanted {sign} {self.claim.threshold:g}"
        )


_SETTLED = "least cosine of a layer to its state beyond, seed by seed"
_ONE_POINT = "least cosine of layer 0 to any layer's state beyond, seed by seed"
_APART = "angle of layer 0 to the farthest layer over the angle that layers still move, seed by seed"


def _settled(result: Measured) -> float:
    return result.settled


def _one_point(result: Measured) -> float:
    return result.one_point


def _apart(result: Measured) -> float:
    return result.apart


def _settles(name: str, text: str, injection: bool, norm: str, side: Side) -> Claim:
    return Claim(name, text, injection, norm, _settled, _SETTLED, side, 1 - TAU)


CLAIMS: tuple[Claim, ...] = (
    _settles("injection, pre", "injection gives pre-norm a stable fixed point", True, "pre", "above"),
    _settles(
        "injection, Huginn", "injection gives Huginn's norm a stable fixed point", True, "huginn", "above"
    ),
    _settles("injection, Ouro", "injection gives Ouro's norms no stable fixed point", True, "ouro", "below"),
    _settles("none, pre", "without injection, pre-norm is stable", False, "pre", "above"),
    _settles("none, Huginn", "without injection, Huginn's norm is not stable", False, "huginn", "below"),
    _settles("none, Ouro", "without injection, Ouro's norms are not stable", False, "ouro", "below"),
    Claim(
        "none, pre: M9",
        "without injection, all layers of pre-norm end at one point (M9)",
        False,
        "pre",
        _one_point,
        _ONE_POINT,
        "above",
        1 - TAU,
    ),
    Claim(
        "none, pre: one point",
        "without injection, the layers of pre-norm are no farther apart than they still move",
        False,
        "pre",
        _apart,
        _APART,
        "below",
        APART,
    ),
    Claim(
        "injection, pre: apart",
        "with injection, the layers of pre-norm have fixed points of their own",
        True,
        "pre",
        _apart,
        _APART,
        "above",
        APART,
    ),
    Claim(
        "injection, Huginn: apart",
        "with injection, the layers of Huginn's norm have fixed points of their own",
        True,
        "huginn",
        _apart,
        _APART,
        "above",
        APART,
    ),
)
"""The paper's verdicts on random initialisation: on stability, on degeneracy, and what the last one implies."""


def judge(claim: Claim, layers: int, values: Sequence[float]) -> Verdict:
    """Compare a number of each seed with the claim's threshold.

    Raises:
        ValueError: If there is no number.
    """
    if not values:
        raise ValueError(f"no model of {layers} layers was measured to judge {claim.text!r} by")
    above = [value >= claim.threshold for value in values]  # NaN is on neither side
    below = [value < claim.threshold for value in values]
    return Verdict(claim, layers, tuple(values), all(above if claim.side == "above" else below))


def verdicts(results: Iterable[Measured], claims: Sequence[Claim] = CLAIMS) -> list[Verdict]:
    """Every claim at every depth that was measured, by claim."""
    models: dict[Kind, list[Measured]] = {}
    for result in results:
        models.setdefault(kind_of(result), []).append(result)
    depths = sorted({layers for layers, _, _ in models})
    return [
        judge(claim, layers, [claim.measure(each) for each in models[key]])
        for claim in claims
        for layers in depths
        if (key := (layers, claim.injection, claim.norm)) in models
    ]


def verdict_table(found: Iterable[Verdict]) -> pd.DataFrame:
    """One row per verdict."""
    return pd.DataFrame(
        {
            "claim": verdict.claim.text,
            "layers": verdict.layers,
            "verdict": "holds" if verdict.holds else "does not hold",
            "measured": verdict.claim.measured,
            "seeds": " ".join(f"{value:.4f}" for value in verdict.values),
            "worst": verdict.worst,
            "wanted": ">=" if verdict.claim.side == "above" else "<",
            "threshold": verdict.claim.threshold,
        }
        for verdict in found
    )


def tally(variants: Mapping[str, Sequence[Measured]]) -> pd.DataFrame:
    """One row per variant: each claim's number (the worst seed's), with a mark where it does not hold."""
    rows: list[dict[str, str]] = []
    for name, results in variants.items():
        found = verdicts(results)
        row = {"variant": name, "hold": f"{sum(v.holds for v in found)} of {len(found)}"}
        row |= {v.claim.name: f"{v.worst:.3g}{'' if v.holds else ' ✗'}" for v in found}
        rows.append(row)
    return pd.DataFrame(rows)
