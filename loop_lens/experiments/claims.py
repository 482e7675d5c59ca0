"""What a paper says of a group of models, and whether it holds for those that were measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

HOLDS, FAILS, UNTOLD = "holds", "does not hold", "cannot be told at this size"


@dataclass(frozen=True)
class Claim:
    """What is said about one kind of model: on which side of a threshold a number must lie, for every seed."""

    name: str
    injection: bool
    norm: str
    measure: str  # "settled", "one_point" or "apart"
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
class Verdict:
    """What became of one claim: of which models, `HOLDS`, `FAILS` or `UNTOLD`, and the numbers measured."""

    claim: str
    where: str
    verdict: str
    numbers: str

    @property
    def holds(self) -> bool:
        """Whether the claim holds."""
        return self.verdict == HOLDS

    def __str__(self) -> str:
        return f"{self.verdict}: {self.where}, {self.claim}: {self.numbers}"


def decide(agree: Sequence[bool]) -> str:
    """A claim holds if all models agree, and does not if fewer than half do; between, one seed cannot tell."""
    if not agree:
        return UNTOLD
    if all(agree):
        return HOLDS
    return FAILS if 2 * sum(agree) < len(agree) else UNTOLD


def span(values: Iterable[float]) -> str:
    """The least and the largest of some values, NaN left out, as text: ``"0.5 to 0.9"``."""
    known = [float(value) for value in values if not math.isnan(value)]
    if not known:
        return "none"
    low, high = f"{min(known):.3g}", f"{max(known):.3g}"
    return low if low == high else f"{low} to {high}"
