"""The page of the experiment on random weights: verdicts first, then numbers, figures and what was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from loop_lens.experiments import report
from loop_lens.experiments.random_init.figures import figure_6, figure_31, layer_grid
from loop_lens.experiments.random_init.measures import Kind, RandomResult, Settings, pooled
from loop_lens.experiments.random_init.models import INITS
from loop_lens.experiments.random_init.verdicts import (
    CLAIMS,
    Claim,
    SeedsVerdict,
    seeds_table,
    tally,
    verdicts,
)

_NUMBERS = {
    "settled_cosine": "cosine beyond",
    "one_point_cosine": "one point (M9)",
    "apart": "apart",
    "percent_fixed_point": "% fixed points",
    "percent_orbit": "% orbits",
    "percent_slider": "% sliders",
    "relative_distance": "distance / norm",
    "matrix_relative_distance": "same, matrix",
    "last_relative_step": "step / norm",
    "last_norm": "last norm",
    "radius": "radius",
}


def write_results(
    results: Sequence[RandomResult],
    variants: Mapping[str, Sequence[RandomResult]],
    settings: Settings,
    *,
    out: Path,
    command: str,
) -> list[SeedsVerdict]:
    """Write figures and tables into a folder, and the page beside it, under the folder's name.

    Args:
        results: The grid.
        variants: The same claims' models at other settings, by name, one depth each.
        settings: How all were measured.
        out: The folder; the page is ``out.md``. What stands in its ``notes.md`` goes into the page.
        command: The command that was given.

    Returns:
        The verdicts on the grid.
    """
    out.mkdir(parents=True, exist_ok=True)
    found, models = verdicts(results), pooled(results)
    depths = sorted({layers for layers, _, _ in models})
    main = 12 if 12 in depths else depths[-1]
    report.save_csv(pd.DataFrame([result.summary() for result in results]), out / "models.csv")
    report.save_csv(seeds_table(found), out / "verdicts.csv")
    if variants:
        report.save_csv(tally(variants), out / "variants.csv")
    for name, figure in _figures(models, main, settings.reference).items():
        report.save_figure(figure, out / f"{name}.png")
    at = {"last": settings.recurrences, "reference": settings.reference}
    spec, seeds = results[0].of, len({result.of.seed for result in results})
    parts = [
        _METHOD.format(
            depths=", ".join(map(str, depths)),
            seeds=seeds,
            width=spec.width,
            heads=max(1, spec.width // 32),
            prompts=settings.prompts,
            length=settings.length,
            init=INITS[spec.init][0],
            **at,
        ),
        f"## Verdicts\n\n{sum(v.holds for v in found)} of {len(found)} hold. The number is the seed's that is farthest "
        "from the claim; a verdict holds if every seed is on the right side of the threshold.",
        report.markdown_table(_by_depth(found)),
        _READINGS.format(**at),
        f"## The six models at {main} layers\n\nMeans over seeds; each number is of the layer where it is worst.",
        report.markdown_table(_numbers(models, main)),
        _NUMBERS_TEXT.format(**at),
    ]
    if variants:
        parts += [
            f"## What the verdicts depend on\n\nThe same {len(CLAIMS)} claims at 12 layers, one change at a time; "
            "✗ where a claim does not hold.",
            report.markdown_table(tally(variants)),
            "Initialisations:\n\n" + "\n".join(f"- *{name}*: {text}." for name, (text, _) in INITS.items()),
        ]
    parts += [report.notes_of(out), "## Figures"]
    parts += [
        report.picture(out, name, caption=text.format(layers=main, **at)) for name, text in _FIGURES.items()
    ]
    tables = {
        "verdicts": "verdicts",
        "every model": "models",
        **({"variants": "variants"} if variants else {}),
    }
    parts.append(
        "Tables: " + ", ".join(f"[{text}]({out.name}/{name}.csv)" for text, name in tables.items()) + "."
    )
    report.write_page(out, "Models with random weights", command, parts)
    return found


def _figures(models: Mapping[Kind, RandomResult], layers: int, reference: int) -> dict[str, Any]:
    def by_layer(curve: str, ylabel: str, **options: Any) -> Any:
        return layer_grid(models, curve, layers=layers, ylabel=ylabel, **options)

    return {
        "figure_6": figure_6(models, layers=layers),
        "figure_29": by_layer("last_distance", "distance to last state", overlay="last_distance", log=True),
        "figure_30": by_layer("last_cosine", "cosine to last state", overlay="last_cosine"),
        "beyond": by_layer("cosine", f"cosine to iteration {reference}", overlay="cosine"),
        "figure_31": figure_31(models),
        "steps": by_layer("relative_step", "step / norm", log=True),
    }


def _by_depth(found: Sequence[SeedsVerdict]) -> pd.DataFrame:
    """One row per claim, a column per depth."""
    rows: list[dict[str, str]] = []
    for claim in CLAIMS:
        row = {"the paper's verdict": claim.text, "wanted": _wanted(claim)}
        for verdict in found:
            if verdict.of is claim:
                word = verdict.verdict if verdict.holds else f"**{verdict.verdict}**"
                row[verdict.where] = f"{word} ({verdict.worst:.3g})"
        rows.append(row)
    return pd.DataFrame(rows)


def _numbers(models: Mapping[Kind, RandomResult], layers: int) -> pd.DataFrame:
    """One row per model of one depth."""
    rows: list[dict[str, Any]] = []
    for (n, injection, norm), result in models.items():
        if n == layers:
            summary = result.summary()
            named = {"injection": "yes" if injection else "no", "norm": norm}
            rows.append(named | {short: summary[name] for name, short in _NUMBERS.items()})
    return pd.DataFrame(rows)


def _wanted(claim: Claim) -> str:
    return f"{'≥' if claim.side == 'above' else '<'} {claim.threshold:g}"


_METHOD = """
The random part of [arXiv 2604.11791](https://arxiv.org/abs/2604.11791), run again: {depths} layers, looped {last}
times, without prelude and coda; three norms, with and without injection (a linear map of [state; embedding]; then the
loop starts from Gaussian noise, otherwise from the embedding); {seeds} seeds. Width {width}, {heads} heads, MLP four
times as wide, {prompts} prompts of {length} random tokens, the same for all.

The paper does not say how its weights are drawn. These are drawn as in the published model that has injection and this
norm from the start: {init}.

- *pre*: x += A(n x). *Huginn*: x = n'(x + A(n x)), on the stream itself. *Ouro*: x += n'(A(n x)), and the state is
  normed after every iteration.
- The state at the last of {last} iterations is the paper's reference, which every model reaches by construction. The
  verdicts go by the state at {reference} iterations instead.
"""

_READINGS = """
Stable is read as: over the last quarter of {last} iterations, the cosine to the state at {reference} is at least
0.95 (1 - tau of the paper's Algorithm 1) at every layer, in the mean over tokens. One point is read in two ways, over
the same iterations: the least cosine between layer 0 and any layer's state at {reference} (M9) is at least 0.95; and
its angle is less than twice the angle that layers still move until {reference}. Twice or more is read as fixed points
of their own.
"""

_NUMBERS_TEXT = """
*cosine beyond*, *one point*, *apart*: as in the verdicts. *% fixed points, orbits, sliders*: Algorithm 1 on every
token and layer, cosine to the state at {last}. *distance / norm*: to the state at {reference}, per token and over the
whole [pos d_model] matrix. *step / norm*: of the last iteration. *radius*: spectral radius of the last iteration's
Jacobian, over 16 tokens.
"""

_FIGURES = {
    "figure_6": "Figure 6, {layers} layers. Left: cosine of each layer to its own state at iteration {last}, mean and "
    "range over layers (the paper draws a line per layer; figure 30 has them). Right: degeneracy, the least cosine of "
    "layer 0 to any layer's last state.",
    "figure_29": "Figure 29, {layers} layers: distance of each layer to its own last state; dashed, the largest "
    "distance of layer 0 to any layer's last state.",
    "figure_30": "Figure 30, {layers} layers: cosine of each layer to its own last state; dashed, the least cosine of "
    "layer 0 to any layer's last state.",
    "beyond": "The same to the states at {reference} iterations, where nothing is 1 by construction.",
    "figure_31": "In place of figure 31, whose content is not known here: cosine to the last state at every depth.",
    "steps": "Not in the paper: the step of each iteration relative to the norm (M1 over the norm).",
}
