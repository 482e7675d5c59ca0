"""The page of one model's stages, beside a feed-forward model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from loop_lens.experiments.page import (
    how_it_was_made,
    markdown_table,
    notes_of,
    save_csv,
    save_figure,
    save_tables,
)
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
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {"stages": found}
    parts = [f"# Stages of {name}", how_it_was_made(command), about, *notes_of(out)]
    if against is not None:
        results["against"] = against
        agreement = stage_agreement(found, against)
        results["agreement"] = agreement
        table = agreement.to_dataframe()
        save_csv(table, out / "agreement.csv")
        wide = table.pivot(index="metric", columns="recurrence", values="correlation")
        wide = wide.reset_index().rename(columns={t: f"recurrence {t}" for t in wide.columns})
        parts += [
            f"## Against {other}\n\nCorrelation of each recurrence's curve over % of depth with the feed-forward "
            "model's at the same depths.",
            markdown_table(wide),
        ]
        save_figure(agreement.plot(), out / "agreement.png")
        parts.append(f"![agreement]({out.name}/agreement.png)")
    save_tables(results, out)
    save_csv(_by_recurrence(found), out / "recurrences.csv")
    parts += [
        "## By recurrence\n\nMeans over the blocks of each recurrence.",
        markdown_table(_by_recurrence(found)),
    ]
    reference: Any = None if against is None else {str(other): against}
    for metric, text in _SHOWN.items():
        if metric not in found.metrics:
            continue
        for by in ("recurrence", "layer") if metric == "relative_matrix_entropy" else ("recurrence",):
            # By layer, every layer of the reference would be a line of its own.
            figure = found.plot(metric, by, against=reference if by == "recurrence" else None)
            if metric.endswith("norm"):
                figure.axes[0].set_yscale("log")
            label = metric if by == "recurrence" else f"{metric}_by_layer"
            save_figure(figure, out / f"{label}.png")
            words = text if by == "recurrence" else f"{text}, a line per layer of the loop"
            parts.append(f"![{label}]({out.name}/{label}.png)\n\n*{words[0].upper()}{words[1:]}.*")
    page = out.with_suffix(".md")
    page.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    return page


def _by_recurrence(found: Stages) -> pd.DataFrame:
    table: Any = found.to_dataframe()
    table["part"] = [
        segment if pd.isna(t) else f"recurrence {t}"
        for segment, t in zip(table["segment"], table["recurrence"], strict=True)
    ]
    metrics = [metric for metric in _SHOWN if metric in table]
    return table.groupby("part", sort=False)[metrics].mean().reset_index()
