"""How well a model does a task, by level of difficulty and number of iterations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from loop_lens.data.task import IGNORED, Split, Task, TaskBatch
from loop_lens.figures.canvas import new_figure
from loop_lens.measuring.results import Result
from loop_lens.models.native.modeling import LoopedTransformer
from loop_lens.training.draws import generator_of


@dataclass(frozen=True)
class Evaluation(Result):
    """Loss and accuracy of a model on a task.

    Attributes:
        task: Name of the task.
        split: Which structures the sequences had.
        levels: Levels of difficulty.
        recurrences: Numbers of iterations.
        sequences: Number of sequences of each level.
        loss: Mean cross-entropy over labelled positions, in nats [level recurrences].
        accuracy: Share of labelled positions named rightly, 0 to 1 [level recurrences].
        loss_at: Mean cross-entropy at each position, NaN where it has no label [level recurrences pos].
        accuracy_at: Share named rightly at each position, likewise [level recurrences pos].
        labelled: Number of labels at each position [level pos].

    Example:
        >>> from loop_lens.training import evaluate
        >>> net = loop_lens.LoopedTransformer.from_pretrained(loop_lens.shipped.shipped_folder("hops"))
        >>> found = evaluate(net, loop_lens.data.HopsTask(), recurrences=[1, 8], levels=[2], n=32, progress=False)
        >>> found.accuracy.shape, found.to_dataframe()["recurrences"].tolist()
        (torch.Size([1, 2]), [1, 8])
    """

    task: str
    split: str
    levels: tuple[int, ...]
    recurrences: tuple[int, ...]
    sequences: int
    loss: Float[Tensor, "level recurrences"]
    accuracy: Float[Tensor, "level recurrences"]
    loss_at: Float[Tensor, "level recurrences pos"]
    accuracy_at: Float[Tensor, "level recurrences pos"]
    labelled: Int[Tensor, "level pos"]

    def to_dataframe(self, *, by_position: bool = False) -> pd.DataFrame:
        """One row per level and number of iterations, and per labelled position if asked for."""
        rows: list[dict[str, Any]] = []
        for i, level in enumerate(self.levels):
            for j, recurrences in enumerate(self.recurrences):
                place = {"level": level, "recurrences": recurrences}
                if not by_position:
                    numbers = {"loss": float(self.loss[i, j]), "accuracy": float(self.accuracy[i, j])}
                    rows.append({**place, **numbers, "n": int(self.labelled[i].sum())})
                    continue
                for position in self.labelled[i].nonzero().flatten().tolist():
                    values = {
                        "position": position,
                        "loss": float(self.loss_at[i, j, position]),
                        "accuracy": float(self.accuracy_at[i, j, position]),
                        "n": int(self.labelled[i, position]),
                    }
                    rows.append(place | values)
        return pd.DataFrame(rows)

    def plot(self) -> Any:
        """Draw accuracy against the number of iterations, a line per level; a figure, not shown."""
        figure, axes = new_figure(6, 3.2)
        for level, line in zip(self.levels, self.accuracy, strict=True):
            axes.plot(self.recurrences, line, "o-", markersize=3, label=f"{level}")
        axes.set(xlabel="recurrences", ylabel="accuracy", ylim=(0, 1.02), xscale="log")
        axes.set_xticks(self.recurrences, [str(r) for r in self.recurrences], minor=False)
        axes.set_xticks([], minor=True)
        axes.legend(title="level")
        return figure


@torch.no_grad()
def evaluate(
    model: LoopedTransformer,
    task: Task,
    *,
    recurrences: Sequence[int],
    levels: Sequence[int],
    n: int = 512,
    seed: int = 0,
    split: Split = "test",
    batch_size: int = 128,
    progress: bool = True,
) -> Evaluation:
    """Measure a model at several numbers of iterations, all from one forward at the largest.

    The model starts from its own initial state (`LoopedTransformer.initial_state`, the seed 0 by default).

    Args:
        model: The model, before it is opened.
        task: Where the sequences come from.
        recurrences: Numbers of iterations.
        levels: Levels of difficulty.
        n: Number of sequences of each level.
        seed: Seed of the sequences; the same for all numbers of iterations.
        split: Which structures may occur.
        batch_size: Sequences per forward.
        progress: Whether to show a progress bar, for work beyond two seconds.

    Raises:
        TypeError: If the model is not a bare looped model.
        ValueError: If there is nothing to measure, or a number of iterations is below 1.

    Example:
        >>> from loop_lens.training import evaluate
        >>> net = loop_lens.LoopedTransformer.from_pretrained(loop_lens.shipped.shipped_folder("hops"))
        >>> found = evaluate(net, loop_lens.data.HopsTask(), recurrences=[8], levels=[1, 6], n=32, progress=False)
        >>> (found.accuracy > 0.9).tolist()
        [[True], [True]]
    """
    if not isinstance(model, LoopedTransformer):
        raise TypeError(
            f"evaluate takes a LoopedTransformer, got {type(model).__name__}: measure it before it is opened, "
            "or read an opened model with loop_lens.lens(kind='native')"
        )
    wanted = tuple(sorted(set(recurrences)))
    if not wanted or wanted[0] < 1 or not levels or n < 1 or batch_size < 1:
        raise ValueError(
            f"evaluate needs numbers of iterations of at least 1, levels and sequences, got recurrences="
            f"{list(recurrences)}, levels={list(levels)}, n={n}, batch_size={batch_size}"
        )
    training = model.training
    model.eval()
    sums: list[Tensor] = []
    starts = range(0, n, batch_size)
    bar = tqdm(total=len(levels) * len(starts), desc="evaluation", delay=2, disable=not progress, leave=False)
    try:
        with bar:
            for level in levels:
                parts: list[Tensor] = []
                for start in starts:
                    size, generator = (
                        min(batch_size, n - start),
                        generator_of(seed, start, f"evaluation {level}"),
                    )
                    batch = task.batch(size, level=level, generator=generator, split=split)
                    parts.append(totals(model, batch, wanted))
                    bar.update()
                sums.append(torch.stack(_padded(parts)).sum(0))
    finally:
        model.train(training)
    table = torch.stack(_padded(sums))
    loss, right, labelled = table.unbind(1)
    count = labelled.sum(-1)
    if not bool(count.all()):
        raise ValueError("the task's sequences have no labels to measure")
    return Evaluation(
        task=getattr(task, "name", type(task).__name__),
        split=split,
        levels=tuple(levels),
        recurrences=wanted,
        sequences=n,
        loss=loss.sum(-1) / count,
        accuracy=right.sum(-1) / count,
        loss_at=loss / labelled,
        accuracy_at=right / labelled,
        labelled=labelled[:, 0].long(),
    )


@torch.no_grad()
def totals(
    model: LoopedTransformer, batch: TaskBatch, recurrences: Sequence[int]
) -> Float[Tensor, "3 recurrences pos"]:
    """Loss, right answers and labels at each position, summed over sequences; all from one forward.

    Args:
        model: The model, before it is opened.
        batch: The sequences.
        recurrences: Numbers of iterations after which the model is read.
    """
    places = (batch.labels.flatten() != IGNORED).nonzero().flatten()
    targets, positions = batch.labels.flatten()[places], places % batch.labels.shape[1]
    default, model.config.recurrences = model.config.recurrences, max(recurrences)
    try:
        out: Any = model(
            input_ids=batch.input_ids.to(model.device),
            use_cache=False,
            read_iterations=[r - 1 for r in recurrences],
            places=places.to(model.device),
        )
    finally:
        model.config.recurrences = default
    sums = torch.zeros(3, len(recurrences), batch.labels.shape[1], dtype=torch.float64)
    for i, logits in enumerate(out.iteration_logits.float().cpu()):
        sums[0, i].index_add_(0, positions, cross_entropy(logits, targets, reduction="none").double())
        sums[1, i].index_add_(0, positions, (logits.argmax(-1) == targets).double())
        sums[2, i].index_add_(0, positions, torch.ones(len(targets), dtype=torch.float64))
    return sums


def _padded(tables: list[Tensor]) -> list[Tensor]:
    """Tables with as many positions as the longest [... pos]."""
    longest = max(table.shape[-1] for table in tables)
    return [torch.nn.functional.pad(table, (0, longest - table.shape[-1])) for table in tables]
