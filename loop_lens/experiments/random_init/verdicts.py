"""The paper's verdicts on models with random weights, each tested by one number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from loop_lens.experiments.claims import FAILS, HOLDS, Verdict
from loop_lens.experiments.random_init.measures import RandomResult, by_kind

_MEASURED = {
    "settled": "least cosine of a layer to its state beyond, seed by seed",
    "one_point": "least cosine of layer 0 to any layer's state beyond, seed by seed",
    "apart": "angle of layer 0 to the farthest layer over the angle that layers still move, seed by seed",
}


@dataclass(frozen=True)
class Claim:
    """What is said about one kind of model: on which side of a threshold a number must lie, for every seed."""

    name: str
    injection: bool
    norm: str
    measure: str  # a property of RandomResult
    side: Literal["above", "below"]
    threshold: float
    text: str

    @property
    def sign(self) -> str:
        """How a number compares with the threshold that meets the claim."""
        return ">=" if self.side == "above" else "<"

    def met(self, value: float) -> bool:
        """Whether a number lies on the claim's side; NaN does not."""
        return value >= self.threshold if self.side == "above" else value < self.threshold


_TABLE: Any = pd.read_csv(Path(__file__).with_name("claims.csv"))
CLAIMS: tuple[Claim, ...] = tuple(Claim(**row) for row in _TABLE.to_dict("records"))
"""The paper's verdicts on random initialisation: on stability, on degeneracy, and what the last one implies.

Their thresholds, measured with Huginn's initialisation, width 128, 4 to 16 layers and three seeds: 0.95 is 1 - tau of
Algorithm 1; cosines to the state at 160 iterations were 0.964 to 1 in models that settle, -0.24 to 0.64 in those that
do not. Layers count as apart from twice the angle that they still move: it was 1.01 times for pre-norm without
injection, 130 to 305 times with it.
"""


@dataclass(frozen=True)
class SeedsVerdict(Verdict):
    """Whether a claim holds for the models of one depth: for every seed, or it does not."""

    of: Claim
    layers: int
    values: tuple[float, ...]  # of each seed

    @property
    def worst(self) -> float:
        """The seed farthest from what is claimed."""
        return min(self.values) if self.of.side == "above" else max(self.values)


def judge(claim: Claim, layers: int, values: Sequence[float]) -> SeedsVerdict:
    """Compare a number of each seed with the claim's threshold.

    Raises:
        ValueError: If there is no number.
    """
    if not values:
        raise ValueError(f"no model of {layers} layers was measured to judge {claim.text!r} by")
    seeds = ", ".join(f"{value:.3g}" for value in values)
    numbers = f"{_MEASURED[claim.measure]} {seeds}, wanted {claim.sign} {claim.threshold:g}"
    verdict = HOLDS if all(map(claim.met, values)) else FAILS
    return SeedsVerdict(claim.text, f"{layers} layers", verdict, numbers, claim, layers, tuple(values))


def verdicts(results: Iterable[RandomResult]) -> list[SeedsVerdict]:
    """Every claim at every depth that was measured, by claim."""
    models = by_kind(results)
    depths = sorted({layers for layers, _, _ in models})
    return [
        judge(claim, layers, [getattr(each, claim.measure) for each in models[key]])
        for claim in CLAIMS
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
            "measured": _MEASURED[verdict.of.measure],
            "seeds": " ".join(f"{value:.4f}" for value in verdict.values),
            "worst": verdict.worst,
            "wanted": verdict.of.sign,
            "threshold": verdict.of.threshold,
        }
        for verdict in found
    )


def by_depth(found: Iterable[SeedsVerdict]) -> pd.DataFrame:
    """One row per claim, a column per depth."""
    rows: dict[str, dict[str, str]] = {}
    for verdict in found:
        of = verdict.of
        wanted = f"{of.sign.replace('>=', '≥')} {of.threshold:g}"
        row = rows.setdefault(of.name, {"the paper's verdict": of.text, "wanted": wanted})
        word = verdict.verdict if verdict.holds else f"**{verdict.verdict}**"
        row[verdict.where] = f"{word} ({verdict.worst:.3g})"
    return pd.DataFrame(list(rows.values()))


def tally(variants: Mapping[str, Sequence[RandomResult]]) -> pd.DataFrame:
    """One row per variant: each claim's number (the worst seed's), with a mark where it does not hold."""
    rows: list[dict[str, str]] = []
    for name, results in variants.items():
        found = verdicts(results)
        row = {"variant": name, "hold": f"{sum(v.holds for v in found)} of {len(found)}"}
        row |= {v.of.name: f"{v.worst:.3g}{'' if v.holds else ' ✗'}" for v in found}
        rows.append(row)
    return pd.DataFrame(rows)
