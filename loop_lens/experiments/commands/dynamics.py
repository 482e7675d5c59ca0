"""The dynamics of any looped model on any prompts."""

from __future__ import annotations

from typing import Annotated

import typer
from accelerate import PartialState

from loop_lens.experiments import inputs
from loop_lens.experiments.dynamics.measures import measure_dynamics
from loop_lens.experiments.dynamics.page import write_dynamics
from loop_lens.experiments.report import command_line


def main(
    model: inputs.ModelOption,
    out: inputs.OutOption,
    prompts: inputs.PromptsOption = inputs.STDLIB,
    recurrences: inputs.RecurrencesOption = None,
    reference: Annotated[int, typer.Option(help="Iterations of the reference.")] = 128,
    count: inputs.CountOption = 32,
    length: inputs.LengthOption = 64,
    column: inputs.ColumnOption = "text",
    batch_size: inputs.BatchSizeOption = 8,
    progress: inputs.ProgressOption = True,
) -> None:
    """Convergence, limiting behaviour, attention settling, Jacobians, pair maps and extrapolation."""
    state = PartialState()  # under accelerate launch, processes share the prompts
    with inputs.errors_as_usage():
        looped = inputs.open_looped(model)
        trained = looped.recurrences
        if recurrences is not None:
            if recurrences < 6:
                raise ValueError(
                    f"--recurrences {recurrences} is too few: limiting behaviour needs 6 or more"
                )
            looped.set_recurrences(recurrences)
        rows = inputs.prompts_from(looped, prompts, count=count, length=length, column=column)
        found = measure_dynamics(
            looped, rows, reference=reference, trained=trained, batch_size=batch_size, progress=progress
        )
    if not state.is_main_process:
        return
    runs = {"recurrences": looped.recurrences, "reference": reference, "count": count, "length": length}
    command = command_line("dynamics", model=model, prompts=prompts, out=out, **runs)
    about = (
        f"{looped.recurrences} iterations (the model's own number: {trained}), reference {reference}, {len(rows)} "
        f"prompts of up to {length} tokens from {prompts}."
    )
    typer.echo(f"page: {write_dynamics(found, out=out, name=model, about=about, command=command)}")
