"""Whatever is wrong with a checkpoint's files is one error that names the file, before memory is taken."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import loop_lens
from loop_lens import UnreadableError
from tests.conftest import GOLDENS
from tests.oracles.twin import small_looped
from tests.prompts.models import tokenizer

Damage = Callable[[Path], None]
KINDS = ("native", "window", "huginn", "ouro", "retrofit_olmo", "hrm_text")
IDS = torch.arange(5)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound checkpoint of each kind, with a tokenizer."""
    made = {}
    for kind in KINDS:
        folder = made[kind] = tmp_path_factory.mktemp(kind)
        if kind == "native":
            loop_lens.wrap(small_looped(), tokenizer=tokenizer()).save_pretrained(folder)
        elif kind == "window":
            gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=48, n_layer=3, n_embd=16, n_head=2, n_positions=32))
            loop_lens.loopify(gpt2, layers=[1], times=2, tokenizer=tokenizer()).save_pretrained(folder)
        else:
            shutil.copytree(GOLDENS / kind, folder, dirs_exist_ok=True)
            tokenizer().save_pretrained(folder)
        (folder / "generation_config.json").write_text("{}")
        loop_lens.boot(folder)
    return made


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def binary(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00\x01" * 20)


def a_list(path: Path) -> None:
    path.write_text("[1, 2]")


def null(path: Path) -> None:
    path.write_text("null")


def nested(path: Path) -> None:
    path.write_text("[" * 100_000)


TEXT_DAMAGES = (cut, empty, binary, a_list, null, nested)
TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
READ_BY_ALL = [(kind, file) for kind in KINDS for file in TEXTS if file != "generation_config.json"]
READ_BY_TRANSFORMERS = [(kind, "generation_config.json") for kind in ("window", "hrm_text")]


@pytest.mark.parametrize("damage", TEXT_DAMAGES)
@pytest.mark.parametrize(("kind", "file"), [*READ_BY_ALL, *READ_BY_TRANSFORMERS])
def test_a_damaged_text_is_named(
    folders: dict[str, Path], tmp_path: Path, kind: str, file: str, damage: Damage
) -> None:
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    damage(folder / file)
    with pytest.raises(UnreadableError, match=rf"^cannot read .*{file}: ."):
        loop_lens.boot(folder)


def sizes(kind: str, folder: Path) -> Iterator[str]:
    """Fields of a config.json that are numbers which shapes follow from, or are counts of blocks."""
    config = json.loads((folder / "config.json").read_text())
    left_out = {"recurrences", "total_ut_steps", "mean_recurrence", "H_cycles", "L_cycles"}
    for name, value in config.items():
        if type(value) is int and name not in left_out and not name.endswith("_id"):
            yield name


def test_every_size_of_a_config_is_checked_before_memory_is_taken(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """A config that asks for 10^12 of anything takes no 500 MB, and is refused where shapes follow from it."""
    tried = 0
    for kind in KINDS:
        for name in sizes(kind, folders[kind]):
            folder = shutil.copytree(folders[kind], tmp_path / f"{kind}-{name}")
            config = json.loads((folder / "config.json").read_text()) | {name: 10**12}
            (folder / "config.json").write_text(json.dumps(config))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                loop_lens.boot(folder)(IDS)  # fields that no shape follows from may be large
            except UnreadableError:
                tried += 1
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, (kind, name)
            shutil.rmtree(folder)
    assert tried > 5 * len(KINDS)


WRONG: tuple[Any, ...] = ("x", None, [], {}, -1, 0, 1.5, [1, "a"], {"a": 1}, True, "gone")


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_values_in_a_config_are_one_error_or_none(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / kind
    folder.mkdir()
    shutil.copy(folders[kind] / "model.safetensors", folder)
    sound = json.loads((folders[kind] / "config.json").read_text())
    drawn = random.Random(0).sample([(name, value) for name in sound for value in WRONG], 30)
    refused = 0
    for name, value in drawn:
        config = {**sound, name: value}
        if value == "gone":
            del config[name]
        (folder / "config.json").write_text(json.dumps(config))
        try:
            loop_lens.boot(folder)
        except (UnreadableError, loop_lens.UnknownFamilyError):
            refused += 1
    assert refused > 3


def shorter_header(path: Path) -> None:
    path.write_bytes((5).to_bytes(8, "little") + path.read_bytes()[8:])


def huge_header(path: Path) -> None:
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def missing_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors[next(n for n in tensors if "lm_head" not in n and "freqs" not in n)]
    save_file(tensors, path, {"format": "pt"})


def unknown_tensor(path: Path) -> None:
    save_file(load_file(path) | {"more": torch.ones(2)}, path, {"format": "pt"})


def cast(dtype: torch.dtype) -> Damage:
    def of_another_dtype(path: Path) -> None:
        tensors = load_file(path)
        first = next(n for n in tensors if "freqs" not in n)
        save_file(tensors | {first: tensors[first].to(dtype)}, path, {"format": "pt"})

    return of_another_dtype


def transposed(path: Path) -> None:
    tensors = load_file(path)
    name = next(n for n, t in tensors.items() if t.ndim == 2 and t.shape[0] != t.shape[1])
    save_file(tensors | {name: tensors[name].t().contiguous()}, path, {"format": "pt"})


WEIGHT_DAMAGES = (
    *(cut, empty, binary, a_list, shorter_header, huge_header, missing_tensor, unknown_tensor, transposed),
    *(cast(torch.int64), cast(torch.bool)),
)


@pytest.mark.parametrize("damage", WEIGHT_DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_weights_are_one_error(
    folders: dict[str, Path], tmp_path: Path, kind: str, damage: Damage
) -> None:
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    damage(folder / "model.safetensors")
    with pytest.raises(UnreadableError):
        loop_lens.boot(folder)


@pytest.mark.parametrize(
    "index",
    ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "gone"}}'],
)
@pytest.mark.parametrize("kind", ["native", "hrm_text"])
def test_a_damaged_index_is_named(folders: dict[str, Path], tmp_path: Path, kind: str, index: str) -> None:
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UnreadableError, match=r"^cannot read .*index\.json: ."):
        loop_lens.boot(folder)


@pytest.mark.parametrize("kind", ["native", "window", "hrm_text"])
@pytest.mark.parametrize("nth", [0, 1, 2, 3])
def test_a_full_disk_leaves_the_old_checkpoint(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, nth: int
) -> None:
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = loop_lens.boot(folder)
    with torch.no_grad():
        next(iter(model.original_model.parameters())).add_(1)
    real, count = os.fsync, [0]

    def full(file: int) -> None:
        count[0] += 1
        if count[0] > nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old


def test_saving_over_a_checkpoint_in_parts_leaves_nothing_of_it(tmp_path: Path) -> None:
    model = loop_lens.wrap(small_looped())
    shutil.copytree(GOLDENS / "ouro", tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(tmp_path / "part.safetensors"), "part.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model.save_pretrained(tmp_path)
    assert torch.allclose(loop_lens.boot(tmp_path)(IDS), model(IDS), atol=1e-4)
