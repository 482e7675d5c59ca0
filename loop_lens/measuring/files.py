"""One kind of file for results and fitted lenses: tensors, and beside them what JSON can say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from loop_lens.models.files import reading, replacing

_TYPE, _VERSION = "loop_lens.result", "1"


def write_file(path: str | Path, kind: str, tensors: Mapping[str, Tensor], plain: dict[str, Any]) -> Path:
    """Write a safetensors file whose metadata name its kind and hold ``plain`` as JSON.

    Args:
        path: Where; folders are made. A file there is replaced once the new one is whole.
        kind: Name of the class that reads it again.
        tensors: Tensors by name.
        plain: Numbers, text, None, and lists and dicts of them. numpy's numbers become Python's own.
    """
    on_cpu = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    about = {_TYPE: kind, "version": _VERSION, "fields": json.dumps(plain, default=_number)}
    about["sha256"] = _digest(about["fields"], on_cpu)
    with replacing(path) as partial:
        save_file(on_cpu, partial, metadata=about)
    return Path(path)


@contextmanager
def read_file(path: str | Path, kind: str) -> Generator[tuple[dict[str, Tensor], dict[str, Any]], None, None]:
    """The tensors and the plain values of a file that `write_file` wrote; what is made of them belongs within.

    Raises:
        UnreadableError: If the file is of another kind or version, or damaged, or nothing can be made of it.
    """
    with reading(path):
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            found = about.get(_TYPE)
            if found != kind:
                raise ValueError(f"it holds {found or 'no loop_lens result'}, not a {kind}")
            version = about.get("version", _VERSION)
            if version != _VERSION:
                raise ValueError(
                    f"it is of version {version} of the format, and this loop_lens reads version {_VERSION}: "
                    "use the loop_lens that wrote it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if "sha256" in about and about["sha256"] != _digest(about["fields"], tensors):
            raise ValueError("its content is not what was written (the checksums differ)")
        yield tensors, json.loads(about["fields"])


def _digest(fields: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(fields.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _number(value: Any) -> Any:
    """What JSON lacks a word for: numbers of numpy and of tensors."""
    if isinstance(value, np.generic | Tensor):
        return value.item()
    raise TypeError(f"a file holds numbers, text and tensors, not a {type(value).__name__}")
