"""Weights on disk and in memory: published names, native names, and files that are safe to open."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from loop_lens.families import FAMILIES, NATIVE_TYPE, Family
from loop_lens.families.weights import WeightsError, same, to_native, to_published
from loop_lens.model.config import LoopedConfig
from loop_lens.model.modeling import LoopedTransformer

if TYPE_CHECKING:
    from loop_lens.bridge import HookedLoopedTransformer

_INDEX, _SINGLE, _CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"


class UnsafeCheckpointError(ValueError):
    """A checkpoint that holds pickled weights only."""


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's config.json.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = folder / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {_CONFIG}: it is not a checkpoint folder")
    return json.loads(path.read_text())


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        UnsafeCheckpointError: If its weights are pickled, which would execute code.
        FileNotFoundError: If it has no weights.
    """
    if (folder / _INDEX).is_file():
        shards = json.loads((folder / _INDEX).read_text())["weight_map"].values()
        return [folder / name for name in sorted(set(shards))]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    pickled = [p.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(suffix)]
    if pickled:
        raise UnsafeCheckpointError(
            f"{folder} holds pickled weights only ({pickled[0]}), and opening a pickle executes code: convert "
            "them to safetensors where you trust them, e.g. "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')"
        )
    raise FileNotFoundError(f"{folder} holds no {_SINGLE}")


class Weights(Mapping[str, Tensor]):
    """The tensors of a checkpoint, read from its files when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        for path in weight_files(folder):
            handle = safe_open(path, framework="pt")
            self._files.update(dict.fromkeys(handle.keys(), handle))

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Any:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def family_of(config: LoopedConfig) -> Family | None:
    """The published family that a native model came from."""
    return next((family for family in FAMILIES if family.name == config.family), None)


def build_native(
    config: LoopedConfig, weights: Mapping[str, Tensor], *, dtype: torch.dtype | None, source: str
) -> LoopedTransformer:
    """A native model with weights under its own names or its family's.

    Raises:
        WeightsError: If weights are missing, unknown or misshapen.
    """
    with torch.device("meta"):
        model = LoopedTransformer(config)
    native = model.state_dict()
    family = family_of(config)
    if family is not None and not set(weights) <= set(native):
        entries, ignored = family.entries(config), set(family.derived(config))
    else:
        entries, ignored = [same(name, name) for name in native], set[str]()
    if config.tie_word_embeddings and "lm_head.weight" not in weights:
        entries = [entry for entry in entries if entry.native != ("lm_head.weight",)]
    loaded = to_native(weights, entries, native, ignored=ignored, source=source)
    if dtype is not None:
        loaded = {name: t.to(dtype) if t.is_floating_point() else t for name, t in loaded.items()}
    model.load_state_dict(loaded, strict=False, assign=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # pyright: ignore[reportArgumentType]
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise WeightsError(f"{source} does not hold {name}")
    return model.eval()


def published_state(model: HookedLoopedTransformer, *, keep_vars: bool = False) -> dict[str, Tensor]:
    """A model's weights under the names of its checkpoint."""
    native = model.native_state(keep_vars=keep_vars)
    config: Any = model.original_model.config
    family = family_of(config) if isinstance(config, LoopedConfig) else None
    if family is None:
        return native
    published = {**to_published(native, family.entries(config)), **family.derived(config)}
    return published


def load_state(
    model: HookedLoopedTransformer, state: Mapping[str, Tensor], *, strict: bool, assign: bool
) -> Any:
    """Load weights, under published or native names, into a model at any number of iterations.

    Raises:
        WeightsError: If ``strict`` and the names or shapes do not fit; nothing is loaded then.
    """
    native = model.native_state(keep_vars=True)
    config: Any = model.original_model.config
    family = family_of(config) if isinstance(config, LoopedConfig) else None
    given = dict(state)
    if family is not None and not set(given) <= set(native):
        derived = set(family.derived(config))
        entries = family.entries(config)
        if not strict:
            entries = [entry for entry in entries if entry.published in given]
            known = {entry.published for entry in entries}
            given = {name: tensor for name, tensor in given.items() if name in known}
        given = to_native(given, entries, native, ignored=derived, source="the state dict")
    missing = sorted(set(native) - set(given))
    unexpected = sorted(set(given) - set(native))
    if strict and (missing or unexpected):
        raise WeightsError(
            f"the state dict does not fit: missing {missing[:4]}, unknown {unexpected[:4]}; "
            "model.state_dict() has the names"
        )
    for name, tensor in given.items():
        if name in native and tensor.shape != native[name].shape:
            raise WeightsError(
                f"{name} has shape {tuple(tensor.shape)}, the model wants {tuple(native[name].shape)}"
            )
    raw = model.original_model.state_dict()
    actual = {key.replace("._original_component", ""): key for key in raw}
    fitting = {actual[name]: tensor for name, tensor in given.items() if name in native}
    model.original_model.load_state_dict(fitting, strict=False, assign=assign)
    if assign and getattr(config, "tie_word_embeddings", False):
        _retie(model.original_model)
    return _IncompatibleKeys(missing, unexpected)


def _retie(model: nn.Module) -> None:
    modules = {name.replace("._original_component", ""): m for name, m in model.named_modules()}
    for target, source in getattr(model, "_tied_weights_keys", {}).items():
        to, frm = modules[target.rpartition(".")[0]], modules[source.rpartition(".")[0]]
        to._parameters[target.rpartition(".")[2]] = frm._parameters[source.rpartition(".")[2]]


def save(model: HookedLoopedTransformer, folder: Path) -> None:
    """Write a folder that ``loop_lens.boot`` opens again."""
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = copy.deepcopy(model.original_model.config)
    config.architectures = [type(model.original_model).__name__]
    loop = getattr(model.body, "saved_as", None)
    if loop is not None:
        config.loop_lens = loop
    state = model.native_state()
    unique: dict[int, str] = {}
    for name, tensor in state.items():
        unique.setdefault(tensor.data_ptr(), name)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    kept = {n: t for n, t in state.items() if not tied or unique[t.data_ptr()] == n}
    config.save_pretrained(folder)
    save_file(
        {name: tensor.detach().contiguous().clone() for name, tensor in kept.items()},
        folder / _SINGLE,
        metadata={"format": "pt"},
    )
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


__all__ = [
    "NATIVE_TYPE",
    "UnsafeCheckpointError",
    "Weights",
    "build_native",
    "family_of",
    "load_state",
    "published_state",
    "read_config",
    "save",
    "weight_files",
]
