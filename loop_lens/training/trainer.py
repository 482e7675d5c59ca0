"""Train a looped model on a task."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm

from loop_lens.data.task import IGNORED
from loop_lens.models.files import replacing
from loop_lens.models.native.config import LoopedConfig
from loop_lens.models.native.modeling import LoopedTransformer
from loop_lens.training.checkpoints import (
    CheckpointError,
    Progress,
    last_checkpoint,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    save_quietly,
    table,
)
from loop_lens.training.config import TrainingConfig
from loop_lens.training.draws import generator_of, noise_state, number_of
from loop_lens.training.result import StepRecord, TrainingResult

if TYPE_CHECKING:
    from loop_lens.data.task import Task

_MAY_CHANGE = ("steps", "checkpoint_every", "log_every")
"""Settings that a training may go on with in another value."""
_NOT_TRAINED_WITH = ("recurrences", "use_cache", "initializer_range", "initial_state_seed", "published")
"""Fields of a model's config that no step of a training depends on."""


class NonFiniteLossError(RuntimeError):
    """A loss or a gradient that is not a number any more.

    Example:
        >>> from loop_lens.training import NonFiniteLossError, TrainingConfig, train
        >>> task = loop_lens.data.AdditionTask()
        >>> size = loop_lens.LoopedConfig(vocab_size=task.vocab_size, hidden_size=16, intermediate_size=16)
        >>> net = loop_lens.LoopedTransformer(size)
        >>> net.lm_head.weight.data[0, 0] = float("nan")
        >>> try:
        ...     train(net, task, TrainingConfig(steps=3, batch_size=4), folder="run", progress=False)
        ... except NonFiniteLossError as error:
        ...     str(error).split(":")[0]
        'the loss is nan at step 0'
    """


def train(
    model: LoopedTransformer,
    task: Task,
    config: TrainingConfig,
    *,
    folder: str | Path,
    resume: bool = True,
    progress: bool = True,
    on_step: Callable[[StepRecord], None] | None = None,
) -> TrainingResult:
    """Train a model; on one device, or on many under accelerate's launcher.

    Data, iterations and initial states of a step are functions of the seed and the step alone, and every
    process draws the whole batch and takes its rows: a training that is killed and started again, or runs on
    another number of processes, goes the same way (bit for bit on the same processes).

    Args:
        model: The model; its parameters are trained in place.
        task: Where the sequences come from.
        config: How to train.
        folder: Where checkpoints, ``log.csv`` and the trained model (under ``model``) go.
        resume: Whether to go on from the last checkpoint in the folder; False deletes it and starts over.
        progress: Whether to show a progress bar.
        on_step: Called after every step, on the main process.

    Returns:
        The trained model and its log.

    Raises:
        ValueError: If the model cannot be trained like this.
        NonFiniteLossError: If the loss or the gradients are not finite; the last checkpoint is kept.
        CheckpointError: If a checkpoint cannot be written, or belongs to another training.

    Example:
        >>> from loop_lens.training import Fixed, TrainingConfig, train
        >>> task = loop_lens.data.AdditionTask()
        >>> size = loop_lens.LoopedConfig(vocab_size=task.vocab_size, hidden_size=16, intermediate_size=16)
        >>> net = loop_lens.LoopedTransformer(size)
        >>> config = TrainingConfig(steps=3, batch_size=4, recurrences=Fixed(2))
        >>> train(net, task, config, folder="run", progress=False).steps
        3
        >>> loop_lens.boot("run/model").n_params == sum(p.numel() for p in net.parameters())
        True
    """
    _require_trainable(model, task, config)
    folder = Path(folder)
    accelerator = _accelerator(config, model)
    try:
        return _Training(model, task, config, folder, accelerator).run(resume, progress, on_step)
    finally:
        AcceleratorState._reset_state()


class _Training:
    def __init__(
        self,
        model: LoopedTransformer,
        task: Task,
        config: TrainingConfig,
        folder: Path,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.task, self.config, self.folder = model, task, config, folder
        self.accelerator = accelerator
        self.settings = {k: v for k, v in config.to_json().items() if k not in _MAY_CHANGE}
        self.settings |= {"task": getattr(task, "name", type(task).__name__), "model": _described(model)}
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self.at = Progress()

    def run(
        self, resume: bool, progress: bool, on_step: Callable[[StepRecord], None] | None
    ) -> TrainingResult:
        """Train to the end."""
        model, config, main = self.model, self.config, self.accelerator.is_main_process
        self._begin(resume)
        forward, optimizer = self.accelerator.prepare(model, self.optimizer)
        begun = time.perf_counter() - self.at.seconds
        bar = tqdm(
            total=self._end(),
            initial=self.at.done,
            desc="training",
            delay=2,
            disable=not (progress and main),
            leave=False,
        )
        try:
            if config.gradient_checkpointing:
                checkpoint_blocks(model, on=True)
            model.train()
            while self.at.done < self._end():
                record = self._step(forward, optimizer)
                self.at.seconds = time.perf_counter() - begun
                logged = self._note(record)
                if self.at.done == self._end() or (
                    config.checkpoint_every and self.at.done % config.checkpoint_every == 0
                ):
                    self._save()
                bar.update()
                if logged:
                    bar.total = self._end()
                    shown = {
                        "loss": f"{record.loss:.3g}",
                        "acc": f"{record.accuracy:.3g}",
                        "level": record.level,
                    }
                    bar.set_postfix(shown, refresh=False)
                if on_step is not None and main:
                    on_step(record)
        finally:
            bar.close()
            if config.gradient_checkpointing:
                checkpoint_blocks(model, on=False)
            optimizer.zero_grad()
            model.eval()
            self.accelerator.unwrap_model(forward, keep_fp32_wrapper=False)
        self._finish()
        levels = config.curriculum.levels if config.curriculum else ()
        passed = tuple(zip(levels, self.at.curriculum.passed, strict=False))
        log = table(self.at)
        columns = {str(name): torch.from_numpy(log[name].to_numpy(copy=True)) for name in log}
        return TrainingResult(str(self.folder), columns, self.at.done, passed, self.at.seconds, trained=model)

    def _begin(self, resume: bool) -> None:
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not resume:
                remove_checkpoints(self.folder)
        self.accelerator.wait_for_everyone()
        found = last_checkpoint(self.folder)
        if found is not None:
            self.at = load_checkpoint(found, self.model, self.optimizer, self.settings)

    def _end(self) -> int:
        return self.at.curriculum.end(self.config.curriculum, self.config.steps)

    def _step(self, forward: nn.Module, optimizer: Any) -> StepRecord:
        config, accelerator, step = self.config, self.accelerator, self.at.done
        level = config.curriculum.levels[self.at.curriculum.stage] if config.curriculum else config.level
        fraction = config.ramp.fraction(step) if config.ramp else 1.0
        draw = generator_of(config.seed, step, "recurrences")
        recurrences = config.recurrences.draw(draw, level=level, fraction=fraction)
        lr = config.learning_rate(step, self._end())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, loss_sum, correct, labelled = self._loss(forward, step, level, recurrences)
        sums = cast(Tensor, accelerator.reduce(torch.stack([loss_sum, correct]))).tolist()
        if not math.isfinite(sums[0]):
            raise NonFiniteLossError(self._diverged(f"the loss is {sums[0]}"))
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
        grad_norm = float(norm)  # pyright: ignore[reportArgumentType]
        if not math.isfinite(grad_norm):
            raise NonFiniteLossError(self._diverged(f"the gradients' norm is {grad_norm}"))
        optimizer.step()
        optimizer.zero_grad()
        self.at.done += 1
        return StepRecord(
            self.at.done, sums[0] / labelled, sums[1] / labelled, lr, level, recurrences, grad_norm
        )

    def _loss(
        self, forward: nn.Module, step: int, level: int, recurrences: int
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """The loss to differentiate, and sums of loss and of right answers over this process's places."""
        config, accelerator, model = self.config, self.accelerator, self.model
        whole = self.task.batch(
            config.batch_size, level=level, generator=generator_of(config.seed, step, "data")
        )
        labelled = int((whole.labels != IGNORED).sum())
        if not labelled:
            raise ValueError(f"step {step}: the task's batch at level {level} has no labels to learn from")
        shape = (whole.input_ids.shape[0], whole.input_ids.shape[1])
        state = noise_state(model.config, shape, generator_of(config.seed, step, "state"))
        world, rank = accelerator.num_processes, accelerator.process_index
        size = config.batch_size // world
        mine = slice(rank * size, (rank + 1) * size)
        labels = whole.labels[mine].flatten()
        places = (labels != IGNORED).nonzero().flatten()
        targets = labels[places].to(accelerator.device)
        if model.config.attention_dropout:
            torch.manual_seed(number_of(config.seed, step, f"dropout {rank}"))
        kept = model.config.recurrences
        model.config.recurrences = recurrences
        try:
            out = forward(
                input_ids=whole.input_ids[mine].to(accelerator.device),
                use_cache=False,
                initial_state=None if state is None else state[mine].to(accelerator.device),
                backprop_iterations=config.backprop_iterations,
                read_iterations=config.loss.reads_iterations,
                places=places.to(accelerator.device),
            )
        finally:
            model.config.recurrences = kept
        logits = out.iteration_logits if config.loss.reads_iterations else out.logits.unsqueeze(0)
        gates = out.exit_gate_logits
        if gates is not None:
            gates = gates.flatten(1).index_select(1, places.to(accelerator.device))
        total = config.loss.total(logits.float(), targets, gates)
        correct = (logits[-1].detach().argmax(-1) == targets).sum()
        # Processes average their gradients, so each counts its sum by the labels of all.
        loss = total * (world / labelled)
        return loss, total.detach().double(), correct.double(), labelled

    def _diverged(self, what: str) -> str:
        found = last_checkpoint(self.folder)
        return (
            f"{what} at step {self.at.done}: lower lr ({self.config.lr}), clip gradients or warm up longer; "
            + (f"the last good checkpoint is {found}" if found else "there is no checkpoint yet")
        )

    def _note(self, record: StepRecord) -> bool:
        """Move the curriculum and the log on; whether a row was written."""
        at, config = self.at, self.config
        if config.curriculum is not None:
            at.curriculum.see(config.curriculum, record.accuracy, record.step)
        at.pending.append((record.loss, record.accuracy))
        if record.step % config.log_every and record.step != self._end():
            return False
        losses, accuracies = zip(*at.pending, strict=True)
        at.rows.append(
            {
                "step": record.step,
                "loss": sum(losses) / len(losses),
                "accuracy": sum(accuracies) / len(accuracies),
                "lr": record.lr,
                "level": record.level,
                "recurrences": record.recurrences,
                "grad_norm": record.grad_norm,
                "seconds": at.seconds,
            }
        )
        at.pending = []
        return True

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            save_checkpoint(self.folder, self.model, self.optimizer, self.at, self.settings)
        self.accelerator.wait_for_everyone()

    def _finish(self) -> None:
        if self.accelerator.is_main_process:
            try:
                with replacing(self.folder / "model", folder=True) as partial:
                    save_quietly(self.model, partial)
                    if getattr(self.task, "tokenizer", None) is not None:
                        self.task.tokenizer.save_pretrained(partial)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"the trained model could not be written to {self.folder / 'model'} ({error}): make room and "
                    "train again with the same folder; nothing has to be trained again"
                ) from error
        self.accelerator.wait_for_everyone()


def checkpoint_blocks(model: LoopedTransformer, *, on: bool) -> None:
    """Whether blocks are run again in the backward pass; transformers 5.24 renamed how to say it."""
    names = [f"{kind}_checkpointing_{'enable' if on else 'disable'}" for kind in ("activation", "gradient")]
    switch: Any = next(getattr(model, name) for name in names if hasattr(model, name))
    if on:
        switch({"use_reentrant": False})
    else:
        switch()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with weight decay and without: norms, biases, embeddings and the diagonal's rates."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed, plain = list[Tensor](), list[Tensor]()
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 and id(parameter) not in embeddings else plain).append(parameter)
    groups = ({"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _described(model: LoopedTransformer) -> dict[str, Any]:
    """What a model computes, apart from its weights."""
    own = LoopedConfig.__annotations__.keys() - {"model_type", *_NOT_TRAINED_WITH}
    fields = {name: value for name, value in model.config.to_dict().items() if name in own}
    state = model.model.initial_state
    if isinstance(state, Tensor):
        state = hashlib.sha256(state.detach().cpu().float().numpy().tobytes()).hexdigest()
    return {**fields, "dtype": str(model.dtype), "starts_from": state if isinstance(state, str) else None}


def _accelerator(config: TrainingConfig, model: LoopedTransformer) -> Accelerator:
    AcceleratorState._reset_state()
    # Some parameters need not take part in a step: the prelude's behind a truncated loop, an unused gate.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision=config.mixed_precision, kwargs_handlers=[ddp])
    if config.batch_size % accelerator.num_processes:
        raise ValueError(
            f"batch_size {config.batch_size} cannot be shared by {accelerator.num_processes} processes: "
            "make it a multiple"
        )
    return accelerator


def _require_trainable(model: LoopedTransformer, task: Task, config: TrainingConfig) -> None:
    if not isinstance(model, LoopedTransformer):
        raise TypeError(
            f"train takes a LoopedTransformer, got {type(model).__name__}: train it first, then open it with "
            "loop_lens.wrap or loop_lens.boot"
        )
    if task.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the task has {task.vocab_size} tokens, but the model only {model.config.vocab_size}: "
            f"set LoopedConfig(vocab_size={task.vocab_size})"
        )
    config.require_model(model.config)
