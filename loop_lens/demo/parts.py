"""What the demos share: tables with a row an iteration, and one head's attention as a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from loop_lens.bridge.cache import LoopCache
from loop_lens.figures.attention import attention_page


def table_lines(columns: Iterable[str], rows: Iterable[Iterable[str]], *, width: int) -> Iterator[str]:
    """A table as lines of text, its rows numbered by iteration.

    Args:
        columns: Headings.
        rows: Cells [iteration column].
        width: Characters of a column.
    """
    yield "  iteration " + "".join(f"{column:>{width}}" for column in columns)
    for t, row in enumerate(rows):
        yield f"  {t:>9} " + "".join(f"{cell:>{width}}" for cell in row)


def largest(moved: Float[Tensor, "layer head"]) -> tuple[int, int]:
    """Layer and head of the largest number."""
    layer, head = divmod(int(moved.argmax()), moved.shape[1])
    return layer, head


def head_page(
    cache: LoopCache, layer: int, head: int, words: Sequence[str], folder: Path, *, title: str, text: str
) -> Path:
    """Write one head's attention at each iteration as a page that needs no network.

    Args:
        cache: Of one prompt.
        layer: Layer of the loop.
        head: The head.
        words: The prompt's tokens.
        folder: Where the page goes.
        title: Its heading.
        text: What stands below it.
    """
    patterns = cache.over_iterations("pattern", layer=layer)[:, 0, head]
    return attention_page(patterns, words, folder / "attention_by_iteration.html", title=title, text=text)
