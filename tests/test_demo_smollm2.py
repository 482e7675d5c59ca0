"""The demo on SmolLM2, and the page that it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from loop_lens.demo.smollm2 import main
from loop_lens.figures.attention import attention_page


def test_the_demo_tells_its_story(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    text = result.output
    assert "loop     3 x 10 blocks       firings 10-39" in text
    assert "' Paris'" in text and "' Rome'" in text
    grid = text.split("... at ' France'")[1].split("... at")[0]
    changes = [float(word) for line in grid.splitlines()[2:5] for word in line.split()[1:]]
    assert len(changes) == 30 and max(changes) < -7  # wherever it is patched, the answer turns
    page = (tmp_path / "attention_by_iteration.html").read_text()
    assert all(f"t={t}" in page for t in range(3))
    assert 'src="http' not in page and 'href="http' not in page  # all offline


PATTERNS = torch.ones(2, 3, 3) / 3


@pytest.mark.parametrize(
    ("patterns", "tokens", "names", "says"),
    [
        (PATTERNS, ["a", "b"], None, "need"),
        (PATTERNS[0], ["a", "b", "c"], None, "need"),
        (PATTERNS.log().log(), ["a", "b", "c"], None, "iteration 0 holds NaN"),
        (PATTERNS, ["a", "b", "c"], ["only one"], "1 names for 2"),
    ],
)
def test_pages_that_circuitsvis_would_draw_wrong(
    tmp_path: Path, patterns: torch.Tensor, tokens: list[str], names: list[str] | None, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        attention_page(patterns, tokens, tmp_path / "page.html", names=names)
    assert not list(tmp_path.iterdir())
