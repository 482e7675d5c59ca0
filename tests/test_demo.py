"""The README's main job: what it prints is what a loop by hand finds, and the page needs no network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import loop_lens
from loop_lens.demo.hops import chain_of, main

PROMPT = "a b g a h e e c b h d g c f f d ? c -> -> -> -> -> ->"


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def rows(text: str) -> list[list[str]]:
    """The answers of a printed table, [iteration][arrow], with their brackets."""
    lines = text.split("arrow 6\n", 1)[1].splitlines()[:8]
    return [line.split()[1:] for line in lines]


@torch.no_grad()
def test_the_demo_tells_its_story(tmp_path: Path) -> None:
    code, text = run("--out", str(tmp_path))
    assert code == 0, text
    assert "loop     8 x 2 blocks        firings 1-16" in text
    lens, once, held = (rows("arrow 6\n" + part) for part in text.split("arrow 6\n")[1:4])

    model = loop_lens.boot("loop-lens/hops")
    tokens = model.to_tokens(PROMPT)
    for t in range(8):
        with model.at_recurrences(t + 1):
            said = model(tokens)[0, -6:].argmax(-1)
        assert [cell.strip("[]") for cell in lens[t]] == [model.to_single_str_token(int(i)) for i in said]

    right = ["f", "d", "g", "a", "b", "h"]
    assert lens[-1] == [f"[{a}]" for a in right]
    for t in range(8):  # a front of one arrow an iteration
        assert all((cell[0] == "[") == (i <= t) for i, cell in enumerate(lens[t]))
    wave = [once[t][t - 1] for t in range(2, 7)]  # patched at arrow 2 after iteration 2
    assert wave == ["<c>", "<f>", "<d>", "<g>", "<a>"]
    assert once[-1] == lens[-1]
    assert held[-1] == ["[f]", "<c>", "<f>", "<d>", "<g>", "<a>"]

    page = (tmp_path / "attention_by_iteration.html").read_text()
    assert all(f"t={t}" in page for t in range(8))
    assert 'src="http' not in page and 'href="http' not in page


def test_the_chain_of_a_prompt() -> None:
    assert chain_of(PROMPT.split()) == ["f", "d", "g", "a", "b", "h"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--prompt", "a b b a a"), "a prompt is pairs"),
        (("--prompt", "a b b ? a ->"), "a prompt is pairs"),
        (("--prompt", "a b b a ? a -> b"), "a prompt is pairs"),
        (("--prompt", "a b b c ? a -> -> ->"), "no pair says what follows 'c'"),
        (("--other", "x"), "no pair says what follows 'x'"),
    ],
)
def test_prompts_of_another_form_are_told(arguments: tuple[str, ...], says: str) -> None:
    code, text = run(*arguments)
    assert code == 2
    assert says in " ".join(text.replace("│", " ").split())
