"""Models and prompts as the command line names them."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.data.text import standard_library_documents
from loop_lens.opening.entry import boot, loopify
from loop_lens.prompts.reader import read_prompts
from loop_lens.shipped.smollm2 import load_smollm2

SMOLLM2 = "smollm2"
STDLIB = "stdlib"
_LOOPED = re.compile(r"smollm2:(\d+)-(\d+)x(\d+)")
_TABLES = {
    ".csv": pd.read_csv,
    ".jsonl": lambda path: pd.read_json(path, lines=True),
    ".parquet": pd.read_parquet,
}

ModelOption = Annotated[str, typer.Option(help="loop-lens/NAME, a hub id, a folder, or smollm2:10-19x3.")]
OutOption = Annotated[Path, typer.Option(help="Folder of figures and tables; the page is beside it.")]
PromptsOption = Annotated[
    str, typer.Option(help="stdlib, a .txt, .csv, .jsonl or .parquet file, a data set's folder or hub id.")
]
RecurrencesOption = Annotated[int | None, typer.Option(help="Iterations; the model's own by default.")]
CountOption = Annotated[int, typer.Option(help="Prompts, at most.")]
LengthOption = Annotated[int, typer.Option(help="Tokens of each, at most.")]
ColumnOption = Annotated[str, typer.Option(help="Where a table's text is.")]
BatchSizeOption = Annotated[int, typer.Option(help="Prompts a forward.")]
ProgressOption = Annotated[bool, typer.Option(help="Show progress bars.")]


@contextmanager
def errors_as_usage() -> Generator[None, None, None]:
    """Errors that a user's input causes become messages of the command line."""
    try:
        yield
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error


def open_looped(name: str, *, recurrences: int | None = None) -> HookedLoopedTransformer:
    """Open what `loop_lens.boot` opens, or ``smollm2:10-19x3``: SmolLM2-135M, layers 10 to 19 run three times."""
    if name.startswith(SMOLLM2):
        parts = _LOOPED.fullmatch(name)
        if parts is None:
            raise ValueError(
                f"{name!r} names no loop: write e.g. smollm2:10-19x3 for layers 10 to 19, three times"
            )
        first, last, times = map(int, parts.groups())
        net, tokenizer = load_smollm2()
        layers, times = range(first, last + 1), recurrences or times
        model = loopify(net, layers=layers, times=times, tokenizer=tokenizer, model_name="SmolLM2-135M")
    else:
        model = boot(name, recurrences=recurrences)
    if model.recurrences < 2:
        raise ValueError(f"{name} runs its loop {model.recurrences} time: ask for two iterations or more")
    return model


def open_any(name: str) -> TransformerBridge:
    """Open a looped model, or a feed-forward one: ``smollm2``, or what transformer-lens can boot."""
    if name == SMOLLM2:
        net, tokenizer = load_smollm2(attn_implementation="eager")
        return build_bridge_from_module(net, type(net).__name__, hf_config=net.config, tokenizer=tokenizer)
    if name.startswith(f"{SMOLLM2}:"):
        return open_looped(name)
    try:
        return boot(name)
    except ValueError:  # no family of loops
        return TransformerBridge.boot_transformers(name)


def prompts_from(
    model: TransformerBridge, source: str, *, count: int = 32, length: int = 64, column: str = "text"
) -> list[Tensor]:
    """At most ``count`` prompts, cut to ``length`` tokens; those of at least that length come first.

    They come from ``stdlib``, the documentation of the running Python; from a text file, whose paragraphs are prompts;
    from the column of a csv, jsonl or parquet file, of a folder that ``datasets`` saved, or of a data set's hub id,
    perhaps with its split, ``NAME:test``.
    """
    if count < 1 or length < 2:
        raise ValueError(f"{count} prompts of {length} tokens are too few: ask for one of two tokens or more")
    long: list[Tensor] = []
    short: list[Tensor] = []
    for tokens in read_prompts(model, _rows(source, column), any_length=True):
        (long if len(tokens) >= length else short).append(tokens[:length])
        if len(long) == count:
            break
    chosen = [tokens for tokens in (long + short)[:count] if len(tokens) > 1]
    if not chosen:
        raise ValueError(f"{source} has no prompts of two tokens or more")
    return chosen


def _rows(source: str, column: str) -> Any:
    if source == STDLIB:
        return standard_library_documents()
    path = Path(source)
    if not path.exists() and path.suffix in {*_TABLES, ".txt", ".md"}:
        raise FileNotFoundError(f"there is no file {source}")
    if path.is_file() and path.suffix not in _TABLES:
        paragraphs = re.split(r"\n\s*\n", path.read_text("utf-8"))
        return [" ".join(text.split()) for text in paragraphs if text.strip()]
    table: Any = _TABLES[path.suffix](path) if path.is_file() else _dataset(source, path)
    if column not in table:
        raise ValueError(f"{source} has no column {column!r}: it has {', '.join(map(str, table))}")
    return list(table[column])


def _dataset(source: str, path: Path) -> dict[str, Any]:
    import datasets  # seconds to import

    if path.is_dir():
        data: Any = datasets.load_from_disk(source)
    else:
        name, _, split = source.partition(":")
        data = datasets.load_dataset(name, split=split or "test")
    return {column: data[column] for column in data.column_names}
