"""Markdown pages that say what was run, with which versions."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd

from loop_lens.figures.escaping import in_markdown
from loop_lens.measuring.results import Result

_PACKAGES = ("loop-lens", "torch", "transformers", "transformer-lens")


def versions() -> str:
    """The versions that decide the numbers, in one line."""
    found = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def markdown_table(table: pd.DataFrame, digits: int = 3) -> str:
    """A table in markdown, numbers rounded to significant digits."""
    lines = [_row(map(in_markdown, table.columns)), _row("---" for _ in table.columns)]
    lines += [_row(_cell(value, digits) for value in row) for row in table.itertuples(index=False)]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.{digits}g}"
    return "" if value is None or value is pd.NA else in_markdown(value)


def command_line(name: str, **options: Any) -> str:
    """A command as it was given, without the options that are None or empty."""
    given = "".join(
        f" --{key.replace('_', '-')} {value}" for key, value in options.items() if value not in (None, "")
    )
    return f"python -m loop_lens.experiments {name}{given}"


def write_page(out: Path, title: str, command: str, parts: Iterable[str]) -> Path:
    """Write ``out.md``: the title, the command, the versions, then the parts.

    Args:
        out: The folder of the page's figures and tables.
        title: Its heading.
        command: The command that was given.
        parts: Paragraphs, tables and pictures; empty ones are left out.

    Returns:
        The page.
    """
    page = out.with_name(f"{out.name}.md")
    head = (f"# {in_markdown(title)}", f"```bash\n{command}\n```", f"{versions()}.")
    texts = [part.strip("\n") for part in (*head, *parts)]
    page.write_text("\n\n".join(text for text in texts if text) + "\n", encoding="utf-8")
    return page


def picture(out: Path, name: str, alt: str = "", caption: str = "") -> str:
    """A figure of the folder, with a caption below it if there is one."""
    shown = f"![{in_markdown(alt or name)}]({out.name}/{name}.png)"
    return shown + (f"\n\n*{in_markdown(caption)}*" if caption else "")


def notes_of(out: Path) -> str:
    """What somebody wrote into the folder's ``notes.md``, which goes into the page whenever it is made."""
    notes = out / "notes.md"
    return notes.read_text(encoding="utf-8") if notes.exists() else ""


def save_figure(figure: Any, path: Path, *, dpi: int = 90, few_colours: bool = True) -> Path:
    """Write a figure as a small PNG, without a date.

    Args:
        figure: Of matplotlib.
        path: Where to.
        dpi: Pixels an inch.
        few_colours: Whether 128 colours are enough, as for lines; not for thin marks on a heat map.
    """
    from PIL import Image  # comes with matplotlib

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    with Image.open(buffer) as opened:
        image = opened.convert("RGB")
        (image.quantize(128) if few_colours else image).save(path, optimize=True)
    return path


def save_csv(table: pd.DataFrame, path: Path) -> Path:
    """Write a table with five significant digits."""
    table.to_csv(path, index=False, float_format="%.5g")
    return path


def save_tables(results: Mapping[str, Result], out: Path) -> Path:
    """Write every result as parquet (its table) and safetensors (all of it) into ``out/tables``.

    The folder is kept out of git: it can be made again, and is large.
    """
    folder = ignored_folder(out / "tables")
    for name, result in results.items():
        result.to_parquet(folder / f"{name}.parquet")
        result.save(folder / f"{name}.safetensors")
    return folder


def ignored_folder(folder: Path) -> Path:
    """A folder that git leaves out, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    return folder
