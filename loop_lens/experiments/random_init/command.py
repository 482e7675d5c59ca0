"""Looped models with random weights: which norms settle, with and without injection."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from loop_lens.experiments.inputs import OutOption, ProgressOption, errors_as_usage
from loop_lens.experiments.random_init.figures import figure_6, figure_31, layer_grid
from loop_lens.experiments.random_init.measures import RandomResult, Settings, grid, measure_grid, pooled
from loop_lens.experiments.random_init.models import INITS
from loop_lens.experiments.random_init.verdicts import (
    CLAIMS,
    SeedsVerdict,
    by_depth,
    seeds_table,
    tally,
    verdicts,
)
from loop_lens.experiments.report import command_line, write_report

_NUMBERS = [
    *("injection", "norm", "settled_cosine", "one_point_cosine", "apart"),
    *("percent_fixed_point", "percent_orbit", "percent_slider"),
    *("relative_distance", "matrix_relative_distance", "last_relative_step", "last_norm", "radius"),
]


def main(
    out: OutOption = Path("docs/results/random_init"),
    layers: Annotated[str, typer.Option(help="Depths of the loop, with commas.")] = "4,12,16",
    seeds: Annotated[int, typer.Option(help="Seeds of each model.")] = 3,
    width: Annotated[int, typer.Option(help="d_model.")] = 128,
    init: Annotated[str, typer.Option(help=f"How weights are drawn: {', '.join(INITS)}.")] = "huginn",
    recurrences: Annotated[int, typer.Option(help="Iterations that are measured.")] = 128,
    reference: Annotated[int, typer.Option(help="Iterations of the reference beyond.")] = 160,
    prompts: Annotated[
        str, typer.Option(help="Prompts of random tokens, and tokens of each: 2x32.")
    ] = "2x32",
    variants: Annotated[
        bool, typer.Option(help="Also try other initialisations, widths and float64, at 12 layers.")
    ] = True,
    resume: Annotated[bool, typer.Option(help="Read what an earlier run measured.")] = True,
    quick: Annotated[bool, typer.Option(help="Few loops of small models, to see that it runs.")] = False,
    progress: ProgressOption = True,
) -> None:
    """Re-run the paper's random grid and print each of its verdicts as "holds" or "does not hold"."""
    if quick:
        layers, seeds, width, recurrences, reference, prompts, variants = "2", 1, 32, 12, 16, "1x6", False
        command = f"{command_line('random-init')} --quick"
    else:
        loops = {"layers": layers, "seeds": seeds, "width": width, "init": init}
        runs = {"recurrences": recurrences, "reference": reference, "prompts": prompts}
        command = command_line("random-init", **loops, **runs) + ("" if variants else " --no-variants")
    with errors_as_usage():
        n_prompts, length = _numbers("prompts", prompts, "x", "2x32")
        depths = _numbers("layers", layers, ",", "4,12,16")
        settings = Settings(recurrences, reference, n_prompts, length)
        fields: dict[str, Any] = {"width": width, "init": init}
        models = grid(layers=depths, seeds=seeds, **fields)
        if not models:
            raise ValueError("--seeds must be at least 1")
    where: dict[str, Any] = {"cache": out / "cache", "resume": resume, "progress": progress}
    results = measure_grid(models, settings, **where)
    tried: dict[str, Sequence[RandomResult]] = {}
    if variants:
        tried["as above"] = [result for result in results if result.of.layers == 12]
        changes: dict[str, dict[str, Any]] = {
            f"init {name}": {"init": name} for name in INITS if name != init
        }
        changes |= {f"width {w}": {"width": w} for w in (width // 2, 2 * width)}
        quicker = replace(settings, krylov=0)
        for name, change in (changes | {"float64": {"double": True}}).items():
            tried[name] = measure_grid(grid(layers=[12], seeds=1, **fields | change), quicker, **where)
    for verdict in write_results(results, tried, settings, out=out, command=command):
        typer.echo(str(verdict))
    typer.echo(f"page: {out.with_name(f'{out.name}.md')}")


def _numbers(option: str, text: str, between: str, example: str) -> list[int]:
    if not re.fullmatch(rf"\d+({between}\d+)*", text) or (between == "x" and text.count("x") != 1):
        raise ValueError(f"--{option} {text!r} is not a list of numbers: write e.g. {example}")
    return [int(part) for part in text.split(between)]


def write_results(
    results: Sequence[RandomResult],
    variants: Mapping[str, Sequence[RandomResult]],
    settings: Settings,
    *,
    out: Path,
    command: str,
) -> list[SeedsVerdict]:
    """Write the page ``out.md`` with its figures and tables; the verdicts on the grid.

    ``variants`` are the same claims' models at other settings, by name, one depth each.
    """
    found, models = verdicts(results), pooled(results)
    depths = sorted({n for n, _, _ in models})
    layers = 12 if 12 in depths else depths[-1]
    tables = {
        "models": pd.DataFrame([result.summary() for result in results]),
        "verdicts": seeds_table(found),
        **({"variants": tally(variants)} if variants else {}),
    }
    numbers: Any = pd.DataFrame([result.summary() for (n, _, _), result in models.items() if n == layers])
    spec = results[0].of
    values = {
        **asdict(spec),
        **asdict(settings),
        "depths": ", ".join(map(str, depths)),
        "layers": layers,
        "seeds": len({result.of.seed for result in results}),
        "heads": spec.config(1).num_attention_heads,
        "last": settings.recurrences,
        "inits": {name: init.text for name, init in INITS.items()},
        "hold": sum(verdict.holds for verdict in found),
        "judged": len(found),
        "claims": len(CLAIMS),
        "by_depth": by_depth(found),
        "numbers": numbers[_NUMBERS],
    }
    beyond = f"cosine to iteration {settings.reference}"
    curves: dict[str, dict[str, Any]] = {
        "figure_29": {"curve": "last_distance", "ylabel": "distance to last state", "log": True},
        "figure_30": {"curve": "last_cosine", "ylabel": "cosine to last state"},
        "beyond": {"curve": "cosine", "ylabel": beyond},
        "steps": {"curve": "relative_step", "ylabel": "step / norm", "log": True, "overlay": None},
    }
    figures = {"figure_6": figure_6(models, layers=layers), "figure_31": figure_31(models)}
    for name, look in curves.items():
        figures[name] = layer_grid(models, layers=layers, **{"overlay": look["curve"], **look})
    write_report(
        out, Path(__file__).with_name("page.md"), command, tables=tables, figures=figures, values=values
    )
    return found
