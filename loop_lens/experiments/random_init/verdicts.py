"""The paper's verdicts on models with random weights, each tested by one number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from loop_lens.experiments.claims import CLAIMS, FAILS, HOLDS, Claim, Verdict
from loop_lens.experiments.random_init.measures import RandomResult, by_kind

_MEASURED = {
    "settled": "least cosine of a layer to its state beyond, seed by seed",
    "one_point": "least cosine of layer 0 to any layer's state beyond, seed by seed",
    "apart": "angle of layer 0 to the farthest layer over the angle that layers still move, seed by seed",
}


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
    """Compare a number of each seed with the claim's threshold."""
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
