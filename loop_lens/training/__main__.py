"""``python -m loop_lens.training NAME``: make a shipped model again from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loop_lens.training.recipes import RECIPES, build


def main(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(RECIPES)}.")],
    folder: Annotated[Path | None, typer.Option(help="Where it goes; runs/NAME by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and training.")] = 0,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Train, measure and describe a shipped model; the same folder again resumes a killed run."""
    if name not in RECIPES:
        raise typer.BadParameter(f"there is no recipe {name!r}: choose one of {', '.join(RECIPES)}")
    where = folder or Path("runs") / name
    result = build(RECIPES[name], where, seed=seed, progress=progress)
    typer.echo(f"{where / 'model'}: {result.steps} steps in {result.seconds / 60:.1f} minutes")


if __name__ == "__main__":
    typer.run(main)
