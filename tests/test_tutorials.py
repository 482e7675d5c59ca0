"""Every tutorial runs, and the committed notebook is that source's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

TUTORIALS = Path(__file__).parents[1] / "tutorials"
_spec = importlib.util.spec_from_file_location("build_tutorials", TUTORIALS / "build.py")
assert _spec is not None and _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
sys.modules["build_tutorials"] = build
_spec.loader.exec_module(build)


@pytest.mark.parametrize("source", build.sources(), ids=lambda path: path.stem)
def test_it_runs_and_says_what_the_committed_notebook_says(source: Path) -> None:
    committed = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert [c.source for c in committed.cells] == [c.source for c in jupytext.read(source).cells]
    executed = build.execute(source)

    def printed(notebook: nbformat.NotebookNode) -> list[list[str]]:
        return [
            [word for out in c.get("outputs", []) for word in out.get("text", "").split() if word.isalpha()]
            for c in notebook.cells
        ]

    assert printed(executed) == printed(committed)


def test_there_are_tutorials() -> None:
    assert build.sources()
