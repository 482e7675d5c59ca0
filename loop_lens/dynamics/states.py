"""What measurements of loops share: the loop's iterations, every layer's stream, and the state between iterations."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import pandas as pd
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.bridge.names import find_sites
from loop_lens.figures.lines import line_figure
from loop_lens.measuring.collecting import CollectingProbe, R, all_finite, diverged, first_diverged
from loop_lens.measuring.moments import DivergedError, Measured
from loop_lens.prompts.reader import Batch
from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.sites import Site
from loop_lens.unrolling.tree import Iteration

STATE = "state"
"""The label, among layers, of the state that leaves an iteration."""
Column = int | str
_DOTTED = {"color": "gray", "linestyle": ":"}


def named(layer: Column) -> str:
    """A layer in a legend."""
    return layer if isinstance(layer, str) else f"layer {layer}"


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

    def _by_layer(self, metric: str, more: Mapping[str, Tensor] | None = None, **options: Any) -> Any:
        """One line per layer, with one prompt spread around it; more lines are dotted; a figure."""
        values, spread = self.mean(metric), self.std(metric, over="prompts")
        high = values + spread
        # On a logarithmic axis the band is as wide below as above, so that it never falls to zero.
        low = values**2 / high if options.get("log") else values - spread
        names, more = [named(layer) for layer in self.layers], more or {}
        return line_figure(
            dict(zip(names, values.T, strict=True)) | dict(more),
            ylabel=metric,
            bands=dict(zip(names, zip(low.T, high.T, strict=True), strict=True)),
            styles={STATE: {"color": "black", "linestyle": "--"}, **{name: _DOTTED for name in more}},
            **options,
        )


class LoopProbe(CollectingProbe[R]):
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
        self._model = model
        self._row: dict[Iteration, int] = {t: i for i, t in enumerate(self.iterations)}

    def wants(self, site: Site) -> bool:
        """The loop's own sites."""
        return site.segment == self.segment

    def begin(self, batch: Batch, reference: Mapping[Site, Tensor]) -> None:
        """Start a batch.

        Raises:
            DivergedError: If the reference run diverged; names its first iteration that did.
        """
        super().begin(batch, reference)
        self.before: dict[Any, Any] = {}
        """What the next values are compared with."""
        for site, value in reference.items():
            if not bool(all_finite(value, self.mask)):
                self._raise_diverged(batch, site)

    def _raise_diverged(self, batch: Batch, site: Site) -> None:
        model, loops = self._model, cast(Schedule, site.schedule).loops
        with model.at_recurrences(**{name: loop.times for name, loop in loops.items()}):
            sites = [each for hook in self.hooks for each in find_sites(model, hook, segment=self.segment)]
            first = first_diverged(model, batch.tokens, batch.mask, sites) or site
            run = f" in the reference run of {model.recurrences} iterations"
        raise DivergedError(diverged(f"at {self.place(first)}", run))

    def cell(self, site: Site) -> tuple[int, int]:
        """Where a site is among iterations and layers; the state comes after the last layer."""
        return self._row[site.iteration], self.column(site)

    def column(self, site: Site) -> int:
        """Where a site is among layers."""
        return self.n_layers if site.layer is None else site.layer

    def place(self, site: Site) -> str:
        """What a site is called in errors."""
        layer = STATE if site.layer is None else f"layer {site.layer}"
        return f"iteration {site.iteration}, {layer}"

    def end(self) -> None:
        """Add the batch up."""
        self.before = {}
        super().end()


class StateProbe(LoopProbe[R]):
    """Base of probes that see the outputs of a loop's blocks, and the state between iterations.

    The state leaves an iteration behind the loop's norm, where there is one, so it may differ from the last
    layer's output.
    """

    hooks = ("resid_post", "state_out")

    def __init__(self, model: HookedLoopedTransformer, *, segment: str | None, least: int, what: str) -> None:
        super().__init__(model, segment=segment, least=least, what=what)
        self.columns: tuple[Column, ...] = (*range(self.n_layers), STATE)


@contextmanager
def starting_from(model: HookedLoopedTransformer, state: Any) -> Generator[None, None, None]:
    """Start from another initial state, where the model leaves the choice."""
    own = model.initial_state
    if own is None:
        yield
        return
    model.initial_state = state
    try:
        yield
    finally:
        model.initial_state = own


def tidy(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose column ``layer`` holds layers and `STATE`: numbers (missing at the state) and ``site``."""
    at_state = table["layer"] == STATE
    place = table.columns.get_loc("layer")
    assert isinstance(place, int)
    table.insert(place + 1, "site", ["state_out" if state else "resid_post" for state in at_state])
    return table.assign(layer=table["layer"].where(~at_state, None).astype("Int64"))
