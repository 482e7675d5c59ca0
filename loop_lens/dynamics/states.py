"""What the measurements of trajectories share: every layer's stream, and the state between iterations."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pandas as pd
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.measuring.moments import DivergedError
from loop_lens.measuring.probe import Ends
from loop_lens.measuring.run import measure
from loop_lens.prompts.reader import Batch
from loop_lens.unrolling.sites import Firing
from loop_lens.unrolling.tree import Iteration

STATE = "state"
"""The label, among layers, of the state that leaves an iteration."""
Column = int | str


class StateProbe:
    """Sees, in a run of `loop_lens.measuring.measure`, the outputs of a loop's blocks and its state.

    The state leaves an iteration behind the loop's norm, where there is one, so it may differ from the last
    layer's output. Subclasses say in `take` what they do with them.

    Args:
        model: The model, at the number of iterations to measure.
        segment: The loop; the innermost by default.
        least: How many iterations the measurement needs.
        what: Its name, for errors.

    Raises:
        ValueError: If the segment does not loop, or runs fewer iterations.
    """

    hooks: tuple[str, ...] = ("resid_post",)

    def __init__(self, model: HookedLoopedTransformer, *, segment: str | None, least: int, what: str) -> None:
        schedule = model.schedule
        self.model = model
        self.segment = segment or schedule.innermost_loop
        schedule.require_segment(self.segment)
        if self.segment not in schedule.loops:
            raise ValueError(
                f"{what} is about loops, and {self.segment!r} does not loop: the loops are "
                f"{', '.join(schedule.loops)}"
            )
        self.iterations = tuple(schedule.iterations(self.segment))
        if len(self.iterations) < least:
            raise ValueError(
                f"{what} needs at least {least} iterations, and {self.segment!r} runs {len(self.iterations)}: "
                f"set_recurrences({least}) or more"
            )
        self.n_layers = schedule.segments.get(self.segment, 0)
        self.columns: tuple[Column, ...] = (*range(self.n_layers), STATE)
        self._at: dict[Iteration, int] = {t: i for i, t in enumerate(self.iterations)}
        self._running = False

    def wants(self, hook: str, firing: Firing) -> bool:
        """The loop's own blocks."""
        return firing.segment == self.segment

    def begin(self, batch: Batch, ends: Ends) -> None:
        """Start a batch."""
        self.mask, self._running = batch.mask, True

    def see(self, hook: str, firing: Firing, value: Tensor) -> None:
        """A block's output."""
        self.take(self._at[firing.iteration], firing.layer, value)

    def take(self, i: int, column: int, value: Tensor) -> None:
        """What leaves a layer, or (at the last column) the iteration, [prompt pos d_model]."""
        raise NotImplementedError

    def end(self) -> None:
        """Finish a batch."""
        self._running = False

    @contextmanager
    def listening(self) -> Generator[None, None, None]:
        """Also see the states between iterations, which ``measure`` has no name for."""

        def listener(i: int) -> Any:
            def hear(value: Tensor, hook: Any) -> None:
                if self._running:
                    self.take(i, self.n_layers, value)

            return hear

        names = self.model.names("state_out", segment=self.segment)
        with self.model.hooks(fwd_hooks=[(name, listener(i)) for i, name in enumerate(names)]):
            yield

    def run(self, prompts: Any, *, batch_size: int, progress: bool, what: str) -> None:
        """Measure prompts."""
        with self.listening():
            measure(self.model, prompts, [self], batch_size=batch_size, progress=progress, what=what)

    def require_finite(self, finite: Tensor) -> None:
        """Raise `DivergedError` unless all values [iteration column] were finite; names the first."""
        if bool(finite.all()):
            return
        i, column = (int(k) for k in (~finite).nonzero()[0])
        where = f"layer {column}" if column < self.n_layers else "its state"
        raise DivergedError(
            f"values became NaN or infinite, first at iteration {self.iterations[i]}, {where}: fewer "
            "iterations, a wider dtype, or other weights are needed"
        )


def tidy(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose column ``layer`` holds layers and `STATE`: numbers (missing at the state) and ``site``."""
    at_state = table["layer"] == STATE
    place = table.columns.get_loc("layer")
    assert isinstance(place, int)
    table.insert(place + 1, "site", ["state_out" if state else "resid_post" for state in at_state])
    return table.assign(layer=table["layer"].where(~at_state, None).astype("Int64"))
