"""Tokens, names and titles are shown as they are: none runs as a script, none is a formula."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from loop_lens.demo.parts import head_page
from loop_lens.experiments import report
from loop_lens.figures import attention_page, draw_heatmap, line_figure
from loop_lens.figures.canvas import new_figure

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</title><script>alert(1)</script>",
    "<!--<script>",
    '"></div><script>alert(1)</script>',
    "\u2028alert(1)//",
    "\\</script>\\u003cscript>",
    "&lt;script&gt;",
    "{title} {{ 7 * 7 }} %s",
    "$\\frac{$",
    "a|b\nc",
    "\ue000",
)
PATTERNS = torch.eye(2).expand(3, 2, 2)


class Elements(HTMLParser):
    """Counts elements, and keeps what scripts and titles hold."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.held: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        last = self.tags[-1] if self.tags else ""
        self.held[last] = self.held.get(last, "") + data


def elements(page: str) -> Elements:
    parser = Elements()
    parser.feed(page)
    parser.close()
    return parser


def by_attention_page(text: str, folder: Path) -> Path:
    return attention_page(
        PATTERNS, [text, text], folder / "page.html", title=text, text=text, names=[text] * 3
    )


def by_head_page(text: str, folder: Path) -> Path:
    cache: Any = SimpleNamespace(over_iterations=lambda hook, layer: PATTERNS[:, None, None])
    return head_page(cache, 0, 0, [text, text], folder, title=text, text=text)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("write", [by_attention_page, by_head_page])
def test_a_page_shows_text_and_runs_none(tmp_path: Path, write: Any, text: str) -> None:
    page = elements(write(text, tmp_path).read_text("utf-8"))
    assert page.tags == elements(write("word", tmp_path).read_text("utf-8")).tags
    assert page.held["title"].removesuffix("\n") == page.held["h1"] == text
    (props,) = re.findall(r"AttentionHeads,\s+(\{.*\})\s+\)", page.held["script"])
    assert json.loads(props)["tokens"] == [text, text]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_results_page_holds_no_markup_of_a_users(tmp_path: Path, text: str) -> None:
    template = tmp_path / "template.md"
    template.write_text(
        "# {{ title }}\n\n{{ words }}\n\n![{{ text }}]({{ folder }}/name.png)\n\n*{{ text }}.*\n"
    )
    values: dict[str, Any] = {"words": pd.DataFrame({text: [text]}), "text": text}

    def written(title: str) -> str:
        options: dict[str, Any] = {"tables": {}, "figures": {}, "values": {**values, "title": title}}
        return report.write_report(tmp_path / "page", template, "python -m x", **options)[0].read_text(
            "utf-8"
        )

    page, plain = written(text), written("a title")
    assert not re.search(r"<[a-z/!]", page)
    assert page.splitlines()[0].startswith("# ") and page.splitlines()[1:] == plain.splitlines()[1:]
    cells = [line for line in page.splitlines() if line.startswith("|")]
    assert len(cells) == 3 and all(len(re.findall(r"(?<!\\)\|", line)) == 2 for line in cells)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_figure_shows_text_and_no_formula(tmp_path: Path, text: str) -> None:
    shown = text.replace("\n", "").replace("\u2028", "")  # what no font has is not the question here
    figure, axes = new_figure()
    draw_heatmap(axes, torch.ones(1, 1), rows=[shown], columns=[shown], row_name=shown, column_name=shown)
    lines = line_figure({shown: [1.0]}, ylabel=shown, xlabel=shown, ticks=[shown], level=(1.0, shown))
    figure.savefig(tmp_path / "a.svg")
    lines.savefig(tmp_path / "b.svg")
