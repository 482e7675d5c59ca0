"""From easy to hard: the level of a task rises when the model has learnt the one before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loop_lens.unrolling.numbers import whole


@dataclass(frozen=True)
class Curriculum:
    """Levels in order, and when to go on.

    Attributes:
        levels: Levels of the task, one stage each.
        threshold: Mean accuracy over the last steps of a stage that ends it, 0 to 1.
        window: Number of steps to average over; a stage is never shorter.
        settle: Training ends this many steps after the last stage was passed; None to go on to the last
            step of `TrainingConfig.steps`.

    Example:
        >>> from loop_lens.training import Curriculum, TrainingConfig
        >>> config = TrainingConfig(steps=2000, curriculum=Curriculum((1, 2, 3), threshold=0.9, settle=200))
        >>> config.curriculum.levels
        (1, 2, 3)
    """

    levels: tuple[int, ...]
    threshold: float = 0.97
    window: int = 50
    settle: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(whole(level, "a level") for level in self.levels))
        object.__setattr__(self, "window", whole(self.window, "window", 1))
        if self.settle is not None:
            object.__setattr__(self, "settle", whole(self.settle, "settle", 0))
        if not self.levels or min(self.levels) < 1:
            raise ValueError(f"a curriculum needs levels of at least 1, got {self.levels}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {self.threshold}")


@dataclass
class CurriculumState:
    """Where a training stands in its curriculum.

    Attributes:
        stage: Index of the stage.
        passed: The number of steps done when each stage was passed.
        recent: Accuracies of the stage's last steps.
    """

    stage: int = 0
    passed: list[int] = field(default_factory=list[int])
    recent: list[float] = field(default_factory=list[float])

    def see(self, curriculum: Curriculum, accuracy: float, done: int) -> bool:
        """Take in one step's accuracy; returns whether a stage was passed.

        Args:
            curriculum: The rules.
            accuracy: Accuracy of the step, 0 to 1.
            done: Number of steps done, this one included.
        """
        if len(self.passed) == len(curriculum.levels):
            return False
        self.recent = (
            [*self.recent[-(curriculum.window - 1) :], accuracy] if curriculum.window > 1 else [accuracy]
        )
        if (
            len(self.recent) < curriculum.window
            or sum(self.recent) < curriculum.threshold * curriculum.window
        ):
            return False
        self.passed.append(done)
        self.stage = min(self.stage + 1, len(curriculum.levels) - 1)
        self.recent = []
        return True

    def end(self, curriculum: Curriculum | None, steps: int) -> int:
        """The number of steps after which training ends, as far as is known now."""
        if curriculum is None or curriculum.settle is None or len(self.passed) < len(curriculum.levels):
            return steps
        return min(steps, self.passed[-1] + curriculum.settle)

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"stage": self.stage, "passed": self.passed, "recent": self.recent}
