"""What a shipped model's card says, measured on its test split."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loop_lens.data.task import IGNORED, Task, TaskBatch
from loop_lens.data.text import TextTask
from loop_lens.lenses.exit_rules import exit_probabilities
from loop_lens.models.native.modeling import LoopedTransformer
from loop_lens.opening.entry import wrap
from loop_lens.training.evaluation import totals

TEST_SEED = 10_000
"""Seed of the test batches; any number would do, but cards and tests must agree."""
_SHOWN = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True)
class Measurements:
    """What a trained model does: numbers by name, tables and notes on them by title, what it wrote by prompt."""

    numbers: dict[str, float]
    tables: dict[str, pd.DataFrame]
    notes: dict[str, str] = field(default_factory=dict[str, str])
    samples: dict[str, str] = field(default_factory=dict[str, str])


def held_out(task: Task, level: int, n: int) -> TaskBatch:
    """The test sequences that cards are measured on."""
    generator = torch.Generator().manual_seed(TEST_SEED + level)
    return task.batch(n, level=level, generator=generator, split="test")


def accuracy_by_iteration(
    model: LoopedTransformer, batch: TaskBatch, recurrences: int, *, rows: int = 64
) -> Float[Tensor, "iteration answer"]:
    """How often a model is right if its loop ends after each iteration; all sequences answer at the same places."""
    every = range(1, recurrences + 1)
    _, right, labels = torch.stack([totals(model, part, every) for part in batch.split(rows)]).sum(0)
    return (right / labels)[:, batch.labels[0] != IGNORED].float()


def relative_steps(model: LoopedTransformer, tokens: Tensor, recurrences: int) -> Float[Tensor, " iteration"]:
    """Mean of ||s_t - s_(t-1)|| / ||s_t|| over tokens, for t = 2, 3, ...; s_t leaves iteration t."""
    states = _states(model, tokens, recurrences, seed=0)
    steps = (states[1:] - states[:-1]).norm(dim=-1) / states[1:].norm(dim=-1)
    return steps.flatten(1).mean(1)


@torch.no_grad()
def _states(model: LoopedTransformer, tokens: Tensor, recurrences: int, *, seed: int) -> Tensor:
    opened = wrap(copy.deepcopy(model), recurrences=recurrences)
    if model.config.initial_state == "noise":
        opened.initial_state = seed
    _, cache = opened.run_with_cache(tokens, names_filter=opened.names("state_out"))
    return cache.over_iterations("state_out")


def _settling(steps: Tensor, shown: Sequence[int], sequences: str) -> tuple[pd.DataFrame, str]:
    """A table of `relative_steps`, and the note on it."""
    later = [t for t in shown if t > 1]
    table = pd.DataFrame({"iteration": later, "relative step": steps[[t - 2 for t in later]]})
    note = (
        "Mean over tokens of the distance between the states that leave an iteration and the one before, relative "
        f"to the state's norm; 16 test {sequences}."
    )
    return table, note


def measure_chain(
    model: LoopedTransformer,
    task: Task,
    *,
    beyond: Sequence[int] = (7, 8, 10, 16),
    most: int = 64,
    n: int = 512,
) -> Measurements:
    """Measure a model of a task whose levels are lengths of a chain of answers.

    Args:
        model: The trained model.
        task: Its task.
        beyond: Levels that it was never trained on.
        most: The largest number of iterations.
        n: Test sequences per level.
    """
    top, default = task.levels, model.config.recurrences
    shown = [t for t in _SHOWN if t <= most]
    at = [t - 1 for t in shown]
    trained, *longer = (accuracy_by_iteration(model, held_out(task, k, n), most) for k in (top, *beyond))
    by_answer = pd.DataFrame(trained[at], columns=[f"answer {i + 1}" for i in range(top)])
    by_answer.insert(0, "iterations", shown)
    by_level = pd.DataFrame({"iterations": shown})
    for level, accuracy in zip((top, *beyond), (trained, *longer), strict=True):
        by_level[f"{level}, all"] = accuracy.mean(1)[at]
        by_level[f"{level}, last"] = accuracy[at, -1]
    tokens = held_out(task, top, 16).input_ids
    steps = relative_steps(model, tokens, most)
    numbers = {
        "chance": task.chance(top),
        "accuracy_at_one_iteration": trained[0].mean().item(),
        "accuracy": trained[default - 1].mean().item(),
        "last_answer_at_one_iteration": trained[0, -1].item(),
        "last_answer": trained[default - 1, -1].item(),
        f"accuracy_at_{most}_iterations": trained[-1].mean().item(),
    }
    for t in (default, most):
        numbers |= {
            f"last_answer_of_{k}_at_{t}": a[t - 1, -1].item() for k, a in zip(beyond, longer, strict=True)
        }
    numbers |= {f"relative_step_at_{most}": steps[-1].item(), "test_sequences": n}
    if model.config.initial_state == "noise":
        one, two = (_states(model, tokens, 40, seed=seed)[-1] for seed in (0, 1))
        numbers["cosine_of_two_starts_after_40"] = torch.cosine_similarity(one, two, dim=-1).min().item()
    tables = {
        "Accuracy by iterations and answer": (
            by_answer,
            f"{n} test sequences of {top} answers; the loop ends after so many iterations. "
            f"Chance is {task.chance(top):.3f}.",
        ),
        "Beyond the trained length": (
            by_level,
            f"Chains of {', '.join(map(str, beyond))} answers were never trained; each column is the length, with "
            "the accuracy of all its answers and of the last one.",
        ),
        "Convergence": _settling(steps, shown, "sequences"),
    }
    if model.config.exit_gate:
        tables["Exit gate"] = (
            gate_table(model, held_out(task, top, n)),
            f"Mean over test sequences of the iteration at which the trained gate leaves, of {default}, and how "
            "often the answer is right there, by answer.",
        )
    return _measurements(numbers, tables)


def _measurements(
    numbers: dict[str, float],
    tables: Mapping[str, tuple[pd.DataFrame, str]],
    samples: Mapping[str, str] | None = None,
) -> Measurements:
    notes = {title: note for title, (_, note) in tables.items()}
    return Measurements(
        numbers, {title: table for title, (table, _) in tables.items()}, notes, dict(samples or {})
    )


@torch.no_grad()
def gate_table(model: LoopedTransformer, batch: TaskBatch) -> pd.DataFrame:
    """Where the exit gate leaves, in expectation, and how right the model is there, answer by answer."""
    places = (batch.labels[0] != IGNORED).nonzero().flatten()
    out = model(batch.input_ids, use_cache=False, read_iterations=True)
    assert out.exit_gate_logits is not None and out.iteration_logits is not None
    p = exit_probabilities(out.exit_gate_logits[:, :, places])
    right = (out.iteration_logits[:, :, places].argmax(-1) == batch.labels[:, places]).float()
    iteration = torch.arange(1.0, len(p) + 1)[:, None, None]
    return pd.DataFrame(
        {
            "answer": range(1, len(places) + 1),
            "exit iteration": (p * iteration).sum(0).mean(0),
            "accuracy at exit": (p * right).sum(0).mean(0),
        }
    )


@torch.no_grad()
def measure_text(
    model: LoopedTransformer,
    task: Task,
    *,
    most: int = 32,
    prompts: Sequence[str] = (
        "Return the",
        "The default value is",
        "If the file does not exist,",
        "This is a",
    ),
) -> Measurements:
    """Measure a language model on the whole test split.

    Args:
        model: The trained model.
        task: A `TextTask`.
        most: The largest number of iterations.
        prompts: What to continue.
    """
    assert isinstance(task, TextTask)
    default, batch = model.config.recurrences, task.windows("test")
    shown = [t for t in _SHOWN if t <= most]
    sums = torch.stack([totals(model, part, shown).sum(-1) for part in batch.split(16)]).sum(0)
    loss, right = sums[0] / sums[2], sums[1] / sums[2]
    bits = loss / math.log(2) * len(task.tokens["test"]) / task.bytes["test"]
    steps = relative_steps(model, batch.input_ids[:16], most)
    at = shown.index(default)
    numbers = {
        "chance": 1 / task.vocab_size,
        "loss": loss[at].item(),
        "bits_per_byte": bits[at].item(),
        "accuracy": right[at].item(),
        "loss_at_one_iteration": loss[0].item(),
        "loss_of_the_token_frequencies": _unigram_loss(task),
        f"loss_at_{most}_iterations": loss[-1].item(),
        f"relative_step_at_{most}": steps[-1].item(),
        "test_tokens": batch.labels.numel(),
        "training_tokens": len(task.tokens["train"]),
    }
    tables = {
        "Loss by iterations": (
            pd.DataFrame({"iterations": shown, "loss": loss, "bits per byte": bits, "accuracy": right}),
            "Nats per token and bits per byte of text on all test documents, in windows of "
            f"{task.window} tokens. {default} iterations gain {(loss[0] - loss[at]).item():.3f} nats over one.",
        ),
        "Convergence": _settling(steps, shown, "windows"),
    }
    return _measurements(numbers, tables, {prompt: continued(model, task, prompt) for prompt in prompts})


def continued(model: LoopedTransformer, task: Task, prompt: str) -> str:
    """The model's own greedy continuation of a prompt, 24 tokens at most."""
    end = task.tokenizer.bos_token_id
    ids = torch.tensor([[end, *task.tokenizer(prompt)["input_ids"]]])
    for _ in range(24):
        following = model(ids, use_cache=False).logits[:, -1:].argmax(-1)
        if following.item() == end:
            break
        ids = torch.cat([ids, following], 1)
    return task.tokenizer.decode(ids[0, 1:]).removeprefix(prompt)


def _unigram_loss(task: TextTask) -> float:
    counts = task.tokens["train"].bincount(minlength=task.vocab_size).float() + 1
    log_p = (counts / counts.sum()).log()
    return -log_p[task.tokens["test"]].mean().item()
