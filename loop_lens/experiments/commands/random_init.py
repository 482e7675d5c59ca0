"""Looped models with random weights: which norms settle, with and without injection."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from loop_lens.experiments.inputs import OutOption, ProgressOption, errors_as_usage
from loop_lens.experiments.random_init.measures import RandomResult, Settings, grid, measure_grid
from loop_lens.experiments.random_init.models import INITS
from loop_lens.experiments.random_init.page import write_results
from loop_lens.experiments.report import command_line


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
        shape: dict[str, Any] = {"width": width, "init": init}
        models = grid(layers=depths, seeds=seeds, **shape)
        if not models:
            raise ValueError("--seeds must be at least 1")
    where: dict[str, Any] = {"cache": out / "cache", "resume": resume, "progress": progress}
    results = measure_grid(models, settings, **where)
    tried: dict[str, Sequence[RandomResult]] = {}
    if variants:
        tried["as above"] = [result for result in results if result.of.layers == 12]
        quicker = replace(settings, krylov=0)
        for name, change in _variants(width, init).items():
            tried[name] = measure_grid(grid(layers=[12], seeds=1, **{**shape, **change}), quicker, **where)
    for verdict in write_results(results, tried, settings, out=out, command=command):
        typer.echo(str(verdict))
    typer.echo(f"page: {out.with_name(f'{out.name}.md')}")


def _numbers(option: str, text: str, between: str, example: str) -> list[int]:
    if not re.fullmatch(rf"\d+({between}\d+)*", text) or (between == "x" and text.count("x") != 1):
        raise ValueError(f"--{option} {text!r} is not a list of numbers: write e.g. {example}")
    return [int(part) for part in text.split(between)]


def _variants(width: int, init: str) -> dict[str, dict[str, Any]]:
    """What is changed, one thing at a time."""
    changes: dict[str, dict[str, Any]] = {f"init {name}": {"init": name} for name in INITS if name != init}
    changes |= {f"width {w}": {"width": w} for w in (width // 2, 2 * width)}
    return changes | {"float64": {"double": True}}
