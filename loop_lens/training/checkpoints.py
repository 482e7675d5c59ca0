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
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor
from transformers.utils import logging

from loop_lens.models.native.modeling import LoopedTransformer
from loop_lens.training.curriculum import CurriculumState

PREFIX = "checkpoint-"
WRITING = ".writing"


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
        save_file(_optimizer_tensors(model, optimizer), partial / "optimizer.safetensors")
        table(progress).to_csv(partial / "log.csv", index=False)
        state = {
            "done": progress.done,
            "curriculum": progress.curriculum.to_json(),
            "pending": progress.pending,
            "seconds": progress.seconds,
            "settings": settings,
        }
        (partial / "progress.json").write_text(json.dumps(state))
        for path in partial.iterdir():
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
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
    """Put a checkpoint's weights into a model and its optimizer.

    Raises:
        CheckpointError: If it was made by another training, or cannot be read.
    """
    try:
        state = json.loads((path / "progress.json").read_text())
        rows = pd.read_csv(path / "log.csv", float_precision="round_trip")
        moments = load_file(path / "optimizer.safetensors")
        _require_same(path, state["settings"], settings)
        load_model(model, path / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): delete it, or train with resume=False to start over"
        ) from error
    except RuntimeError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} does not fit this model: build it as it was, choose another folder, or start over with "
            "resume=False"
        ) from error
    _fill_optimizer(model, optimizer, moments)
    return Progress(
        done=state["done"],
        curriculum=CurriculumState(**state["curriculum"]),
        rows=[{str(key): value for key, value in row.items()} for row in rows.to_dict("records")],
        pending=[(loss, accuracy) for loss, accuracy in state["pending"]],
        seconds=state["seconds"],
    )


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
    differing = [key for key in sorted({*saved, *given}) if saved.get(key) != given.get(key)]
    if differing:
        key = differing[0]
        raise CheckpointError(
            f"{path} is of a training with other settings ({key}: {saved.get(key)} there, {given.get(key)} now): "
            "choose another folder, or start over with resume=False"
        )


def _optimizer_tensors(model: LoopedTransformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _fill_optimizer(
    model: LoopedTransformer, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, what = key.partition("/")
        optimizer.state[parameters[name]][what] = value.to(parameters[name].device)
