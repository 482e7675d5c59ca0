"""Code that a checkpoint brings along never runs unasked, and nobody is asked in the midst of opening."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import loop_lens
from tests.conftest import GOLDENS
from tests.prompts.models import tokenizer

CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
class Config(PreTrainedConfig):
    model_type = "huginn_raven"
class Model: ...
class Tokenizer(PreTrainedTokenizerFast): ...
"""
SIZES: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 2}
FAMILIES = ("huginn", "ouro", "retrofit_llama", "retrofit_olmo", "hrm_text")


@pytest.fixture
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*args: object) -> str:
        raise AssertionError("somebody was asked a question")

    monkeypatch.setattr(builtins, "input", asked)


def as_published(folder: Path, *, bos: bool = True) -> Path:
    """Put code into a checkpoint folder as the hub has it: for config, model and tokenizer.

    Returns:
        The file that this code makes when it runs.
    """
    mark = folder / "ran"
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    (folder / "code.py").write_text(CODE.format(mark=str(mark)))
    tokenizer().save_pretrained(folder)
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about |= {"auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"add_bos_token": False}))
    return mark


@pytest.mark.usefixtures("nobody_answers")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_folder_opens_without_its_code(tmp_path: Path, family: str) -> None:
    folder = shutil.copytree(GOLDENS / family, tmp_path / family)
    mark = as_published(folder)
    model = loop_lens.boot(folder)
    assert not mark.exists()
    assert model.to_tokens("w6 w7", prepend_bos=True).tolist() == [[2, 6, 7]]


@pytest.mark.usefixtures("nobody_answers")
def test_a_saved_window_opens_without_its_code(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=48, hidden_size=16, intermediate_size=16, **SIZES)
    torch.manual_seed(0)
    model = loop_lens.loopify(LlamaForCausalLM(config), layers=[1], times=2, tokenizer=tokenizer())
    model.save_pretrained(tmp_path)
    mark = as_published(tmp_path)
    assert torch.equal(loop_lens.boot(tmp_path)("w6 w7"), model("w6 w7")) and not mark.exists()


@pytest.mark.usefixtures("nobody_answers")
def test_an_unknown_family_is_refused_not_run(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDENS / "ouro", tmp_path / "unknown")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "unheard_of"}
    (folder / "config.json").write_text(json.dumps(config))
    mark = as_published(folder)
    with pytest.raises(loop_lens.UnknownFamilyError, match="trust_remote_code=True"):
        loop_lens.boot(folder)
    assert not mark.exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_code_is_fetched_from_the_hub_only_where_it_is_trusted(
    monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **kwargs: Any) -> str:
        asked.update(kwargs)
        return str(GOLDENS / "ouro")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loop_lens.boot("somebody/ouro", trust_remote_code=trusted)
    assert ("*.py" in asked["allow_patterns"]) == trusted


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/hostname", "sub/part.safetensors", "link.safetensors", "..", ""]
)
def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(GOLDENS / "ouro", tmp_path / "ouro")
    weights = folder / "model.safetensors"
    shutil.copy(weights, tmp_path / "secret.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(weights, folder / "sub" / "part.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    weights.unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(loop_lens.UnreadableError, match=r"cannot read .*index\.json: weight_map names"):
        loop_lens.boot(folder)


def test_a_sharded_checkpoint_of_the_hubs_store_opens(tmp_path: Path) -> None:
    """A snapshot there is a folder of links into ``blobs``."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shutil.copy(GOLDENS / "ouro" / "model.safetensors", blobs / "f00d")
    (snapshot / "part.safetensors").symlink_to("../../blobs/f00d")
    shutil.copy(GOLDENS / "ouro" / "config.json", snapshot)
    (snapshot / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "part.safetensors"}})
    )
    ids = torch.arange(5)[None]
    assert torch.equal(loop_lens.boot(snapshot)(ids), loop_lens.boot(GOLDENS / "ouro")(ids))
