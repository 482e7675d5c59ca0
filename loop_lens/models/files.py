"""Files on disk: read with one error that names what is wrong, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UnreadableError(ValueError):
    """A file that is damaged, of another version, or does not fit what it lies beside.

    Example:
        >>> _ = open("config.json", "w").write('{"model_type": "ouro", "hidden_size": ')
        >>> loop_lens.boot(".")
        Traceback (most recent call last):
        loop_lens.models.files.UnreadableError: cannot read config.json: Expecting value: ...
    """


@contextmanager
def reading(path: str | Path) -> Generator[None, None, None]:
    """Say whatever goes wrong within as one error about a file.

    Raises:
        UnreadableError: Instead of any error but a missing file's.
    """
    try:
        yield
    except (UnreadableError, FileNotFoundError):
        raise
    except Exception as error:
        # A file may hold anything, so anything may go wrong with what it says.
        key = error.args[0] if isinstance(error, KeyError) and error.args else None
        what = f"{key!r} is missing" if isinstance(key, str) and " " not in key else str(key or error)
        raise UnreadableError(f"cannot read {path}: {what or type(error).__name__}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UnreadableError: If it holds anything else.
    """
    with reading(path):
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__} where an object belongs")
    return content


@contextmanager
def replacing(path: str | Path, *, folder: bool = False) -> Generator[Path, None, None]:
    """A path to write to, which takes the place of ``path`` in the end, unless an error came.

    Args:
        path: The file, or the folder whose files of the same names are replaced.
        folder: Whether it is a folder; files of other names stay in it.
    """
    target = Path(path).resolve()
    place = target if folder else target.parent
    place.mkdir(parents=True, exist_ok=True)
    partial = place / f".{target.name}.writing-{os.getpid()}"
    if folder:
        partial.mkdir(exist_ok=True)
    try:
        yield partial
        files = [file for file in partial.rglob("*") if file.is_file()] if folder else [partial]
        for file in files:
            with file.open("rb") as written:
                os.fsync(written.fileno())
        for file in files:
            final = target / file.relative_to(partial)
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, final)
    finally:
        if folder:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
