"""What a paper says of a group of models, and whether it holds for those that were measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

HOLDS, FAILS, UNTOLD = "holds", "does not hold", "cannot be told at this size"


@dataclass(frozen=True)
class Verdict:
    """What became of one claim.

    Attributes:
        claim: The claim.
        where: The models that it was tested on.
        verdict: ``"holds"``, ``"does not hold"`` or ``"cannot be told at this size"``.
        numbers: What was measured.
    """

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


def decide_strictly(agree: Sequence[bool]) -> str:
    """A claim holds if all models agree, and does not otherwise."""
    return HOLDS if all(agree) else FAILS


def verdict_table(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """One row per verdict: claim, where, verdict, numbers."""
    return pd.DataFrame([vars(verdict) for verdict in verdicts])


def span(values: Iterable[float]) -> str:
    """The least and the largest of some values, NaN left out, as text: ``"0.5 to 0.9"``."""
    known = [float(value) for value in values if not math.isnan(value)]
    if not known:
        return "none"
    low, high = f"{min(known):.3g}", f"{max(known):.3g}"
    return low if low == high else f"{low} to {high}"
