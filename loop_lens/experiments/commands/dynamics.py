"""The dynamics of any looped model on any prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from accelerate import PartialState

from loop_lens.experiments.dynamics_page import write_dynamics
from loop_lens.experiments.dynamics_run import measure_dynamics
from loop_lens.experiments.opening import open_looped, prompts_from


def main(
    model: Annotated[str, typer.Option(help="loop-lens/NAME, a hub id, a folder, or smollm2:10-19x3.")],
    out: Annotated[Path, typer.Option(help="Folder of figures and tables; the page is beside it.")],
    prompts: Annotated[
        str,
        typer.Option(help="stdlib, a .txt, .csv, .jsonl or .parquet file, a data set's folder or hub id."),
    ] = "stdlib",
    recurrences: Annotated[int | None, typer.Option(help="Iterations; the model's own by default.")] = None,
    reference: Annotated[int, typer.Option(help="Iterations of the reference.")] = 128,
    count: Annotated[int, typer.Option(help="Prompts, at most.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of each, at most.")] = 64,
    column: Annotated[str, typer.Option(help="Where a table's text is.")] = "text",
    batch_size: Annotated[int, typer.Option(help="Prompts a forward.")] = 8,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
    """Convergence, limiting behaviour, attention settling, Jacobians, pair maps and extrapolation."""
    state = PartialState()  # under accelerate launch, processes share the prompts
    try:
        looped = open_looped(model)
        trained = looped.recurrences
        if recurrences is not None:
            if recurrences < 6:
                raise ValueError(
                    f"--recurrences {recurrences} is too few: limiting behaviour needs 6 or more"
                )
            looped.set_recurrences(recurrences)
        rows = prompts_from(looped, prompts, count=count, length=length, column=column)
        found = measure_dynamics(
            looped, rows, reference=reference, trained=trained, batch_size=batch_size, progress=progress
        )
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None
    if not state.is_main_process:
        return
    given = f"python -m loop_lens.experiments dynamics --model {model} --prompts {prompts} --out {out}"
    given += f" --recurrences {looped.recurrences} --reference {reference} --count {count} --length {length}"
    about = (
        f"{looped.recurrences} iterations (the model's own number: {trained}), reference {reference}, {len(rows)} "
        f"prompts of up to {length} tokens from {prompts}."
    )
    page = write_dynamics(found, out=out, name=model, about=about, command=given)
    typer.echo(f"page: {page}")
