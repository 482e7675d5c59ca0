"""What the measurements of trajectories share: every layer's stream, and the state between iterations."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.measuring.moments import DivergedError, Measured
from loop_lens.measuring.probe import Probe
from loop_lens.prompts.reader import Batch
from loop_lens.unrolling.sites import Site
from loop_lens.unrolling.tree import Iteration

STATE = "state"
"""The label, among layers, of the state that leaves an iteration."""
Column = int | str


class LoopMeasured(Measured):
    """Base of results whose cells are a loop's iterations and layers."""

    @property
    def iterations(self) -> tuple[Iteration, ...]:
        """The loop's iterations, in order."""
        return self.moments.axes["iteration"]

    @property
    def layers(self) -> tuple[Column, ...]:
        """The loop's layers; where the state between iterations was measured, ``"state"`` comes last."""
        return self.moments.axes["layer"]


class LoopProbe(Probe):
    """Base of probes of one loop's iterations.

    Args:
        model: The model, at the number of iterations to measure.
        segment: The loop; the innermost by default.
        least: How many iterations the measurement needs.
        what: Its name, for errors.

    Raises:
        ValueError: If the segment does not loop, or runs fewer iterations.
    """

    def __init__(self, model: HookedLoopedTransformer, *, segment: str | None, least: int, what: str) -> None:
        schedule = model.schedule
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
        self._row: dict[Iteration, int] = {t: i for i, t in enumerate(self.iterations)}

    def wants(self, site: Site) -> bool:
        """The loop's own sites."""
        return site.segment == self.segment


def layer_of(site: Site) -> int:
    """The layer of a site within a block."""
    assert site.layer is not None, f"{site.name} lies between blocks"
    return site.layer


class StateProbe(LoopProbe):
    """Base of probes that see the outputs of a loop's blocks, and the state between iterations.

    The state leaves an iteration behind the loop's norm, where there is one, so it may differ from the last
    layer's output. Subclasses say in `take` what they do with them.
    """

    hooks = ("resid_post", "state_out")

    def __init__(self, model: HookedLoopedTransformer, *, segment: str | None, least: int, what: str) -> None:
        super().__init__(model, segment=segment, least=least, what=what)
        self.columns: tuple[Column, ...] = (*range(self.n_layers), STATE)

    def begin(self, batch: Batch, reference: Mapping[Site, Tensor]) -> None:
        """Start a batch."""
        self.mask = batch.mask

    def column(self, site: Site) -> int:
        """Where a site is among ``columns``."""
        return self.n_layers if site.layer is None else site.layer

    def see(self, site: Site, value: Tensor) -> None:
        """A block's output, or the state."""
        self.take(self._row[site.iteration], self.column(site), value)

    def take(self, i: int, column: int, value: Tensor) -> None:
        """What leaves a layer, or (at the last column) the iteration, [prompt pos d_model]."""
        raise NotImplementedError

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
