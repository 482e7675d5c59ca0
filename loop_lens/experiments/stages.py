"""The stages of inference of any looped model, beside a feed-forward one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from accelerate import PartialState

from loop_lens.experiments import inputs, report
from loop_lens.measuring.results import Result
from loop_lens.stages import Stages, stage_agreement, stages

_CAPTIONS = {
    "colsum_concentration": "ColSum concentration of attention",
    "sink_rate": "Share of heads whose mean attention to the first token is at least 0.3",
    "mixing_score": "Entropy of attention per query, in nats",
    "relative_matrix_entropy": "Matrix entropy of the stream over the log of the largest rank",
    "relative_matrix_entropy_by_layer": "Matrix entropy of the stream over the log of the largest rank, a line per "
    "layer of the loop",
    "anisotropy": "Share of the largest squared singular value",
    "norm": "Norm of the stream, first token left out",
    "first_norm": "Norm of the stream at the first token",
}


def main(
    model: inputs.ModelOption,
    out: inputs.OutOption,
    against: Annotated[
        str | None, typer.Option(help="A feed-forward model: smollm2, or what transformer-lens boots.")
    ] = None,
    prompts: inputs.PromptsOption = inputs.STDLIB,
    recurrences: inputs.RecurrencesOption = None,
    count: inputs.CountOption = 32,
    length: inputs.LengthOption = 64,
    column: inputs.ColumnOption = "text",
    batch_size: inputs.BatchSizeOption = 8,
    progress: inputs.ProgressOption = True,
) -> None:
    """Attention sinks, mixing, entropy and norms by recurrence, and how alike the feed-forward model's are."""
    state = PartialState()
    cut: dict[str, Any] = {"count": count, "length": length, "column": column}
    with inputs.errors_as_usage():
        looped = inputs.open_looped(model, recurrences=recurrences)
        rows = inputs.prompts_from(looped, prompts, **cut)
        found = stages(looped, rows, batch_size=batch_size, progress=progress)
        other = None
        if against is not None:
            reference = inputs.open_any(against)
            # The same text: where the tokenizers differ, so do the tokens.
            theirs = inputs.prompts_from(reference, prompts, **cut)
            other = stages(reference, theirs, batch_size=batch_size, progress=progress)
    if not state.is_main_process:
        return
    runs = {"recurrences": looped.recurrences, "count": count, "length": length, "against": against}
    command = report.command_line("stages", model=model, prompts=prompts, out=out, **runs)
    about = {"model": model, "against": against, "iterations": looped.recurrences}
    about |= {"prompts": len(rows), "length": length, "source": prompts}
    typer.echo(f"page: {_write(found, other, out, command, about)}")


def _write(found: Stages, against: Stages | None, out: Path, command: str, about: dict[str, Any]) -> Path:
    results: dict[str, Result] = {"stages": found}
    tables, figures = {"recurrences": _by_recurrence(found)}, dict[str, Any]()
    correlation = None
    if against is not None:
        agreement = stage_agreement(found, against)
        results |= {"against": against, "agreement": agreement}
        tables["agreement"] = agreement.to_dataframe()
        correlation = tables["agreement"].pivot(index="metric", columns="recurrence", values="correlation")
        correlation = correlation.add_prefix("recurrence ").reset_index()
        figures["agreement"] = agreement.plot()
    reference: Any = None if against is None else {about["against"]: against}
    for name in _CAPTIONS:
        metric = name.removesuffix("_by_layer")
        if metric in found.metrics:
            by_layer = (
                name != metric
            )  # without the reference, every layer of which would be a line of its own
            options: Any = {"by": "layer"} if by_layer else {"by": "recurrence", "against": reference}
            figures[name] = found.plot(metric, **options)
            if metric.endswith("norm"):
                figures[name].axes[0].set_yscale("log")
    report.save_results(results, out)
    captions = {name: caption for name, caption in _CAPTIONS.items() if name in figures}
    values = {**about, "correlation": correlation, "captions": captions}
    template = Path(__file__).with_suffix(".md")
    return report.write_report(out, template, command, tables=tables, figures=figures, values=values)[0]


def _by_recurrence(found: Stages) -> pd.DataFrame:
    table: Any = found.to_dataframe()
    outside = table["recurrence"].isna()
    table["part"] = ("recurrence " + table["recurrence"].astype(str)).mask(outside, table["segment"])
    metrics = [metric for metric in _CAPTIONS if metric in table]
    return table.groupby("part", sort=False)[metrics].mean().reset_index()
