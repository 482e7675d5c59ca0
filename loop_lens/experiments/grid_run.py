"""A grid of models, each measured once and kept in a file of its own, so that a killed run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm.auto import tqdm

from loop_lens.experiments.report import ignored_folder
from loop_lens.measuring.results import Result

C = TypeVar("C")
R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Kept(Generic[R]):
    """The files of a grid's results, one a cell; cells have names unlike all others'."""

    folder: Path
    kind: type[R]
    how: Any  # the dataclass of settings that cells are measured by; other settings have other files

    def _file(self, cell: Any) -> Path:
        settings = json.dumps(asdict(self.how), sort_keys=True).encode()
        return self.folder / f"{cell.name}-{blake2b(settings, digest_size=4).hexdigest()}.safetensors"

    def load(self, cell: Any) -> R | None:
        """A cell's result, None where there is none."""
        file = self._file(cell)
        return self.kind.load(file) if file.exists() else None

    def save(self, cell: Any, result: R) -> None:
        """Write a cell's result; it has its own name only when it is whole."""
        file = self._file(cell)
        ignored_folder(self.folder)
        part = file.with_name(f"{file.name}.part")
        result.save(part)
        part.replace(file)


def run_grid(
    cells: Iterable[C],
    measure: Callable[[C], R],
    kept: Kept[R] | None,
    *,
    resume: bool = True,
    progress: bool = True,
) -> dict[C, R]:
    """Measure cells in order, or, to resume, read what an earlier run kept of them."""
    results: dict[C, R] = {}
    for cell in tqdm(list(cells), desc="models", delay=2, disable=not progress, leave=False):
        result = kept.load(cell) if kept is not None and resume else None
        if result is None:
            result = measure(cell)
            if kept is not None:
                kept.save(cell, result)
        results[cell] = result
    return results
