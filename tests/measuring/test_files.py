"""Every result goes to disk and comes back the same, or is refused with what is wrong with its file."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import pkgutil
import types
import typing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import loop_lens
from loop_lens import UnreadableError
from loop_lens.measuring import Moments
from loop_lens.measuring.results import Result

for found in pkgutil.walk_packages(loop_lens.__path__, "loop_lens."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)


def subclasses(kind: type[Result]) -> set[type[Result]]:
    return {each for direct in kind.__subclasses__() for each in (direct, *subclasses(direct))}


KINDS = sorted(
    (k for k in subclasses(Result) if dataclasses.is_dataclass(k) and k.__module__.startswith("loop_lens.")),
    key=lambda kind: kind.__name__,
)


def sample(kind: Any) -> Any:
    """Some value of a type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and issubclass(kind, Result):
        return kind(**{name: sample(hint) for name, hint in hints(kind).items()})
    if kind is Tensor or hasattr(kind, "array_type"):
        return torch.tensor([[0.5, float("nan")], [-1.0, 2.0]], dtype=torch.float64)
    if origin is tuple:
        return tuple(sample(each) for each in args if each is not ...)
    if origin is dict:
        return {"a key": sample(args[1])}
    if origin is Literal:
        return args[0]
    if origin in (typing.Union, types.UnionType):
        return sample(args[0])
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"):
        made: Any = kind
        return made(**{name: sample(hint) for name, hint in typing.get_type_hints(kind).items()})
    return {int: 3, float: 0.1, str: "wörd </script>", bool: True, type(None): None}.get(kind, 7)


def hints(kind: type[Result]) -> dict[str, Any]:
    resolved = typing.get_type_hints(kind)
    return {each.name: resolved[each.name] for each in dataclasses.fields(kind)}  # type: ignore[arg-type]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(9), b.nan_to_num(9))
    if isinstance(a, Result):
        names = [each.name for each in dataclasses.fields(a)]  # type: ignore[arg-type]
        return type(a) is type(b) and all(equal(getattr(a, n), getattr(b, n)) for n in names)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def parts(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_result_comes_back_the_same(tmp_path: Path, kind: type[Result]) -> None:
    result, path = sample(kind), tmp_path / "result.safetensors"
    result.save(path)
    assert equal(kind.load(path), result)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def of_another_version(path: Path) -> None:
    tensors, about = parts(path)
    save_file(tensors, path, metadata=about | {"version": "2"})


def rewrite(path: Path, fields: str, tensors: dict[str, Tensor] | None = None) -> None:
    """Put other fields into a file, as somebody would who knows of no checksum."""
    held, about = parts(path)
    about = {key: value for key, value in about.items() if key != "sha256"} | {"fields": fields}
    save_file(held if tensors is None else tensors, path, metadata=about)


def renamed_field(path: Path) -> None:
    fields = json.loads(parts(path)[1]["fields"])
    first = next(iter(fields))
    fields[f"{first}s"] = fields.pop(first)
    rewrite(path, json.dumps(fields))


def field_too_many(path: Path) -> None:
    fields = json.loads(parts(path)[1]["fields"]) | {"more": {"kind": "plain", "value": 1}}
    rewrite(path, json.dumps(fields))


def wrong_json(path: Path) -> None:
    rewrite(path, "[1, ")


def changed_value(path: Path) -> None:
    tensors, about = parts(path)
    save_file(
        tensors, path, metadata=about | {"fields": about["fields"].replace("7", "8").replace("3", "4") + " "}
    )


def without_its_tensors(path: Path) -> None:
    rewrite(path, parts(path)[1]["fields"], {})


DAMAGES = (
    truncated,
    cut_in_the_header,
    empty,
    flipped,
    of_another_version,
    renamed_field,
    field_too_many,
    wrong_json,
    changed_value,
    without_its_tensors,
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_damaged_result_is_refused(tmp_path: Path, kind: type[Result], damage: Any) -> None:
    path = tmp_path / "result.safetensors"
    sample(kind).save(path)
    damage(path)
    with pytest.raises(UnreadableError, match=r"^cannot read .*result\.safetensors: ."):
        kind.load(path)


def test_a_file_of_before_versions_is_read(tmp_path: Path) -> None:
    path, result = tmp_path / "result.safetensors", sample(Moments)
    result.save(path)
    tensors, about = parts(path)
    save_file(tensors, path, metadata={k: v for k, v in about.items() if k not in ("version", "sha256")})
    assert equal(Moments.load(path), result)


def test_numbers_of_numpy_are_stored_as_pythons_own(tmp_path: Path) -> None:
    axes = {"iteration": tuple(np.arange(2)), "layer": (torch.tensor(3),)}
    Moments(axes, ("norm",), torch.zeros(6, 1, 2, 1)).save(tmp_path / "moments")
    again = Moments.load(tmp_path / "moments")
    assert again.axes == {"iteration": (0, 1), "layer": (3,)}
    assert all(type(label) is int for labels in again.axes.values() for label in labels)


@pytest.mark.parametrize("fails", ["save_file", "os.fsync", "os.replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    path, old = tmp_path / "moments", sample(Moments)
    old.save(path)

    def full(tensors: Any, at: Any = None, **kwargs: Any) -> None:
        if at is not None and fails == "save_file":
            Path(at).write_bytes(b"half a fi")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        if fails == "save_file":
            broken.setattr("loop_lens.measuring.files.save_file", full)
        else:
            broken.setattr(os, fails.removeprefix("os."), full)
        with pytest.raises(OSError, match="No space"):
            dataclasses.replace(old, metrics=("other",)).save(path)
    assert equal(Moments.load(path), old) and [p.name for p in tmp_path.iterdir()] == ["moments"]
