"""The dynamics of any looped model on any prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from accelerate import PartialState
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.dynamics import (
    AttentionSettling,
    AttentionSettlingProbe,
    Convergence,
    ConvergenceProbe,
    LimitTable,
    extrapolate,
    firing_similarity,
    jacobian_spectrum,
    limit_table,
    step_geometry,
    trajectories,
)
from loop_lens.experiments import inputs, report
from loop_lens.measuring.processes import shared
from loop_lens.measuring.run import measure

_FEW = 4  # prompts for what is kept by pairs of firings, drawn, or differentiated
_SHOWN = ("norm", "step", "relative_step", "step_cosine", "relative_distance", "cosine", "pattern_step")


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
        options = {"batch_size": batch_size, "progress": progress}
        found = _measured(looped, rows, reference, trained, options)
    if not state.is_main_process:
        return
    report.save_results(found, out)
    runs = {"recurrences": looped.recurrences, "reference": reference, "count": count, "length": length}
    command = report.command_line("dynamics", model=model, prompts=prompts, out=out, **runs)
    answers = found["extrapolation"].to_dataframe()
    left_out = [name for name in answers if name.endswith("_std") or "step" in name]
    tables = {
        "layers": _by_layer(found["convergence"], found["limits"], found["settling"]),
        "extrapolation": answers.drop(columns=left_out),
    }
    values = {
        "model": model,
        "iterations": looped.recurrences,
        "trained": trained,
        "reference": reference,
        "prompts": len(rows),
        "length": length,
        "source": prompts,
        "spectrum": found["spectrum"].to_dataframe().drop(columns="position"),
    }
    template = Path(__file__).with_suffix(".md")
    files = report.write_report(out, template, command, tables=tables, figures=_figures(found), values=values)
    typer.echo(f"page: {files[0]}")


def _measured(
    model: HookedLoopedTransformer,
    prompts: Sequence[Tensor],
    reference: int,
    trained: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Every result by its name, at the number of iterations that the model is set to."""
    moves = ConvergenceProbe(model, reference=reference)
    heads = AttentionSettlingProbe(model, reference=reference)
    measure(model, prompts, [moves, heads], reference=reference, what="convergence", **options)
    few, progress = list(prompts[:_FEW]), options["progress"]
    iterations = model.schedule.iterations(model.schedule.innermost_loop)
    probed = list(dict.fromkeys((iterations[0], iterations[len(iterations) // 2], iterations[-1])))
    every = [r for r in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128) if r < model.recurrences]
    first = few[0][:16].unsqueeze(0)
    with torch.enable_grad():
        spectrum = jacobian_spectrum(model, first, iterations=probed, steps=20, progress=progress)
    return {
        "convergence": shared(moves.result()),
        "limits": limit_table(model, prompts, **options),
        "settling": shared(heads.result()),
        "step_geometry": step_geometry(model, prompts, **options),
        "pairs": firing_similarity(model, few, metrics=("frobenius", "cosine"), progress=progress),
        "spectrum": spectrum,
        "trajectories": trajectories(model, few, **options),
        "extrapolation": extrapolate(
            model, prompts, recurrences=[*every, model.recurrences], trained=trained, **options
        ),
    }


def _by_layer(last: Convergence, limits: LimitTable, settling: AttentionSettling) -> pd.DataFrame:
    """One row per layer of the loop: where it is at the last iteration, and how its tokens behave."""
    kinds: Any = limits.to_dataframe()
    kinds = kinds[kinds["site"] == "resid_post"].drop_duplicates("layer")
    columns: dict[str, Any] = {"layer": last.layers}
    columns |= {metric: last.mean(metric)[-1].tolist() for metric in _SHOWN}
    columns |= {kind: kinds[kind].tolist() for kind in ("not_fixed", "orbit", "slider", "unknown")}
    columns["settled_heads"] = settling.heads().groupby("layer")["settled"].count().tolist()
    return pd.DataFrame(columns)


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    moves, pairs = found["convergence"], found["pairs"]
    settling = found["settling"].plot()
    settling.set_size_inches(7, min(8, settling.get_size_inches()[1]))  # models have many heads
    return {
        **{metric: moves.plot(metric) for metric in ("relative_step", "cosine", "pattern_step")},
        "settling": settling,
        "pairs_attention": pairs.plot("frobenius"),
        "pairs_residual": pairs.plot("cosine"),
        "trajectories": found["trajectories"].plot(),
        "extrapolation": found["extrapolation"].plot(),
    }
