"""The stages of inference of any looped model, beside a feed-forward one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from accelerate import PartialState

from loop_lens.experiments.opening import open_any, open_looped, prompts_from
from loop_lens.experiments.stages_page import write_stages
from loop_lens.stages import stages


def main(
    model: Annotated[str, typer.Option(help="loop-lens/NAME, a hub id, a folder, or smollm2:10-19x3.")],
    out: Annotated[Path, typer.Option(help="Folder of figures and tables; the page is beside it.")],
    against: Annotated[
        str | None, typer.Option(help="A feed-forward model: smollm2, or what transformer-lens boots.")
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(help="stdlib, a .txt, .csv, .jsonl or .parquet file, a data set's folder or hub id."),
    ] = "stdlib",
    recurrences: Annotated[int | None, typer.Option(help="Iterations; the model's own by default.")] = None,
    count: Annotated[int, typer.Option(help="Prompts, at most.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of each, at most.")] = 64,
    column: Annotated[str, typer.Option(help="Where a table's text is.")] = "text",
    batch_size: Annotated[int, typer.Option(help="Prompts a forward.")] = 8,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
    """Attention sinks, mixing, entropy and norms by recurrence, and how alike the feed-forward model's are."""
    state = PartialState()
    try:
        looped = open_looped(model, recurrences=recurrences)
        rows = prompts_from(looped, prompts, count=count, length=length, column=column)
        found = stages(looped, rows, batch_size=batch_size, progress=progress)
        other = None
        if against is not None:
            reference = open_any(against)
            # The same text: where the tokenizers differ, so do the tokens.
            theirs = prompts_from(reference, prompts, count=count, length=length, column=column)
            other = stages(reference, theirs, batch_size=batch_size, progress=progress)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None
    if not state.is_main_process:
        return
    given = f"python -m loop_lens.experiments stages --model {model} --prompts {prompts} --out {out}"
    given += f" --recurrences {looped.recurrences} --count {count} --length {length}"
    given += f" --against {against}" if against else ""
    about = f"{looped.recurrences} iterations, {len(rows)} prompts of up to {length} tokens from {prompts}."
    page = write_stages(found, other, out=out, name=model, other=against, about=about, command=given)
    typer.echo(f"page: {page}")
