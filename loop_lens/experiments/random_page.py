"""The page of the experiment on random weights: verdicts first, then numbers, figures and what was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from loop_lens.experiments.page import how_it_was_made, markdown_table, notes_of, save_csv, save_figure
from loop_lens.experiments.random_figures import figure_6, figure_31, layer_grid
from loop_lens.experiments.random_init import Measured, Settings, pooled
from loop_lens.experiments.random_models import INITS
from loop_lens.experiments.verdicts import CLAIMS, Claim, Verdict, tally, verdict_table, verdicts

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
    results: Sequence[Measured],
    variants: Mapping[str, Sequence[Measured]],
    settings: Settings,
    *,
    out: Path,
    command: str,
) -> list[Verdict]:
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
    summary = pd.DataFrame([result.summary() for result in results])
    save_csv(summary, out / "models.csv")
    save_csv(verdict_table(found), out / "verdicts.csv")
    for name, figure in {
        "figure_6": figure_6(models, layers=main),
        "figure_29": layer_grid(
            models,
            "last_distance",
            layers=main,
            overlay="last_distance",
            log=True,
            ylabel="distance to last state",
        ),
        "figure_30": layer_grid(
            models, "last_cosine", layers=main, overlay="last_cosine", ylabel="cosine to last state"
        ),
        "beyond": layer_grid(
            models,
            "cosine",
            layers=main,
            overlay="cosine",
            ylabel=f"cosine to iteration {settings.reference}",
        ),
        "figure_31": figure_31(models),
        "steps": layer_grid(models, "relative_step", layers=main, log=True, ylabel="step / norm"),
    }.items():
        save_figure(figure, out / f"{name}.png")
    table = None
    if variants:
        table = tally(variants)
        save_csv(table, out / "variants.csv")
    page = _page(results, found, table, settings, main=main, out=out, command=command)
    out.with_suffix(".md").write_text(page, encoding="utf-8")
    return found


def _page(
    results: Sequence[Measured],
    found: Sequence[Verdict],
    variants: pd.DataFrame | None,
    settings: Settings,
    *,
    main: int,
    out: Path,
    command: str,
) -> str:
    spec, folder = results[0].of, out.name
    depths = sorted({result.of.layers for result in results})
    seeds = len({result.of.seed for result in results})
    rows: list[dict[str, str]] = []
    for claim in CLAIMS:
        row = {"the paper's verdict": claim.text, "wanted": _wanted(claim)}
        for verdict in found:
            if verdict.claim is claim:
                word = "holds" if verdict.holds else "**does not hold**"
                row[f"{verdict.layers} layers"] = f"{word} ({verdict.worst:.3g})"
        rows.append(row)
    numbers = [
        {
            "injection": "yes" if result.of.injection else "no",
            "norm": result.of.norm,
            **{short: result.summary()[name] for name, short in _NUMBERS.items()},
        }
        for (layers, _, _), result in pooled(results).items()
        if layers == main
    ]
    held = sum(verdict.holds for verdict in found)
    parts = [
        "# Models with random weights",
        how_it_was_made(command),
        _METHOD.format(
            depths=", ".join(map(str, depths)),
            seeds=seeds,
            width=spec.width,
            heads=max(1, spec.width // 32),
            prompts=settings.prompts,
            length=settings.length,
            last=settings.recurrences,
            reference=settings.reference,
            init=INITS[spec.init][0],
        ),
        f"## Verdicts\n\n{held} of {len(found)} hold. The number is the seed's that is farthest from the claim; a "
        "verdict holds if every seed is on the right side of the threshold.\n",
        markdown_table(pd.DataFrame(rows)),
        _READINGS.format(reference=settings.reference, last=settings.recurrences),
        f"## The six models at {main} layers\n\nMeans over seeds; each number is of the layer where it is worst.\n",
        markdown_table(pd.DataFrame(numbers)),
        _NUMBERS_TEXT.format(reference=settings.reference, last=settings.recurrences),
    ]
    if variants is not None:
        parts += [
            f"## What the verdicts depend on\n\nThe same {len(CLAIMS)} claims at 12 layers, one change at a time; "
            "✗ where a claim does not hold.\n",
            markdown_table(variants),
            "Initialisations:\n\n" + "\n".join(f"- *{name}*: {text}." for name, (text, _) in INITS.items()),
        ]
    parts += notes_of(out)
    parts.append("## Figures\n")
    for name, text in _FIGURES.items():
        parts.append(f"![{name}]({folder}/{name}.png)\n\n*{text.format(layers=main, **_at(settings))}*\n")
    parts.append(
        f"Tables: [verdicts]({folder}/verdicts.csv), [every model]({folder}/models.csv)"
        + (f", [variants]({folder}/variants.csv)." if variants is not None else ".")
    )
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _at(settings: Settings) -> dict[str, int]:
    return {"last": settings.recurrences, "reference": settings.reference}


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
