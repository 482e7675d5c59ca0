"""The stages of inference of any looped model, beside a feed-forward one."""

from __future__ import annotations

from typing import Annotated

import typer
from accelerate import PartialState

from loop_lens.experiments import inputs
from loop_lens.experiments.report import command_line
from loop_lens.experiments.stages.page import write_stages
from loop_lens.stages import stages


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
    with inputs.errors_as_usage():
        looped = inputs.open_looped(model, recurrences=recurrences)
        rows = inputs.prompts_from(looped, prompts, count=count, length=length, column=column)
        found = stages(looped, rows, batch_size=batch_size, progress=progress)
        other = None
        if against is not None:
            reference = inputs.open_any(against)
            # The same text: where the tokenizers differ, so do the tokens.
            theirs = inputs.prompts_from(reference, prompts, count=count, length=length, column=column)
            other = stages(reference, theirs, batch_size=batch_size, progress=progress)
    if not state.is_main_process:
        return
    runs = {"recurrences": looped.recurrences, "count": count, "length": length, "against": against}
    command = command_line("stages", model=model, prompts=prompts, out=out, **runs)
    about = f"{looped.recurrences} iterations, {len(rows)} prompts of up to {length} tokens from {prompts}."
    page = write_stages(found, other, out=out, name=model, other=against, about=about, command=command)
    typer.echo(f"page: {page}")
