"""Whether what the paper says of small models holds for those of the ablation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise, product
from typing import Any

import numpy as np
import pandas as pd

from loop_lens.experiments.ablation.cells import Cell
from loop_lens.experiments.ablation.measures import CellResult
from loop_lens.experiments.claims import CLAIMS, FAILS, HOLDS, UNTOLD, Verdict, decide, span
from loop_lens.stages import Stages, stage_agreement

FIXED, DIRECTION = "fixed point", "direction only"
GROWS, BACK = 1.05, 0.05
"""Growth of the norm in the second half from which it grows on (seen: 1.8 to 2.1 where it does, below 1.003 where it
does not), and relative distance at which a loop is back (seen: 0.0002 on an orbit of period 2, 1.1 off it)."""
STABLE = 0.95
"""Cosine to the reference from which a loop counts as stable; 1 - tau of the paper's Algorithm 1. An orbit of period 2
whose steps are 0.47 of its norm has 0.89."""
LEARNT = {"text": 0.05, "addition": 0.3, "composition": 0.3}
"""Accuracy from which a model has learnt anything: naming one token everywhere gives 0.03 on text and 0.2 on addition
with 5 symbols, and two models of text did just that."""
LOST = 0.02
"""Accuracy that may be lost: two standard errors of an accuracy of 0.8 on the 1920 places of the synthetic test set."""
APART, ALIKE = 0.1, 0.9
"""Nats of attention entropy from which layers differ (seen: below 0.007 before training, 0.15 to 0.69 after it, 0.45 in
a feed-forward reference), and correlation from which recurrences are alike (seen: up to 0.82 before training, 0.89 to
0.995 after it)."""
ON_TEXT = "text, pre-norm"
MIXING = ("colsum_concentration", "mixing_score", "sink_rate")

Results = Mapping[Cell, CellResult]


def kind_of(row: Mapping[str, Any]) -> str:
    """Where a loop ends up, from a `StateResult.summary`.

    ``"fixed point"``, ``"direction only"`` (the norm grows on), ``"drift"`` (it grows on and the direction changes),
    ``"orbit"`` (it comes back to the reference, and leaves it again), ``"none"`` of these, or ``"diverged"``.
    """
    if math.isnan(row["cosine"]):
        return "diverged"
    if row["cosine"] >= STABLE:
        return DIRECTION if row["growth"] > GROWS else FIXED
    if row["growth"] > GROWS:
        return "drift"
    return "orbit" if row["nearest"] <= BACK else "none"


def summaries(results: Results) -> pd.DataFrame:
    """One row per looped model and state: the cell, `StateResult.summary`, and `kind_of` it."""
    rows: list[dict[str, Any]] = []
    for cell, result in results.items():
        about = _about(cell, "task", "norm", "injection", "core", "outer", "seed")
        for state, measured in result.states.items() if cell.looped else ():
            row = {**about, "learnt": _has_learnt(cell, result), "state": state, **measured.summary()}
            rows.append(row | {"kind": kind_of(row)})
    return pd.DataFrame(rows)


def _about(cell: Cell, *fields: str) -> dict[str, Any]:
    return {"cell": cell.name, **{name: getattr(cell, name) for name in fields}}


def _has_learnt(cell: Cell, result: CellResult) -> bool:
    answers = result.answers
    accuracy = answers["accuracy"][answers["recurrences"] == cell.recurrences]
    return float(accuracy[0]) >= LEARNT[cell.task]


def stability(table: pd.DataFrame, state: str) -> list[Verdict]:
    """The claims on fixed points, for the models of `summaries` in a state: those with a prelude and a coda, and after
    training those that learnt their task.
    """
    chosen: Any = table[(table["state"] == state) & (table["outer"] > 0)]
    if state == "trained":
        chosen = chosen[chosen["learnt"]]
    verdicts: list[Verdict] = []
    for claim in CLAIMS:
        if claim.measure == "apart":  # nobody's layers are compared with how far they move here
            continue
        injection = "linear" if claim.injection else "none"
        rows = chosen[(chosen["injection"] == injection) & (chosen["norm"] == claim.norm)]
        numbers = f"degeneracy cosine {span(rows['degeneracy'])}"
        agree = [claim.met(value) for value in rows["degeneracy"]]
        if claim.measure == "settled":
            ends, stable = list(rows["kind"]), (FIXED,) if claim.injection else (FIXED, DIRECTION)
            agree = [(kind in stable) == (claim.side == "above") for kind in ends]
            counted = ", ".join(f"{kind} {ends.count(kind)}" for kind in dict.fromkeys(ends))
            numbers = f"{counted}; cosine {span(rows['cosine'])}, degeneracy {span(rows['degeneracy'])}"
        verdicts.append(Verdict(claim.text, f"{state} models", decide(agree), numbers))
    return verdicts


def layer_spread(found: Stages, metric: str) -> float:
    """How far the loop's layers are apart in a metric, within one recurrence; the mean over recurrences."""
    mean = found.mean(metric)
    return float(np.mean([np.ptp(mean[rows].numpy()) for rows in _by_recurrence(found)]))


def repetition(found: Stages, metric: str = "mixing_score") -> float:
    """Correlation of the heads' profile [layer head] in one recurrence with that in the next; the mean."""
    if found.heads is None:
        raise ValueError("these stages are without attention: measure with patterns=True")
    mean = found.heads.mean(metric)
    profiles = [mean[rows].flatten().numpy() for rows in _by_recurrence(found)]
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairwise(profiles)]))


def _by_recurrence(found: Stages) -> list[list[int]]:
    """The firings of each recurrence, as indices."""
    rows: dict[Any, list[int]] = {}
    for i, (_, t, _, _) in enumerate(found.firings):
        if t is not None:
            rows.setdefault(t, []).append(i)
    return list(rows.values())


def _pre_norm_on_text(results: Results) -> dict[Cell, CellResult]:
    return {
        cell: result
        for cell, result in results.items()
        if cell.looped and cell.task == "text" and cell.norm == "pre"
    }


def self_organisation(results: Results) -> tuple[pd.DataFrame, list[Verdict]]:
    """Whether training sets the layers of the loop apart, the same way in every recurrence.

    The table has a row per pre-norm model of text: spread of its layers in the mixing score (nats) and in the
    concentration, before and after training, and how alike successive recurrences are.
    """
    rows: list[dict[str, Any]] = []
    for cell, result in _pre_norm_on_text(results).items():
        row = _about(cell, "core", "outer", "injection", "seed")
        for metric, (name, state) in product(("mixing_score", "colsum_concentration"), result.states.items()):
            row[f"{metric}_{name}"] = layer_spread(state.stages, metric)
        row |= {f"repetition_{name}": repetition(state.stages) for name, state in result.states.items()}
        rows.append(row)
    table = pd.DataFrame(rows)
    if table.empty:
        return table, []
    apart = [row["mixing_score_trained"] >= APART and row["repetition_trained"] >= ALIKE for row in rows]
    numbers = (
        f"{sum(apart)} of {len(apart)}; layers of one recurrence differ by {span(table['mixing_score_trained'])} nats "
        f"of attention entropy ({span(table['mixing_score_initial'])} before training), successive recurrences "
        f"correlate {span(table['repetition_trained'])} ({span(table['repetition_initial'])} before)"
    )
    most = max(cell.core for cell in results if cell.looped)
    room = f"blocks of at most {most} layers leave no room for several; the paper's have 4, 8 and 12"
    organised = "mixing stages organise themselves: layers differ, and repeat it"
    return table, [
        Verdict(organised, ON_TEXT, decide(apart), numbers),
        Verdict("there are several such stages in a recurrence", ON_TEXT, UNTOLD, room),
    ]


def matches(results: Results, length: int) -> tuple[pd.DataFrame, list[Verdict]]:
    """How near the pre-norm models of text are to each feed-forward reference, by `distance_to` it."""
    references = {cell.seed: result for cell, result in results.items() if not cell.looped}
    table = pd.DataFrame(
        {
            "cell": cell.name,
            "core": cell.core,
            "variant": _variant(cell),
            "seed": cell.seed,
            "reference": seed,
            **distance_to(result.trained.stages, reference.trained.stages, length),
        }
        for cell, result in _pre_norm_on_text(results).items()
        for seed, reference in references.items()
    )
    if table.empty:
        return table, []
    best: list[bool] = []
    parts: list[str] = []
    groups: Any = table.groupby(["core", "seed", "reference"])
    for (core, seed, reference), group in groups:
        if len(group) == 3:
            nearest = group.loc[group["distance"].idxmin(), "variant"]
            best.append(nearest == _PLAIN)
            parts.append(f"core {core}, seed {seed}, reference {reference}: {nearest}")
    numbers = f"nearest in {sum(best)} of {len(best)} comparisons ({'; '.join(parts)})"
    claim = "the best match to feed-forward is with prelude and coda and without injection"
    # Which one is nearest must not depend on the seed or the reference, either way.
    verdict = UNTOLD if not best or 0 < sum(best) < len(best) else HOLDS if best[0] else FAILS
    return table, [Verdict(claim, ON_TEXT, verdict, numbers)]


_PLAIN = "prelude and coda"


def _variant(cell: Cell) -> str:
    if not cell.outer:
        return "no prelude and coda"
    return _PLAIN if cell.injection == "none" else "prelude and coda, injection"


def distance_to(looped: Stages, reference: Stages, length: float) -> dict[str, float]:
    """How far a looped model's recurrences are from a feed-forward model in mixing, on prompts of so many tokens.

    Root mean square differences of their curves over % of depth, mean over recurrences, each from 0 to 1: the
    mixing score is taken over the logarithm of the length, its largest value. ``distance`` is the mean of the three.
    """
    found = stage_agreement(looped, reference, metrics=MIXING)
    parts = dict(zip(MIXING, found.rmse.mean(1).tolist(), strict=True))
    parts["mixing_score"] /= math.log(length)
    return {**parts, "distance": sum(parts.values()) / len(parts)}


def beyond_training(results: Results) -> tuple[pd.DataFrame, list[Verdict]]:
    """Whether what was learnt lasts beyond the trained number of iterations; no claim of the paper.

    The table has loss and accuracy of each looped model at one, the trained number, twice that and the most measured.
    """
    rows: list[dict[str, Any]] = []
    for cell, result in results.items():
        if cell.looped:
            answers: Any = result.to_dataframe().set_index("recurrences")
            row = _about(cell, "injection", "norm") | {"learnt": _has_learnt(cell, result)}
            r = cell.recurrences
            for name, n in {"one": 1, "trained": r, "twice": 2 * r, "most": answers.index.max()}.items():
                row |= {f"loss_{name}": answers["loss"][n], f"accuracy_{name}": answers["accuracy"][n]}
            rows.append(row | {"best": int(answers["loss"].idxmin())})
    table = pd.DataFrame(rows)
    verdicts: list[Verdict] = []
    for (name, text), injection in product((("twice", "twice"), ("most", "eight times")), ("linear", "none")):
        some: Any = table[(table["injection"] == injection) & table["learnt"]]
        lost = some["accuracy_trained"] - some[f"accuracy_{name}"]
        kept = [bool(value <= LOST) for value in lost]
        where = f"trained models {'with' if injection == 'linear' else 'without'} injection"
        numbers = f"{sum(kept)} of {len(kept)}; accuracy lost {span(lost)}"
        claim = f"accuracy lasts at {text} the trained iterations"
        verdicts.append(Verdict(claim, where, decide(kept), numbers))
    return table, verdicts
