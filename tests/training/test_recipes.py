"""Recipes of shipped models, from training to card, on a small one."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

import loop_lens
from loop_lens.data import HopsTask, Task, TextTask
from loop_lens.models.native.config import LoopedConfig
from loop_lens.training import __main__ as command
from loop_lens.training.config import TrainingConfig
from loop_lens.training.recipes import RECIPES, Recipe, build
from loop_lens.training.recipes.card import CARD, CURVES, MEASUREMENTS, SECTIONS
from loop_lens.training.recipes.measure import (
    accuracy_by_iteration,
    continued,
    gate_table,
    held_out,
    measure_chain,
    measure_text,
    relative_steps,
)


def small(task: Task, **fields: object) -> LoopedConfig:
    return LoopedConfig.from_dict(
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "vocab_size": task.vocab_size,
            "recurrences": 3,
            **fields,
        }
    )


def training(seed: int) -> TrainingConfig:
    return TrainingConfig(steps=4, batch_size=4, seed=seed, checkpoint_every=2, log_every=1)


RECIPE = Recipe(
    name="small",
    summary="A small model.",
    intended="Tests.",
    task=HopsTask,
    model=small,
    training=training,
    measure=lambda model, task: measure_chain(model, task, beyond=(7,), most=40, n=8),
)


@pytest.fixture
def model() -> loop_lens.LoopedTransformer:
    torch.manual_seed(0)
    return loop_lens.LoopedTransformer(small(HopsTask())).eval()


def test_a_recipe_gives_a_folder_that_opens(tmp_path: Path) -> None:
    result = build(RECIPE, tmp_path, seed=3, progress=False)
    folder = tmp_path / "model"
    opened = loop_lens.boot(folder)
    ids = held_out(HopsTask(), 2, 4).input_ids
    assert torch.equal(opened(ids), result.model(ids).logits)
    assert opened.to_str_tokens("a b ? a ->") == ["a", "b", "?", "a", "->"]
    card, facts = (folder / CARD).read_text(), json.loads((folder / MEASUREMENTS).read_text())
    assert all(f"## {section}" in card for section in SECTIONS) and "--seed 3" in card
    assert facts["training"]["steps"] == 4 and facts["numbers"]["chance"] == 0.125
    assert (folder / CURVES).read_bytes().startswith(b"\x89PNG")


def test_a_finished_recipe_is_not_trained_again(tmp_path: Path) -> None:
    first = build(RECIPE, tmp_path, progress=False)
    again = build(RECIPE, tmp_path, progress=False)
    assert all(
        torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True)
    )
    assert again.seconds == first.seconds


def test_accuracy_by_iteration_is_that_of_separate_forwards(model: loop_lens.LoopedTransformer) -> None:
    batch = held_out(HopsTask(), 3, 10)
    together = accuracy_by_iteration(model, batch, 4, rows=3)
    for t in range(4):
        model.config.recurrences = t + 1
        named = model(batch.input_ids).logits[:, -3:].argmax(-1)
        assert torch.equal(together[t], (named == batch.labels[:, -3:]).float().mean(0))


def test_relative_steps_by_hand(model: loop_lens.LoopedTransformer) -> None:
    ids = held_out(HopsTask(), 2, 4).input_ids
    states: list[torch.Tensor] = []
    handle = model.model.core[-1].register_forward_hook(lambda module, args, out: states.append(out))
    model.config.recurrences = 5
    model(ids)
    handle.remove()
    expected = [(b - a).norm(dim=-1) / b.norm(dim=-1) for a, b in pairwise(states)]
    assert torch.equal(relative_steps(model, ids, 5), torch.stack(expected).flatten(1).mean(1))


def test_an_exit_gate_is_measured_by_its_probabilities() -> None:
    task = HopsTask()
    model = loop_lens.LoopedTransformer(small(task, exit_gate=True)).eval()
    torch.nn.init.zeros_(model.model.exit_gate.weight)
    torch.nn.init.zeros_(model.model.exit_gate.bias)
    # Half leave at each iteration, the rest at the last of three: 1/2 + 2/4 + 3/4.
    table = gate_table(model, held_out(task, 2, 4))
    assert table["exit iteration"].tolist() == pytest.approx([1.75, 1.75])


def test_a_language_model_is_measured_on_all_test_text() -> None:
    documents = [f"The number {i} comes after {i - 1}, and before {i + 1}." for i in range(1, 200)]
    task = TextTask(documents, vocab_size=300, window=16)
    torch.manual_seed(0)
    model = loop_lens.LoopedTransformer(small(task, initializer_range=0.001)).eval()
    measured = measure_text(model, task, most=4, prompts=("The number",))
    # Next to no logits: the loss is that of 300 equally likely tokens.
    loss = torch.tensor(300.0).log().item()
    assert measured.numbers["loss"] == pytest.approx(loss, abs=0.01)
    per_byte = len(task.tokens["test"]) / task.bytes["test"]
    assert measured.numbers["bits_per_byte"] == pytest.approx(loss / 0.6931 * per_byte, rel=0.01)
    assert list(measured.tables["Loss by iterations"]["iterations"]) == [1, 2, 3, 4]
    assert measured.samples["The number"] == continued(model, task, "The number")


@pytest.mark.parametrize("name", ["hops", "hops-no-injection", "hops-ouro"])
def test_models_of_recipes_learn_from_a_step(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    task = recipe.task()
    model = recipe.untrained(task, 0)
    short = replace(recipe.training(0), steps=2, batch_size=4, cooldown=1, checkpoint_every=None)
    before = [p.detach().clone() for p in model.parameters()]
    loop_lens.training.train(model, task, short, folder=tmp_path, progress=False)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_names_without_a_recipe_are_refused(tmp_path: Path) -> None:
    app = Typer()
    app.command()(command.main)
    result = CliRunner().invoke(app, ["skips", "--folder", str(tmp_path / "nothing")])
    assert result.exit_code == 2 and "hops-ouro" in result.output
    assert not (tmp_path / "nothing").exists()
