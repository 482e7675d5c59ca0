"""Weights on disk and in memory: published names, native names, and files that are safe to open."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from loop_lens.models.native.config import LoopedConfig
from loop_lens.models.native.modeling import LoopedTransformer
from loop_lens.models.published.families import family_of
from loop_lens.models.published.weights import WeightsError, same, to_native

if TYPE_CHECKING:
    pass


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
