"""Markdown pages that say what was run, with which versions, beside a folder of their tables and figures."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

import loop_lens
from loop_lens.figures.markdown import filled_in
from loop_lens.measuring.results import Result


def write_report(
    out: Path,
    template: Path,
    command: str,
    *,
    tables: Mapping[str, pd.DataFrame],
    figures: Mapping[str, Any],
    values: Mapping[str, Any],
) -> list[Path]:
    """Write csv files and figures into the folder ``out``, and beside it ``out.md``; these files, the page first.

    The page's template shows its ``values``, every table by name, the ``folder``'s name, and as ``notes`` what somebody
    wrote into the folder's ``notes.md``. Its first line is the heading.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{name}.csv" for name in tables] + [out / f"{name}.png" for name in figures]
    for table, path in zip(tables.values(), files, strict=False):
        table.to_csv(path, index=False, float_format="%.5g")
    for figure, path in zip(figures.values(), files[len(tables) :], strict=True):
        _save_figure(figure, path)
    notes = out / "notes.md"
    known = {"folder": out.name, "notes": Markup(notes.read_text("utf-8") if notes.exists() else "")}
    title, text = filled_in(template, {**known, **tables, **values}).split("\n", 1)
    page = out.with_name(f"{out.name}.md")
    page.write_text(f"{title}\n\n```bash\n{command}\n```\n\n{versions()}.\n{text}", encoding="utf-8")
    return [page, *files]


def versions() -> str:
    """The versions that decide the numbers, in one line."""
    packages = {name: version(name) for name in ("torch", "transformers", "transformer-lens")}
    known = {"Python": platform.python_version(), "loop-lens": loop_lens.__version__, **packages}
    return ", ".join(f"{name} {number}" for name, number in known.items())


def command_line(name: str, **options: Any) -> str:
    """A command as it was given, without the options that are None or empty."""
    given = (
        f" --{key.replace('_', '-')} {value}" for key, value in options.items() if value not in (None, "")
    )
    return f"python -m loop_lens.experiments {name}{''.join(given)}"


def _save_figure(figure: Any, path: Path) -> None:
    """Write a figure as a small PNG without a date: lines get by with 128 colours, thin marks on heat maps do not."""
    from PIL import Image  # comes with matplotlib

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    with Image.open(buffer) as opened:
        image = opened.convert("RGB")
    heat_map = any(axes.images for axes in figure.axes)
    (image if heat_map else image.quantize(128)).save(path, optimize=True)


def save_results(results: Mapping[str, Result], out: Path) -> None:
    """Write every result as parquet (its table) and safetensors (all of it) into ``out/tables``, left out of git."""
    folder = ignored_folder(out / "tables")
    for name, result in results.items():
        result.to_parquet(folder / f"{name}.parquet")
        result.save(folder / f"{name}.safetensors")


def ignored_folder(folder: Path) -> Path:
    """A folder that git leaves out, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    return folder
