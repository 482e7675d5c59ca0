"""One kind of file for results and fitted lenses: tensors, and beside them what JSON can say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_TYPE = "loop_lens.result"


def write_file(path: str | Path, kind: str, tensors: dict[str, Tensor], plain: dict[str, Any]) -> Path:
    """Write a safetensors file whose metadata name its kind and hold ``plain`` as JSON.

    Args:
        path: Where; folders are made.
        kind: Name of the class that reads it again.
        tensors: Tensors by name.
        plain: Numbers, text, None, and lists and dicts of them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(on_cpu, path, metadata={_TYPE: kind, "fields": json.dumps(plain)})
    return path


def read_file(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the plain values of a file that `write_file` wrote.

    Raises:
        ValueError: If the file is of another kind.
    """
    with safe_open(str(path), framework="pt") as file:
        about = file.metadata() or {}
        found = about.get(_TYPE)
        if found != kind:
            raise ValueError(f"{path} holds {found or 'no loop_lens result'}, not a {kind}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return tensors, json.loads(about["fields"])
