"""What a paper says of a group of models, and whether it holds for those that were measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

HOLDS, FAILS, UNTOLD = "holds", "does not hold", "cannot be told at this size"


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
