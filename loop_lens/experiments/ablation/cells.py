"""Injection, norm placement and block size in small looped models that train here: the grid and its runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from loop_lens.data import AdditionTask, CompositionTask, Task, TextTask
from loop_lens.experiments import grid_run
from loop_lens.experiments.ablation.measures import CellResult, Measuring, measure_cell
from loop_lens.experiments.norms import NORMS, require_one_of
from loop_lens.models.native import LoopedConfig, LoopedTransformer
from loop_lens.training import Fixed, TrainingConfig, train

TASKS = ("addition", "composition", "text")
TRAINED = 4
"""Iterations in training, as in the paper's small models."""


@dataclass(frozen=True)
class Cell:
    """One model of the grid."""

    task: str  # one of TASKS
    norm: str = "pre"  # one of NORMS
    injection: str = "none"  # or "linear"
    core: int = 2  # blocks of the loop
    outer: int = 1  # blocks of the prelude, and of the coda
    recurrences: int = TRAINED  # iterations in training; 1 is a feed-forward model
    seed: int = 0  # of weights, data and initial states

    def __post_init__(self) -> None:
        require_one_of("task", self.task, TASKS)
        require_one_of("norm", self.norm, NORMS)
        require_one_of("injection", self.injection, ("linear", "none"))
        if self.core < 1 or self.outer < 0 or self.recurrences < 1:
            raise ValueError(
                f"{self}: a model needs at least one core layer, one iteration, and no negative sizes"
            )

    @property
    def looped(self) -> bool:
        """Whether its core runs more than once."""
        return self.recurrences > 1

    @property
    def name(self) -> str:
        """A name for folders and tables."""
        kind = f"{self.norm}-{self.injection}" if self.looped else "feedforward"
        outer = "" if self.outer == 1 or not self.looped else f"-outer{self.outer}"
        return f"{self.task}-{kind}-{self.core}{outer}-s{self.seed}"


@dataclass(frozen=True)
class Settings:
    """How the models of a grid are made, trained and measured."""

    width: int = 64  # d_model
    mlp: int = 128  # width of the gated MLP
    init: float = 0.06  # standard deviation of the initial weights
    level: int = 4  # of the synthetic task
    symbols: int = 5  # numbers modulo which addition adds, or symbols that composition permutes
    vocabulary: int = 1024  # tokens of the text's tokenizer
    window: int = 64  # tokens in a sequence of text
    steps: int = 300  # in training on the synthetic task
    text_steps: int = 400
    batch: int = 32  # sequences a step on the synthetic task
    text_batch: int = 8
    lr: float = 3e-3  # at its peak; a cosine brings it down to a tenth
    warmup: int = 50
    measuring: Measuring = field(default_factory=Measuring)

    def task(self, name: str) -> Task:
        """The task of that name."""
        if name == "text":
            return TextTask(vocab_size=self.vocabulary, window=self.window)
        if name == "addition":
            return AdditionTask(modulus=self.symbols)
        return CompositionTask(symbols=self.symbols)

    def build(self, cell: Cell, vocabulary: int) -> LoopedTransformer:
        """A cell's model with its initial weights."""
        torch.manual_seed(cell.seed)
        outer = cell.outer if cell.looped else 0
        config = LoopedConfig(
            vocab_size=vocabulary,
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_attention_heads=4,
            prelude_layers=outer,
            core_layers=cell.core + 2 * (cell.outer - outer),
            coda_layers=outer,
            recurrences=cell.recurrences,
            injection=cell.injection,
            initial_state="noise" if cell.injection == "linear" else "prelude",
            initializer_range=self.init,
            **NORMS[cell.norm],
        )
        return LoopedTransformer(config)

    def training(self, cell: Cell) -> TrainingConfig:
        """How a cell is trained."""
        text = cell.task == "text"
        return TrainingConfig(
            steps=self.text_steps if text else self.steps,
            batch_size=self.text_batch if text else self.batch,
            lr=self.lr,
            warmup=self.warmup,
            schedule="cosine",
            final_lr=0.1,
            seed=cell.seed,
            recurrences=Fixed(cell.recurrences),
            level=1 if text else self.level,
            checkpoint_every=100,
        )


def grid(task: str = "addition", *, cores: Sequence[int] = (2, 4), seed: int = 0) -> list[Cell]:
    """The cells: injection x norm x block size on a synthetic task and on text, and what text needs besides.

    On text there are the pre-norm models without prelude and coda, two feed-forward references of six layers that
    differ by seed, and the largest pre-norm models with another seed.
    """
    if task == "text":
        raise ValueError("text is always in the grid: choose a synthetic task, addition or composition")
    if not cores:
        raise ValueError("cores is empty: give at least one block size")
    most = max(cores)

    def main(name: str, largest: bool) -> list[Cell]:
        sizes = (core for core in sorted(cores) if (core == most) == largest)
        return [
            Cell(name, norm, injection, core, seed=seed)
            for core, norm, injection in product(sizes, NORMS, ("linear", "none"))
        ]

    bare = [Cell("text", core=core, outer=0, seed=seed) for core in sorted(cores, reverse=True)]
    # What the verdicts need first comes first: a run may be reported before it is whole.
    return [
        Cell("text", core=4, recurrences=1, seed=seed),
        *main(task, largest=False),
        *main("text", largest=True),
        bare[0],
        *main(task, largest=True),
        *main("text", largest=False),
        *bare[1:],
        Cell("text", core=4, recurrences=1, seed=seed + 1),
        *(Cell("text", "pre", injection, most, seed=seed + 1) for injection in ("none", "linear")),
        Cell("text", core=most, outer=0, seed=seed + 1),
    ]


def run_grid(
    cells: Sequence[Cell], settings: Settings, folder: Path, *, progress: bool = True
) -> dict[Cell, CellResult]:
    """Train and measure cells in order; a run that was killed goes on where it was.

    A cell that was measured in another way is measured again, not trained again.
    """
    for cell in cells:
        _require_same(folder / cell.name, cell, settings)
    tasks = {name: settings.task(name) for name in dict.fromkeys(cell.task for cell in cells)}

    def measure(cell: Cell) -> CellResult:
        task, training = tasks[cell.task], settings.training(cell)
        model = settings.build(cell, task.vocab_size)
        result = train(model, task, training, folder=folder / cell.name / "run", progress=progress)
        initial = settings.build(cell, task.vocab_size)
        tested = settings.measuring.batch(task, training.level)
        return measure_cell(result.model, initial, tested, result.log, settings.measuring, progress=progress)

    return grid_run.run_grid(cells, measure, _kept(folder, settings), progress=progress)


def finished(cells: Sequence[Cell], settings: Settings, folder: Path) -> dict[Cell, CellResult]:
    """What is measured already, nothing else."""
    kept = _kept(folder, settings)
    results = {cell: result for cell in cells if (result := kept.load(cell)) is not None}
    if not results:
        raise ValueError(f"{folder} holds no measured cell of this grid: run it first")
    for cell in results:
        _require_same(folder / cell.name, cell, settings)
    return results


def _kept(folder: Path, settings: Settings) -> grid_run.Kept[CellResult]:
    return grid_run.Kept(folder, CellResult, settings.measuring)


_ON_TEXT = ("vocabulary", "window", "text_steps", "text_batch")
_SYNTHETIC = ("level", "symbols", "steps", "batch")


def _require_same(folder: Path, cell: Cell, settings: Settings) -> None:
    """Raise unless a folder's model is made and trained as these settings say."""
    path = folder / "settings.json"
    own = {**asdict(cell), **asdict(settings)}
    for unused in ("measuring", *(_SYNTHETIC if cell.task == "text" else _ON_TEXT)):
        del own[unused]
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(own, indent=1))
        return
    before: dict[str, Any] = json.loads(path.read_text())
    other = ", ".join(
        f"{key} was {before.get(key)}, now {own.get(key)}"
        for key in {**before, **own}
        if before.get(key) != own.get(key)
    )
    if other:
        raise ValueError(
            f"{folder} holds this model under other settings ({other}): choose another work folder, or delete this one"
        )
