"""What the demos share: tables with a row an iteration, and the head that moves most as a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import typer
from jaxtyping import Float
from torch import Tensor

from loop_lens.bridge.cache import LoopCache
from loop_lens.figures.attention import attention_page


def say_table(columns: Iterable[str], rows: Iterable[Iterable[str]], *, width: int) -> None:
    """Write a table of cells [iteration column], its columns so many characters wide."""
    typer.echo("  iteration " + "".join(f"{column:>{width}}" for column in columns))
    for t, row in enumerate(rows):
        typer.echo(f"  {t:>9} " + "".join(f"{cell:>{width}}" for cell in row))


def restless_head(moved: Float[Tensor, "layer head"]) -> tuple[int, int]:
    """Layer and head of the loop whose attention moves most."""
    layer, head = divmod(int(moved.argmax()), moved.shape[1])
    return layer, head


def head_page(
    cache: LoopCache, layer: int, head: int, words: Sequence[str], folder: Path, *, title: str, text: str
) -> Path:
    """Write one head's attention on a prompt at each iteration as a page that needs no network."""
    patterns = cache.over_iterations("pattern", layer=layer)[:, 0, head]
    return attention_page(patterns, words, folder / "attention_by_iteration.html", title=title, text=text)
