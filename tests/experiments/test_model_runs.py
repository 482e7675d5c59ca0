"""The commands for any model, on tiny models of the families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import loop_lens
from loop_lens.dynamics import convergence
from loop_lens.experiments.__main__ import build
from loop_lens.experiments.inputs import open_looped, prompts_from
from loop_lens.stages import stages
from tests.conftest import GOLDENS
from tests.interventions.models import wrapped

HUGINN = str(GOLDENS / "huginn")


def said(options: list[str]) -> tuple[int, str]:
    answer = CliRunner().invoke(build(), options)
    return answer.exit_code, " ".join(answer.output.replace("│", " ").split())


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Three prompts of tokens, of several lengths."""
    generator = torch.Generator().manual_seed(1)
    path = tmp_path / "prompts.jsonl"
    rows = [torch.randint(1, 50, (n,), generator=generator).tolist() for n in (6, 9, 7)]
    path.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    return path


def test_dynamics_writes_what_it_measures(tmp_path: Path, prompts: Path) -> None:
    out = tmp_path / "dynamics"
    options = ["--model", HUGINN, "--prompts", str(prompts), "--column", "input_ids", "--out", str(out)]
    options += ["--recurrences", "6", "--reference", "8", "--length", "8", "--no-progress"]
    code, output = said(["dynamics", *options])
    assert code == 0, output
    page = out.with_suffix(".md").read_text()
    assert f"dynamics --model {HUGINN}" in page
    for figure in out.glob("*.png"):
        assert f"({out.name}/{figure.name})" in page
    model = loop_lens.boot(GOLDENS / "huginn", recurrences=6)
    rows = [torch.tensor(json.loads(line)["input_ids"])[:8] for line in prompts.read_text().splitlines()]
    again = convergence(model, rows, reference=8, progress=False)
    table = pd.read_parquet(out / "tables" / "convergence.parquet")
    pd.testing.assert_frame_equal(table, again.to_dataframe(), rtol=1e-6)


def test_stages_sets_a_model_beside_another(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.stages.models import feed_forward

    monkeypatch.setattr("loop_lens.experiments.inputs.open_any", lambda name: feed_forward("llama"))
    out = tmp_path / "stages"
    options = ["--model", HUGINN, "--prompts", str(prompts), "--column", "input_ids", "--out", str(out)]
    code, output = said(["stages", *options, "--recurrences", "3", "--against", "plain", "--no-progress"])
    assert code == 0, output
    page = out.with_suffix(".md").read_text()
    assert "## Against plain" in page
    assert (out / "agreement.png").exists()
    model = loop_lens.boot(GOLDENS / "huginn", recurrences=3)
    rows = [torch.tensor(json.loads(line)["input_ids"]) for line in prompts.read_text().splitlines()]
    table = pd.read_parquet(out / "tables" / "stages.parquet")
    assert table["matrix_entropy"].tolist() == pytest.approx(
        stages(model, rows).mean("matrix_entropy").tolist()
    )


@pytest.mark.parametrize("command", ["dynamics", "stages"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "loop-lens/none"], "ships no such model"),
        (["--model", "smollm2"], "write e.g. smollm2:10-19x3"),
        (["--model", HUGINN, "--prompts", "none.txt"], "there is no file none.txt"),
        (["--model", HUGINN, "--recurrences", "1"], "or more"),
    ],
)
def test_commands_say_what_is_wrong(command: str, options: list[str], words: str, tmp_path: Path) -> None:
    code, output = said([command, "--out", str(tmp_path / "x"), *options])
    assert code == 2
    assert words in output


def test_a_model_that_runs_its_loop_once_is_refused() -> None:
    with pytest.raises(ValueError, match="two iterations or more"):
        open_looped(HUGINN, recurrences=1)


def test_prompts_come_from_files_and_from_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped()
    text = tmp_path / "text.txt"
    text.write_text("w1 w2\nw3\n\n\nw4 w5 w6 w7\n")
    found = prompts_from(model, str(text), length=3)
    assert [model.tokenizer.decode(tokens) for tokens in found] == [
        model.tokenizer.decode(model.to_tokens(t)[0, :3]) for t in ("w1 w2 w3", "w4 w5 w6 w7")
    ]
    table = tmp_path / "table.csv"
    pd.DataFrame({"question": ["w1 w2"], "n": [1]}).to_csv(table)
    assert len(prompts_from(model, str(table), column="question")) == 1
    with pytest.raises(ValueError, match=r"no column 'text': it has .*question"):
        prompts_from(model, str(table))
    documents = [" ".join(f"w{i}" for i in range(n)) for n in (3, 20, 5, 30)]
    monkeypatch.setattr("loop_lens.experiments.inputs.standard_library_documents", lambda: documents)
    assert [len(tokens) for tokens in prompts_from(model, "stdlib", count=3, length=16)] == [16, 16, 4]


def test_no_prompts_is_an_error(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n")
    model: Any = wrapped()
    with pytest.raises(ValueError, match="no prompts"):
        prompts_from(model, str(text))
    with pytest.raises(ValueError, match="too few"):
        prompts_from(model, "stdlib", count=0)
