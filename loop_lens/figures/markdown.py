"""Markdown: tables, and templates that are filled in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from loop_lens.figures.escaping import in_markdown


def markdown_table(table: pd.DataFrame, digits: int = 3) -> str:
    """A table in Markdown, its numbers rounded to significant digits; what is missing is left empty."""
    rows = [[_cell(value, digits) for value in row] for row in table.itertuples(index=False)]
    return "\n".join(map(_line, [map(in_markdown, table.columns), ["---"] * len(table.columns), *rows]))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.{digits}g}"
    return "" if value is None or value is pd.NA else in_markdown(value)


def filled_in(template: Path, values: Mapping[str, Any], *, digits: int = 3) -> str:
    """A Markdown template of jinja with its values: text, `Markup` as it is, numbers, tables of so many digits."""

    def shown(value: Any) -> Any:
        if isinstance(value, pd.DataFrame):
            return markdown_table(value, digits)
        return in_markdown(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    jinja = Environment(finalize=shown, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = jinja.from_string(template.read_text("utf-8")).render(values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
