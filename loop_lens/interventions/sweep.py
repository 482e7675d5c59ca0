"""Activation patching over iterations, layers, positions and heads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.bridge.names import InjectionSite, find_sites, hook_of, n_heads
from loop_lens.figures.canvas import new_figure
from loop_lens.figures.heatmap import draw_heatmap
from loop_lens.interventions.engine import Abilities, Engine, Hooks
from loop_lens.interventions.metrics import Metric, MetricLike, bind, per_prompt
from loop_lens.interventions.plan import Batch, Cell, pack
from loop_lens.prompts.reader import read_together
from loop_lens.prompts.tokens import words_of
from loop_lens.unrolling.sites import Layout, Site

AXES = ("iteration", "layer", "position", "head", "firing")
Direction = Literal["denoising", "noising"]


@dataclass(frozen=True)
class SweepResult:
    """A metric under each intervention of a sweep.

    Attributes:
        values: The metric, averaged over prompts, of each cell: one dimension per axis. NaN where a
            sweep was interrupted before.
        axes: Names of the dimensions, in order.
        labels: What stands along each axis: iterations, layers, heads, firings as numbers, positions
            as ``(position, token)``.
        clean: The metric of the clean run.
        corrupted: The metric of the corrupted run.
        site: The kind of site.
        direction: ``"denoising"`` (the corrupted run receives clean values) or ``"noising"``.
        per_prompt: The metric of each prompt [*axes prompt], None where the metric gives one number
            for the batch.
        method: ``"patching"``, or how it was estimated.
    """

    values: Tensor
    axes: tuple[str, ...]
    labels: dict[str, tuple[Any, ...]]
    clean: float
    corrupted: float
    site: str
    direction: str = "denoising"
    per_prompt: Tensor | None = None
    method: str = "patching"

    @property
    def base(self) -> float:
        """The metric of the run that received values."""
        return self.corrupted if self.direction == "denoising" else self.clean

    @property
    def donor(self) -> float:
        """The metric of the run that gave values."""
        return self.clean if self.direction == "denoising" else self.corrupted

    @property
    def effect(self) -> Tensor:
        """Change of the metric by each intervention [*axes]."""
        return self.values - self.base

    @property
    def recovered(self) -> Tensor:
        """Share of the way from the base run to the donor run [*axes]: 0 for nothing, 1 for all."""
        return self.effect / (self.donor - self.base)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: its place on each axis, value, effect and share recovered.

        Positions have a column ``token`` beside them.
        """
        rows: list[dict[str, Any]] = []
        columns = (self.values, self.effect, self.recovered)
        flat = [column.reshape(-1).tolist() for column in columns]
        for place, value, effect, share in zip(self._places(), *flat, strict=True):
            rows.append({**place, "value": value, "effect": effect, "recovered": share})
        return pd.DataFrame(rows)

    def _places(self) -> Iterable[dict[str, Any]]:
        for labels in itertools.product(*(self.labels[axis] for axis in self.axes)):
            place: dict[str, Any] = {}
            for axis, label in zip(self.axes, labels, strict=True):
                if axis == "position":
                    place["position"], place["token"] = label
                else:
                    place[axis] = label
            yield place

    def plot(self, *, what: Literal["effect", "recovered", "value"] = "effect") -> Any:
        """Heat maps of the last two axes, one for each place on the axes before them.

        Returns:
            A matplotlib figure, not shown.
        """
        grid = {"effect": self.effect, "recovered": self.recovered, "value": self.values}[what]
        grid = grid.detach().float().cpu()
        shown = self.axes if len(self.axes) > 1 else ("", *self.axes)
        if len(self.axes) == 1:
            grid = grid.unsqueeze(0)
        *outer, row_axis, column_axis = shown
        panels = list(itertools.product(*(range(len(self.labels[axis])) for axis in outer)))
        columns = min(len(panels), 4)
        rows = -(-len(panels) // columns)
        height, width = (0.28 * max(4, min(n, 24)) + 1.1 for n in grid.shape[-2:])
        figure, axes = new_figure(
            columns * max(3.0, width), rows * max(1.8, height), rows, columns, squeeze=False, sharey=True
        )
        reach = float(grid.nan_to_num().abs().max()) or 1.0
        image = None
        for panel, place in zip(axes.flat, panels, strict=False):
            image = draw_heatmap(
                panel,
                grid[place],
                rows=self._ticks(row_axis),
                columns=self._ticks(column_axis),
                row_name=row_axis,
                column_name=column_axis,
                limit=reach,
            )
            panel.set_title(", ".join(f"{a} {self._ticks(a)[i]}" for a, i in zip(outer, place, strict=True)))
        for panel in list(axes.flat)[len(panels) :]:
            panel.remove()
        names = {"effect": "change of the metric", "recovered": "share recovered", "value": "metric"}
        figure.colorbar(image, ax=axes, label=names[what])
        figure.suptitle(f"{self.site}, {self.direction} ({self.method})")
        return figure

    def _ticks(self, axis: str) -> list[str]:
        if not axis:
            return [""]
        if axis == "position":
            return [f"{token} {position}" for position, token in self.labels[axis]]
        return [str(label) for label in self.labels[axis]]


@dataclass(frozen=True)
class Prompts:
    """Two runs to compare, checked.

    Attributes:
        clean: Tokens [prompt pos].
        corrupted: Tokens [prompt pos].
        direction: Which of them receives values.
        words: The receiver's first prompt, token by token.
    """

    clean: Tensor
    corrupted: Tensor
    direction: Direction
    words: tuple[str, ...]

    @property
    def base(self) -> Tensor:
        """The tokens of the run that receives values."""
        return self.corrupted if self.direction == "denoising" else self.clean

    @property
    def donor(self) -> Tensor:
        """The tokens of the run that gives values."""
        return self.clean if self.direction == "denoising" else self.corrupted

    def by_role(self, base: float, donor: float) -> tuple[float, float]:
        """Two runs' metrics as those of the clean and of the corrupted run."""
        return (donor, base) if self.direction == "denoising" else (base, donor)

    @property
    def first_difference(self) -> int:
        """First position at which any prompt's two versions differ, the length if none does."""
        differs = (self.clean != self.corrupted).any(0).nonzero()
        return int(differs[0]) if len(differs) else self.clean.shape[1]

    @classmethod
    def of(cls, model: HookedLoopedTransformer, clean: Any, corrupted: Any, direction: Direction) -> Prompts:
        """Check two batches of prompts.

        Raises:
            ValueError: If they do not pair up, token by token.
        """
        if direction not in ("denoising", "noising"):
            raise ValueError(f"direction {direction!r} is unknown: choose 'denoising' or 'noising'")
        tokens = [
            read_together(model, prompts, name)
            for prompts, name in ((clean, "clean"), (corrupted, "corrupted"))
        ]
        if len(tokens[0]) != len(tokens[1]):
            raise ValueError(f"{len(tokens[0])} clean and {len(tokens[1])} corrupted prompts do not pair up")
        if tokens[0].shape[1] != tokens[1].shape[1]:
            raise ValueError(
                f"the clean prompts have {tokens[0].shape[1]} tokens and the corrupted ones "
                f"{tokens[1].shape[1]}: a patch goes from a position to the same position, so give prompts "
                "of equal length"
            )
        base = tokens[1] if direction == "denoising" else tokens[0]
        return cls(tokens[0], tokens[1], direction, words_of(model, base[0]))


@dataclass(frozen=True)
class Grid:
    """The cells of a sweep.

    Attributes:
        axes: Names of the dimensions.
        labels: What stands along each.
        shape: Their lengths.
        places: For each cell its index, its spots, its position and its head.
        layout: How the site's values are indexed.
    """

    axes: tuple[str, ...]
    labels: dict[str, tuple[Any, ...]]
    shape: tuple[int, ...]
    places: list[tuple[tuple[int, ...], tuple[Site, ...], int | None, int | None]]
    layout: Layout

    @property
    def spots(self) -> list[Site]:
        """Every spot that any cell touches, once."""
        return list(dict.fromkeys(spot for _, spots, _, _ in self.places for spot in spots))

    @classmethod
    def of(
        cls,
        model: HookedLoopedTransformer,
        site: str,
        over: str | Sequence[str],
        words: Sequence[str],
        *,
        iterations: Any,
        layers: Any,
        positions: Sequence[int] | None,
        heads: Sequence[int] | None,
        segment: str | None,
    ) -> Grid:
        """Lay out a sweep.

        Raises:
            ValueError: If the site has no such axis.
            UnknownNameError: If the model has no such site, iteration, layer.
        """
        axes = (over,) if isinstance(over, str) else tuple(over)
        _require_axes(axes)
        hook, between = hook_of(model, site)
        if between and "layer" in axes:
            raise ValueError(f"the site {site!r} lies between blocks: it has no layers to sweep over")
        if "firing" in axes:
            if between or iterations is not None or layers is not None or segment is not None:
                raise ValueError("over='firing' takes every block of every segment: choose nothing else")
            found = [model.locate(name) for name in model.names(hook)]
        else:
            found = find_sites(model, site, iteration=iterations, layer=layers, segment=segment)
        layout = found[0].layout
        groups: dict[str, dict[Any, list[Site]]] = {
            "iteration": _group(found, lambda s: s.place.iteration),
            "layer": _group(found, lambda s: getattr(s.place, "layer", None)),
            "firing": _group(found, lambda s: getattr(s.place, "index", None)),
        }
        if "iteration" in axes and list(groups["iteration"]) == [None]:
            raise ValueError(
                f"the site {site!r} is outside the loop here: it has no iterations to sweep over"
            )
        chosen_positions = _chosen(positions, len(words), "position", "the prompts have positions")
        if layout == "stream" and (heads is not None or "head" in axes):
            raise ValueError(f"the site {site!r} has no heads: sites with heads are z, q, k, v, pattern")
        chosen_heads = (
            [] if layout == "stream" else _chosen(heads, n_heads(model, hook), "head", "the site has heads")
        )
        values: dict[str, list[Any]] = {
            "iteration": list(groups["iteration"]),
            "layer": list(groups["layer"]),
            "firing": list(groups["firing"]),
            "position": chosen_positions,
            "head": chosen_heads,
        }
        if ("position" not in axes and positions is not None) or ("head" not in axes and heads is not None):
            raise ValueError("positions and heads choose along an axis: name that axis in over=")
        shape = tuple(len(values[axis]) for axis in axes)
        places: list[tuple[tuple[int, ...], tuple[Site, ...], int | None, int | None]] = []
        for index in itertools.product(*(range(n) for n in shape)):
            picked = {axis: values[axis][i] for axis, i in zip(axes, index, strict=True)}
            own = tuple(
                s for s in found if all(s in groups[axis][picked[axis]] for axis in groups if axis in picked)
            )
            places.append((index, own, picked.get("position"), picked.get("head")))
        labels = {axis: tuple(values[axis]) for axis in axes}
        if "position" in axes:
            labels["position"] = tuple((p, words[p]) for p in chosen_positions)
        return cls(axes, labels, shape, places, layout)


def _group(found: Sequence[Site], key: Callable[[Site], Any]) -> dict[Any, list[Site]]:
    groups: dict[Any, list[Site]] = {}
    for one in found:
        groups.setdefault(key(one), []).append(one)
    return groups


def _require_axes(axes: tuple[str, ...]) -> None:
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown:
        raise ValueError(f"axis {unknown[0]!r} is unknown: sweep over any of {', '.join(AXES)}")
    if not axes or len(set(axes)) != len(axes):
        raise ValueError("over= must name each axis once, and at least one")
    if "firing" in axes and ({"iteration", "layer"} & set(axes)):
        raise ValueError("a firing is an iteration and a layer already: sweep over 'firing' alone")


def _chosen(wanted: Sequence[int] | None, n: int, what: str, there_are: str) -> list[int]:
    if wanted is None:
        return list(range(n))
    outside = [i for i in wanted if not -n <= i < n]
    if outside:
        raise ValueError(f"{what} {outside[0]} does not exist: {there_are} 0-{n - 1}")
    return [i % n for i in wanted]


@torch.no_grad()
def patch_sweep(
    model: HookedLoopedTransformer,
    clean: Any,
    corrupted: Any,
    metric: MetricLike,
    *,
    site: str,
    over: str | Sequence[str] = ("iteration", "layer", "position"),
    direction: Direction = "denoising",
    iterations: Any = None,
    layers: Any = None,
    positions: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    segment: str | None = None,
    memory_budget: int = 1 << 30,
    progress: bool = True,
) -> SweepResult:
    """Activation patching: how the metric changes when one run gets another's value at one place.

    Gives what one whole forward per cell would give, as ``transformer_lens.patching`` runs them, but
    computes only what a patch can change: from the patched firing on, and in causal models from the
    patched position on, many cells at a time. Edits in force on the model (`loop_lens.interventions`)
    hold in every run; with other hooks on the model, or iterations in another order, every cell runs
    by itself and whole.

    Args:
        model: The model.
        clean: Text, texts, or tokens [prompt pos] of the clean run.
        corrupted: The same of the corrupted run, of equal length.
        metric: A function of logits [prompt pos vocab] that returns a number, or one per prompt; or one
            of `LogitDiff`, `Probability`, `KL`, `Rank`, `NextTokenLoss`.
        site: ``"resid_pre"``, ``"resid_mid"``, ``"resid_post"``, ``"attn_out"``, ``"mlp_out"``, ``"z"``,
            ``"q"``, ``"k"``, ``"v"``, ``"pattern"`` (positions are queries) or any other of the blocks'
            hooks; between blocks ``"state"`` (enters an iteration), ``"state_out"``, ``"injected"`` (the
            state after injection) and ``"injection"`` (what is injected, into the state as it is).
        over: The axes: any of ``"iteration"``, ``"layer"``, ``"position"``, ``"head"``, or ``"firing"`` for
            all blocks of all segments. What is not an axis is patched all at once.
        direction: ``"denoising"``: the corrupted run receives clean values, as in
            ``transformer_lens.patching``. ``"noising"``: the clean run receives corrupted ones.
        iterations: Iterations to sweep; all by default.
        layers: Layers to sweep; all by default.
        positions: Positions to sweep, negative ones from the end; all by default.
        heads: Heads to sweep; all by default.
        segment: Segment; the innermost loop by default.
        memory_budget: Bytes that the patched forwards may take beyond weights and the two plain runs.
        progress: Whether to show a progress bar, for sweeps beyond two seconds.

    Returns:
        The values on a grid, with labels and the plain runs' metrics.

    Raises:
        ValueError: If prompts, axes or the metric's result do not fit.
        UnknownNameError: If the model has no such site, iteration or layer.
        BaseException: Whatever stops the sweep half-way, KeyboardInterrupt included, carries the
            finished part as ``error.partial``, with NaN for the rest.
    """
    measure = bind(metric, model)
    prompts = Prompts.of(model, clean, corrupted, direction)
    grid = Grid.of(
        model,
        site,
        over,
        prompts.words,
        iterations=iterations,
        layers=layers,
        positions=positions,
        heads=heads,
        segment=segment,
    )
    if memory_budget <= 0:
        raise ValueError(f"memory_budget is {memory_budget} bytes: give a positive number")
    sweep = _Sweep(model, prompts, measure, grid, site, memory_budget, progress)
    return sweep.run()


@dataclass
class _Sweep:
    """One sweep under way."""

    model: HookedLoopedTransformer
    prompts: Prompts
    measure: MetricLike
    grid: Grid
    site: str
    memory_budget: int
    progress: bool
    values: Tensor = field(init=False)
    each: Tensor | None = field(init=False, default=None)
    plain: dict[str, float] = field(init=False, default_factory=dict[str, float])
    donors: dict[str, Tensor] = field(init=False, default_factory=dict[str, Tensor])

    def run(self) -> SweepResult:
        """Run everything."""
        self._measure_donor()
        abilities = Abilities.of(self.model)
        engine = Engine(self.model, self.prompts.base, abilities)
        cells = [self._cell(engine, *place) for place in self.grid.places]
        engine.run_base(cell.start for cell in cells)
        base, several = per_prompt(self.measure(engine.logits), engine.n_prompts)
        self._note_base(base, several)
        same = [c for c in cells if c.offset >= engine.n_positions]
        for cell in same:
            self._store(cell.index, base)
        rest = [cell for cell in cells if cell.offset < engine.n_positions]
        reads = self.measure.where(engine.n_positions) if isinstance(self.measure, Metric) else None
        limit = engine.max_tokens(self.memory_budget, all_logits=reads is None)
        early = engine.joins_from()
        batches = [
            batch
            for joins in (False, True)
            for batch in pack(
                [cell for cell in rest if (cell.start >= early) == joins],
                n_firings=len(self.model.schedule),
                n_positions=engine.n_positions,
                n_prompts=engine.n_prompts,
                max_tokens=limit if abilities.batched else 1,
                joins=joins,
            )
        ]
        try:
            with tqdm(
                total=len(rest), desc="patching", delay=2, disable=not self.progress, leave=False
            ) as bar:
                for batch in batches:
                    self._run_batch(engine, batch, reads)
                    bar.update(len(batch.cells))
        except BaseException as error:
            error.partial = self._result()  # type: ignore[attr-defined]
            error.add_note("The finished part of the sweep is in this exception's attribute partial.")
            raise
        return self._result()

    def _measure_donor(self) -> None:
        names = [one.flat for one in self.grid.spots]
        if any(isinstance(one, InjectionSite) for one in self.grid.spots):
            names += [one.sibling("state_in").flat for one in self.grid.spots] + ["hook_prelude_out"]
        logits, cache = self.model.run_with_cache(self.prompts.donor, names_filter=names)
        value, _ = per_prompt(self.measure(logits), len(self.prompts.donor))
        self.plain["donor"] = float(value.float().mean())
        for one in self.grid.spots:
            given = cache[one.flat]
            if isinstance(one, InjectionSite):
                state = cache[one.sibling("state_in").flat]
                given = self.model.body.injection(state, given, cache["hook_prelude_out"])
            self.donors[one.flat] = given

    def _note_base(self, base: Tensor, several: bool) -> None:
        self.plain["base"] = float(base.float().mean())
        self.values = torch.full(self.grid.shape, float("nan"))
        if several:
            self.each = torch.full((*self.grid.shape, len(base)), float("nan"))

    def _cell(
        self,
        engine: Engine,
        index: tuple[int, ...],
        spots: tuple[Site, ...],
        position: int | None,
        head: int | None,
    ) -> Cell:
        first = self.prompts.first_difference
        if not engine.abilities.cached:
            offset = 0
        elif position is not None and position < first:
            offset = engine.n_positions  # the two runs are the same there
        else:
            offset = max(position or 0, first)
        return Cell(index, spots, position, head, engine.start_of(spots), offset)

    def _run_batch(self, engine: Engine, batch: Batch, reads: int | None) -> None:
        n = engine.n_prompts
        if reads is not None and reads < batch.offset:
            base = self.measure(engine.logits)
            for cell in batch.cells:
                self._store(cell.index, per_prompt(base, n)[0])
            return
        logits = engine.run(batch, self._hooks(batch, n), position=reads)
        for k, cell in enumerate(batch.cells):
            own = logits[k * n : (k + 1) * n]
            if reads is not None and isinstance(self.measure, Metric):
                value = self.measure.at(own[:, 0])
            else:
                value = self.measure(engine.assembled(own, batch.offset))
            self._store(cell.index, per_prompt(value, n)[0])

    def _hooks(self, batch: Batch, n: int) -> Hooks:
        """One hook per site, which writes the donor's values into the rows of each cell there."""
        by_spot: dict[Site, list[tuple[int, Cell]]] = {}
        for k, cell in enumerate(batch.cells):
            for one in cell.spots:
                by_spot.setdefault(one, []).append((k, cell))
        hooks: Hooks = []
        for one, cells in by_spot.items():
            states: list[Tensor] = []
            if isinstance(one, InjectionSite):
                hooks.append((one.sibling("state_in").flat, _keep(states)))
            hooks.append((one.flat, self._writer(one, cells, batch.offset, n, states)))
        return hooks

    def _writer(
        self, one: Site, cells: list[tuple[int, Cell]], offset: int, n: int, states: list[Tensor]
    ) -> Callable[[Tensor, Any], Tensor]:
        donor, body = _from(self.donors[one.flat], one.layout, offset), self.model.body

        def write(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            for k, cell in cells:
                rows = slice(k * n, (k + 1) * n)
                given = body.inject(states[-1][rows], donor) if isinstance(one, InjectionSite) else donor
                where = _where(one.layout, cell.position, cell.head, offset)
                value[(rows, *where)] = given[(slice(None), *where)]
            return value

        return write

    def _store(self, index: tuple[int, ...], value: Tensor) -> None:
        self.values[index] = value.float().mean()
        if self.each is not None:
            self.each[index] = value.float()

    def _result(self) -> SweepResult:
        clean, corrupted = self.prompts.by_role(self.plain["base"], self.plain["donor"])
        return SweepResult(
            values=self.values,
            axes=self.grid.axes,
            labels=self.grid.labels,
            clean=clean,
            corrupted=corrupted,
            site=self.site,
            direction=self.prompts.direction,
            per_prompt=self.each,
        )


def _keep(states: list[Tensor]) -> Callable[[Tensor, Any], None]:
    def keep(value: Tensor, hook: Any) -> None:
        states.append(value.clone())

    return keep


def _from(values: Tensor, layout: Layout, offset: int) -> Tensor:
    """Values of the positions from an offset on."""
    return values[:, :, offset:] if layout == "pattern" else values[:, offset:]


def _where(layout: Layout, position: int | None, head: int | None, offset: int) -> tuple[slice, ...]:
    """The index, after the rows, of a position and a head in values from an offset on."""
    at = slice(None) if position is None else slice(position - offset, position - offset + 1)
    which = slice(None) if head is None else slice(head, head + 1)
    if layout == "pattern":
        return which, at
    return (at, which) if layout == "heads" else (at,)
