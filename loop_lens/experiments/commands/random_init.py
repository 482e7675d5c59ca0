"""Looped models with random weights: which norms settle, with and without injection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from loop_lens.experiments.random_init import Measured, Settings, grid, run_grid
from loop_lens.experiments.random_models import INITS
from loop_lens.experiments.random_page import write_results


def main(
    out: Annotated[Path, typer.Option(help="Folder of figures and tables; the page is beside it.")] = Path(
        "docs/results/random_init"
    ),
    layers: Annotated[str, typer.Option(help="Depths of the loop.")] = "4,12,16",
    seeds: Annotated[int, typer.Option(help="Seeds of each model.")] = 3,
    width: Annotated[int, typer.Option(help="d_model.")] = 128,
    init: Annotated[str, typer.Option(help=f"How weights are drawn: {', '.join(INITS)}.")] = "huginn",
    recurrences: Annotated[int, typer.Option(help="Iterations that are measured.")] = 128,
    reference: Annotated[int, typer.Option(help="Iterations of the reference beyond.")] = 160,
    prompts: Annotated[int, typer.Option(help="Prompts of random tokens.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 32,
    variants: Annotated[
        bool, typer.Option(help="Also try other initialisations, widths and float64, at 12 layers.")
    ] = True,
    resume: Annotated[bool, typer.Option(help="Read what an earlier run measured.")] = True,
    quick: Annotated[bool, typer.Option(help="Few loops of small models, to see that it runs.")] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Re-run the paper's random grid and print each of its verdicts as "holds" or "does not hold"."""
    given = "python -m loop_lens.experiments random-init"
    if quick:
        layers, seeds, width, recurrences, reference, variants = "2", 1, 32, 12, 16, False
        prompts, length = 1, 6
        given += " --quick"
    try:
        depths = [int(text) for text in layers.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--layers {layers!r} is not a list of numbers: write e.g. 4,12,16"
        ) from None
    try:
        settings = Settings(recurrences, reference, prompts, length)
        models = grid(layers=depths, seeds=seeds, width=width, init=init)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not models:
        raise typer.BadParameter("--seeds must be at least 1")
    cache = out / "cache"
    results = run_grid(models, settings, cache=cache, resume=resume, progress=progress)
    tried: dict[str, Sequence[Measured]] = {}
    if variants:
        tried["as above"] = [result for result in results if result.of.layers == 12]
        quicker = replace(settings, krylov=0)
        for name, options in _variants(width, init).items():
            models = grid(layers=[12], seeds=1, **options)  # type: ignore[arg-type]
            tried[name] = run_grid(models, quicker, cache=cache, resume=resume, progress=progress)
    for option, value, default in (
        ("layers", layers, "4,12,16"),
        ("seeds", seeds, 3),
        ("width", width, 128),
        ("init", init, "huginn"),
        ("recurrences", recurrences, 128),
        ("reference", reference, 160),
    ):
        if value != default and not quick:
            given += f" --{option} {value}"
    if not variants and not quick:
        given += " --no-variants"
    for verdict in write_results(results, tried, settings, out=out, command=given):
        typer.echo(str(verdict))
    typer.echo(f"page: {out.with_suffix('.md')}")


def _variants(width: int, init: str) -> dict[str, dict[str, int | str | bool]]:
    """What is changed, one thing at a time."""
    changes: dict[str, dict[str, int | str | bool]] = {
        f"init {name}": {"init": name} for name in INITS if name != init
    }
    changes |= {f"width {w}": {"width": w} for w in (width // 2, 2 * width)}
    changes["float64"] = {"double": True}
    return {name: {"width": width, "init": init, **change} for name, change in changes.items()}
