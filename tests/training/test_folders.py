"""A training's folder: it goes on with the very same training or is refused, and a refusal changes nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loop_lens
from loop_lens import UnreadableError
from loop_lens.training import CheckpointError, TrainingResult, train
from tests.training.toy import Copying, quick, same_weights, tiny, weights

IDS = torch.tensor([[1, 2, 3]])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(tiny(), Copying(), quick(4), folder=folder, progress=False)
    return folder


def copied(trained: Path, folder: Path) -> Path:
    return shutil.copytree(trained, folder / "run")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("initial_state", "zeros"),
        ("initial_state", "prelude"),
        ("initial_state_std", 0.5),
        ("rms_norm_eps", 1e-5),
        ("embedding_scale", 2.0),
        ("logit_scale", 0.5),
        ("injection", "add"),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 500.0}),
        ("attention_dropout", 0.1),
    ],
)
def test_a_model_that_computes_something_else_is_not_trained_on(
    tmp_path: Path, trained: Path, field: str, value: Any
) -> None:
    model = tiny(**{field: value})
    before = weights(model)
    with pytest.raises(CheckpointError, match=rf"does not fit this model \({field}: .* there, .* now\)"):
        train(model, Copying(), quick(6), folder=copied(trained, tmp_path))
    assert all(torch.equal(before[name], now) for name, now in weights(model).items())


def test_a_state_of_zeros_in_place_of_the_noise_is_another_model(tmp_path: Path, trained: Path) -> None:
    model = tiny()
    model.model.initial_state = "zeros"
    with pytest.raises(CheckpointError, match="starts_from: None there, zeros now"):
        train(model, Copying(), quick(6), folder=copied(trained, tmp_path))


def test_another_number_of_iterations_and_seed_go_on(tmp_path: Path, trained: Path) -> None:
    model = tiny(recurrences=5)
    model.model.initial_state = 7
    assert train(model, Copying(), quick(6), folder=copied(trained, tmp_path), progress=False).steps == 6


@pytest.mark.parametrize("options", [{"mixed_precision": "bf16"}, {"seed": 1}])
def test_a_refusal_leaves_the_model_as_it_was(tmp_path: Path, trained: Path, options: dict[str, Any]) -> None:
    model = tiny(3)
    before, expected = weights(model), model.eval()(IDS).logits
    model.train()
    with pytest.raises(CheckpointError, match="other settings"):
        train(model, Copying(), quick(6, **options), folder=copied(trained, tmp_path))
    assert model.training and all(torch.equal(before[name], now) for name, now in weights(model).items())
    logits = model.eval()(IDS).logits
    assert logits.dtype == torch.float32 and torch.equal(logits, expected)


def bad_json(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def a_list(path: Path) -> None:
    path.write_text("[1]")


def changed(**values: Any) -> Any:
    def change(path: Path) -> None:
        state = json.loads(path.read_text())
        for key, value in values.items():
            if value is missing:
                del state[key]
            else:
                state[key] = value
        path.write_text(json.dumps(state))

    return change


def other_names(path: Path) -> None:
    save_file({f"x.{name}": tensor for name, tensor in load_file(path).items()}, path)


FILES = ("model.safetensors", "optimizer.safetensors", "log.csv", "progress.json")
KEYS = ("version", "sha256", "settings", "done", "curriculum", "pending", "seconds")
DAMAGES = [
    *((name, damage) for name in FILES for damage in (truncated, missing, empty)),
    *((name, flipped) for name in FILES[:3]),
    *((name, other_names) for name in FILES[:2]),
    *(("progress.json", damage) for damage in (bad_json, a_list)),
    *(
        ("progress.json", changed(**{key: value}))
        for key in KEYS
        for value in (missing, "x", [1, 2], {"a": 1})
    ),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(
    tmp_path: Path, trained: Path, name: str, damage: Any
) -> None:
    folder = copied(trained, tmp_path)
    damage(folder / "checkpoint-4" / name)
    model = tiny(3)
    before = weights(model)
    with pytest.raises(CheckpointError, match="resume=False"):
        train(model, Copying(), quick(6), folder=folder, progress=False)
    assert all(torch.equal(before[key], now) for key, now in weights(model).items())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_model_of_a_training_is_named(tmp_path: Path, trained: Path, name: str) -> None:
    folder = copied(trained, tmp_path)
    result = TrainingResult(str(folder), {}, 4, (), 1.0)
    assert torch.equal(result.model(IDS).logits, loop_lens.boot(folder / "model")(IDS))
    truncated(folder / "model" / name)
    with pytest.raises(UnreadableError, match=rf"^cannot read .*{name}"):
        _ = TrainingResult(str(folder), {}, 4, (), 1.0).model


def test_a_full_disk_leaves_the_old_model(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(trained, tmp_path)
    old = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    real = os.fsync

    def full(file: int) -> None:
        if "model/.model" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"No space left.*nothing has to be trained again"):
            train(tiny(), Copying(), quick(6), folder=folder, progress=False)
    assert {path.name: path.read_bytes() for path in (folder / "model").iterdir()} == old
    finished = train(tiny(9), Copying(), quick(6), folder=folder, progress=False)
    assert same_weights(finished.model, train(tiny(), Copying(), quick(6), folder=tmp_path / "b").model)


@pytest.mark.parametrize("state", [5, "zeros"])
def test_the_initial_state_is_saved_with_the_model(tmp_path: Path, state: Any) -> None:
    model = loop_lens.wrap(tiny(), initial_state=state)
    assert not torch.equal(model(IDS), loop_lens.wrap(tiny())(IDS))
    model.save_pretrained(tmp_path / "opened")
    bare = tiny()
    bare.model.initial_state = state
    bare.save_pretrained(tmp_path / "bare")
    for folder in ("opened", "bare"):
        again = loop_lens.boot(tmp_path / folder)
        assert again.initial_state == state and torch.equal(again(IDS), model(IDS))
        assert torch.equal(
            loop_lens.boot(tmp_path / folder, initial_state=0)(IDS), loop_lens.wrap(tiny())(IDS)
        )


def test_a_tensor_as_initial_state_is_said_not_to_be_saved(tmp_path: Path) -> None:
    model = loop_lens.wrap(tiny(), initial_state=torch.zeros(1, 3, 16))
    with pytest.warns(UserWarning, match="not saved"):
        model.save_pretrained(tmp_path)
