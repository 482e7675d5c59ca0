"""Checkpoints of a training: whole or not there at all, and without pickles."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import Tensor
from transformers.utils import logging

from loop_lens.models.checkpoint import Tensors, WeightsError, require_shapes
from loop_lens.models.files import UnreadableError, digest_of, read_json, reading, replacing
from loop_lens.models.native.modeling import LoopedTransformer
from loop_lens.training.curriculum import CurriculumState
from loop_lens.unrolling.numbers import whole

PREFIX = "checkpoint-"
WRITING = ".writing"
VERSION = 2
_OTHERWISE = "give what it was made with, choose another folder, or start over with resume=False"
_WEIGHTS, _OPTIMIZER, _LOG, _PROGRESS = (
    "model.safetensors",
    "optimizer.safetensors",
    "log.csv",
    "progress.json",
)


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read.

    Example:
        >>> from loop_lens.training import CheckpointError, TrainingConfig, train
        >>> task = loop_lens.data.AdditionTask()
        >>> size = loop_lens.LoopedConfig(vocab_size=task.vocab_size, hidden_size=16, intermediate_size=16)
        >>> net = loop_lens.LoopedTransformer(size)
        >>> result = train(net, task, TrainingConfig(steps=2, batch_size=4), folder="run", progress=False)
        >>> try:
        ...     train(net, task, TrainingConfig(steps=2, batch_size=8), folder="run", progress=False)
        ... except CheckpointError as error:
        ...     "batch_size: 4 there, 8 now" in str(error)
        True
    """


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        done: Number of steps done.
        curriculum: Where it stands in its curriculum.
        rows: Rows of the log so far.
        pending: Loss and accuracy of each step since the last row.
        seconds: Time spent so far.
    """

    done: int = 0
    curriculum: CurriculumState = field(default_factory=CurriculumState)
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    pending: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    seconds: float = 0.0


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, None where there is none."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return max(found, key=lambda path: int(path.name.removeprefix(PREFIX)), default=None)


def remove_checkpoints(folder: Path, but: Path | None = None) -> None:
    """Delete all checkpoints, or all but one, and what an interrupted write left."""
    for path in [*folder.glob(f"{PREFIX}*"), folder / WRITING]:
        if path != but:
            shutil.rmtree(path, ignore_errors=True)


def save_checkpoint(
    folder: Path,
    model: LoopedTransformer,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    settings: dict[str, Any],
) -> Path:
    """Write a checkpoint beside the last one, then put it in its place.

    Raises:
        CheckpointError: If it cannot be written; the last one is still there.
    """
    target, partial = folder / f"{PREFIX}{progress.done}", folder / WRITING
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_quietly(model, partial)
        save_file(_optimizer_tensors(model, optimizer), partial / _OPTIMIZER)
        table(progress).to_csv(partial / _LOG, index=False)
        state = {
            "version": VERSION,
            "sha256": {path.name: digest_of(path) for path in sorted(partial.iterdir())},
            "done": progress.done,
            "curriculum": progress.curriculum.to_json(),
            "pending": progress.pending,
            "seconds": progress.seconds,
            "settings": settings,
        }
        (partial / _PROGRESS).write_text(json.dumps(state))
        for path in partial.iterdir():
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        with replacing(folder / _LOG) as copy:
            shutil.copy(target / _LOG, copy)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = last_checkpoint(folder)
        raise CheckpointError(
            f"the checkpoint of step {progress.done} could not be written to {folder} ({error}): make room and "
            "train again with the same folder; "
            + (f"it goes on from {kept.name}, which is whole" if kept else "it starts from the beginning")
        ) from error
    remove_checkpoints(folder, but=target)
    return target


def load_checkpoint(
    path: Path, model: LoopedTransformer, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> Progress:
    """Put a checkpoint's weights into a model and its optimizer; neither is touched unless all of it fits.

    Raises:
        CheckpointError: If it was made by another training, or cannot be read.
    """
    try:
        state = read_json(path / _PROGRESS)
        with reading(path / _PROGRESS):
            if state.get("version") != VERSION:
                raise ValueError(
                    f"version is {state.get('version', 1)}, and this loop_lens goes on from {VERSION}"
                )
            for name, digest in state["sha256"].items():
                if digest_of(path / name) != digest:
                    raise UnreadableError(
                        f"cannot read {path / name}: {_PROGRESS} has another checksum of it"
                    )
            made_with = dict(state["settings"], model=dict(state["settings"]["model"]))
            progress = Progress(
                done=whole(state["done"], "done", 0),
                curriculum=CurriculumState(**state["curriculum"]),
                pending=[(float(loss), float(accuracy)) for loss, accuracy in state["pending"]],
                seconds=float(state["seconds"]),
            )
        _require_same(path, made_with, settings)
        with reading(path / _LOG):
            rows = pd.read_csv(path / _LOG, float_precision="round_trip").to_dict("records")
            progress.rows = [{str(key): value for key, value in row.items()} for row in rows]
        weights = Tensors([path / _WEIGHTS]).layout
        require_shapes(str(path), weights, model.state_dict())
        moments = dict(Tensors([path / _OPTIMIZER]))
        parameters = dict(model.named_parameters())
        with reading(path / _OPTIMIZER):
            places = {key: parameters[key.partition("/")[0]] for key in moments}
        load_model(model, path / _WEIGHTS)
    except WeightsError as error:
        raise CheckpointError(f"{path} does not fit this model ({error}): {_OTHERWISE}") from error
    except (UnreadableError, OSError) as error:
        raise CheckpointError(
            f"{error or path}: delete {path}, or train with resume=False to start over"
        ) from error
    for key, parameter in places.items():
        optimizer.state[parameter][key.partition("/")[2]] = moments[key].to(parameter.device)
    return progress


def save_quietly(model: LoopedTransformer, folder: Path) -> None:
    """Save a model without the progress bar of its writing, in the midst of that of the training."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def table(progress: Progress) -> pd.DataFrame:
    """The log as a table."""
    columns = ["step", "loss", "accuracy", "lr", "level", "recurrences", "grad_norm", "seconds"]
    return pd.DataFrame(progress.rows, columns=columns)


def _flush(path: Path) -> None:
    """Bring a file to the disk before its folder gets the name of a whole checkpoint."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _require_same(path: Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    given = json.loads(json.dumps(given))
    for part, what in (("model", "does not fit this model"), (None, "is of a training with other settings")):
        there, now = (each.pop(part) if part else each for each in (saved, given))
        differing = sorted(key for key in {*there, *now} if there.get(key) != now.get(key))
        if differing:
            key = differing[0]
            raise CheckpointError(
                f"{path} {what} ({key}: {there.get(key)} there, {now.get(key)} now): {_OTHERWISE}"
            )


def _optimizer_tensors(model: LoopedTransformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
