"""The page of one model's stages, beside a feed-forward model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from loop_lens.experiments import report
from loop_lens.measuring.results import Result
from loop_lens.stages import Stages, stage_agreement

_SHOWN = {
    "colsum_concentration": "ColSum concentration of attention",
    "sink_rate": "share of heads whose mean attention to the first token is at least 0.3",
    "mixing_score": "entropy of attention per query, in nats",
    "relative_matrix_entropy": "matrix entropy of the stream over the log of the largest rank",
    "anisotropy": "share of the largest squared singular value",
    "norm": "norm of the stream, first token left out",
    "first_norm": "norm of the stream at the first token",
}


def write_stages(
    found: Stages,
    against: Stages | None,
    *,
    out: Path,
    name: str,
    other: str | None,
    about: str,
    command: str,
) -> Path:
    """Write a model's stages into a folder, and the page beside it.

    Args:
        found: A looped model's stages.
        against: A feed-forward model's, on the same prompts.
        out: The folder; the page is ``out.md``. What stands in its ``notes.md`` goes into the page.
        name: The model's name.
        other: The feed-forward model's name.
        about: What ran.
        command: The command that was given.

    Returns:
        The page.
    """
    results: dict[str, Result] = {"stages": found}
    out.mkdir(parents=True, exist_ok=True)
    parts = [about, report.notes_of(out)]
    if against is not None:
        agreement = stage_agreement(found, against)
        results |= {"against": against, "agreement": agreement}
        table = agreement.to_dataframe()
        report.save_csv(table, out / "agreement.csv")
        wide = table.pivot(index="metric", columns="recurrence", values="correlation")
        wide = wide.reset_index().rename(columns={t: f"recurrence {t}" for t in wide.columns})
        report.save_figure(agreement.plot(), out / "agreement.png")
        parts += [
            f"## Against {other}\n\nCorrelation of each recurrence's curve over % of depth with the feed-forward "
            "model's at the same depths.",
            report.markdown_table(wide),
            report.picture(out, "agreement"),
        ]
    report.save_tables(results, out)
    by_recurrence = _by_recurrence(found)
    report.save_csv(by_recurrence, out / "recurrences.csv")
    parts += [
        "## By recurrence\n\nMeans over the blocks of each recurrence.",
        report.markdown_table(by_recurrence),
    ]
    reference: Any = None if against is None else {str(other): against}
    for metric, text in _SHOWN.items():
        if metric not in found.metrics:
            continue
        curves = {metric: (found.plot(metric, "recurrence", against=reference), text)}
        if (
            metric == "relative_matrix_entropy"
        ):  # without the reference, every layer of which would be a line of its own
            by_layer = found.plot(metric, "layer")
            curves[f"{metric}_by_layer"] = by_layer, f"{text}, a line per layer of the loop"
        for label, (figure, caption) in curves.items():
            if metric.endswith("norm"):
                figure.axes[0].set_yscale("log")
            report.save_figure(figure, out / f"{label}.png")
            parts.append(report.picture(out, label, caption=f"{caption[0].upper()}{caption[1:]}."))
    return report.write_page(out, f"Stages of {name}", command, parts)


def _by_recurrence(found: Stages) -> pd.DataFrame:
    table: Any = found.to_dataframe()
    table["part"] = [
        segment if pd.isna(t) else f"recurrence {t}"
        for segment, t in zip(table["segment"], table["recurrence"], strict=True)
    ]
    metrics = [metric for metric in _SHOWN if metric in table]
    return table.groupby("part", sort=False)[metrics].mean().reset_index()
