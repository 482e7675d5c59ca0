"""Activation patching over iterations, layers, positions and heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.bridge.names import InjectionSite
from loop_lens.interventions.claims import abilities_of
from loop_lens.interventions.engine import Engine, Hooks
from loop_lens.interventions.gradients import Estimate, estimate, require_gradient
from loop_lens.interventions.grid import Direction, Grid, Pair
from loop_lens.interventions.metrics import Metric, MetricLike, bind, per_prompt
from loop_lens.interventions.plan import Batch, Cell, pack
from loop_lens.interventions.results import SweepResult
from loop_lens.interventions.where import Where
from loop_lens.unrolling.sites import Layout, Site


def patch_sweep(
    model: HookedLoopedTransformer,
    clean: Any,
    corrupted: Any,
    metric: MetricLike,
    *,
    site: str,
    over: str | Sequence[str] = ("iteration", "layer", "position"),
    method: Literal["patch"] | Estimate = "patch",
    steps: int = 16,
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
        method: ``"patch"`` runs every cell. ``"attribution"`` and ``"integrated"`` estimate all cells from
            gradients, see `loop_lens.interventions.gradients`: the first from one forward and one backward,
            right to first order; the second along the straight line from the base's value to the donor's,
            so that its cells of one site add up to the effect of patching that site whole.
        steps: Points on that line, for ``"integrated"``.
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
        ValueError: If prompts, axes or the metric's result do not fit; if gradients are asked for of a metric
            or of a site (``resid_mid``, ``injection``) that has none.
        UnknownNameError: If the model has no such site, iteration or layer.
        BaseException: Whatever stops the sweep half-way, KeyboardInterrupt included, carries the
            finished part as ``error.partial``, with NaN for the rest.

    Source:
        Attribution patching: Nanda (2023), Syed et al., arXiv 2310.10348. Integrated gradients:
        Sundararajan et al., arXiv 1703.01365, applied to a site's value.

    Example:
        >>> from loop_lens.interventions import LogitDiff
        >>> other = "a c c b b a ? b -> -> ->"
        >>> metric = LogitDiff("c", "a", position=-3)
        >>> result = loop_lens.patch_sweep(model, prompt, other, metric, site="resid_post")
        >>> result.axes, result.recovered.shape
        (('iteration', 'layer', 'position'), torch.Size([8, 2, 11]))
    """
    if method != "patch":
        require_gradient(site, method, steps)
    measure = bind(metric, model)
    pair = Pair.of(model, clean, corrupted, direction)
    grid = Grid.of(model, site, over, pair.words, Where(iterations, layers, positions, heads, segment))
    if memory_budget <= 0:
        raise ValueError(f"memory_budget is {memory_budget} bytes: give a positive number")
    if method == "patch":
        return _patch(model, pair, measure, grid, site, memory_budget, progress)
    return estimate(model, pair, measure, grid, site, method, steps, progress)


@torch.no_grad()
def _patch(
    model: HookedLoopedTransformer,
    pair: Pair,
    measure: MetricLike,
    grid: Grid,
    site: str,
    memory_budget: int,
    progress: bool,
) -> SweepResult:
    # 1. The run that gives: its metric, and its values at every site of the grid.
    donor, given = _give(model, pair, measure, grid)
    # 2. The run that receives, kept by the engine where cells will start.
    engine = Engine(model, pair.base, abilities_of(model, pair.base))
    cells = [_cell(engine, pair, *place) for place in grid.places]
    engine.run_base(cell.start for cell in cells)
    base, several = per_prompt(measure(engine.logits), engine.n_prompts)
    table = _Table(grid, pair, site, base, donor, several)
    # 3. Cells that touch only what both runs have in common need no run.
    for cell in cells:
        if cell.offset >= engine.n_positions:
            table.store(cell.index, base)
    rest = [cell for cell in cells if cell.offset < engine.n_positions]
    # 4. The others in batches, each of one forward from its first firing and position on.
    batches = _pack(engine, rest, memory_budget, measure)
    runner = _Runner(engine, measure, given, table)
    try:
        with tqdm(total=len(rest), desc="patching", delay=2, disable=not progress, leave=False) as bar:
            for batch in batches:
                runner.run(batch)
                bar.update(len(batch.cells))
    except BaseException as error:
        error.partial = table.result()  # type: ignore[attr-defined]
        error.add_note("The finished part of the sweep is in this exception's attribute partial.")
        raise
    # 5. The values on the grid.
    return table.result()


def _give(
    model: HookedLoopedTransformer, pair: Pair, measure: MetricLike, grid: Grid
) -> tuple[float, dict[Site, Tensor]]:
    """The donor's metric, and what it gives at each site."""
    sites = grid.sites
    injections = [site for site in sites if isinstance(site, InjectionSite)]
    names = [site.flat for site in sites]
    if injections:
        names += [site.sibling("state_in").flat for site in injections] + ["hook_prelude_out"]
    logits, cache = model.run_with_cache(pair.donor, names_filter=names)
    given: dict[Site, Tensor] = {site: cache[site.flat] for site in sites}
    for site in injections:
        state = cache[site.sibling("state_in").flat]
        given[site] = model.body.injection(state, given[site], cache["hook_prelude_out"])
    value, _ = per_prompt(measure(logits), len(pair.donor))
    return float(value.float().mean()), given


def _cell(
    engine: Engine,
    pair: Pair,
    index: tuple[int, ...],
    sites: tuple[Site, ...],
    position: int | None,
    head: int | None,
) -> Cell:
    first = pair.first_difference
    if not engine.abilities.cached:
        offset = 0
    elif position is not None and position < first:
        offset = engine.n_positions  # the two runs are the same there
    else:
        offset = max(position or 0, first)
    return Cell(index, sites, position, head, engine.start_of(sites), offset)


def _pack(engine: Engine, cells: Sequence[Cell], memory_budget: int, measure: MetricLike) -> list[Batch]:
    limit = engine.max_tokens(memory_budget, all_logits=not isinstance(measure, Metric))
    early = engine.joins_from()
    return [
        batch
        for joins in (False, True)
        for batch in pack(
            [cell for cell in cells if (cell.start >= early) == joins],
            n_firings=len(engine.model.schedule),
            n_positions=engine.n_positions,
            n_prompts=engine.n_prompts,
            max_tokens=limit if engine.abilities.batched else 1,
            joins=joins,
        )
    ]


class _Table:
    """The values of a sweep under way."""

    def __init__(self, grid: Grid, pair: Pair, site: str, base: Tensor, donor: float, several: bool) -> None:
        self.grid, self.pair, self.site, self.donor = grid, pair, site, donor
        self.base = float(base.float().mean())
        self.values = torch.full(grid.shape, float("nan"))
        self.each = torch.full((*grid.shape, len(base)), float("nan")) if several else None

    def store(self, index: tuple[int, ...], value: Tensor) -> None:
        """Note a cell's metric [prompt] or []."""
        self.values[index] = value.float().mean()
        if self.each is not None:
            self.each[index] = value.float()

    def result(self) -> SweepResult:
        """What has been stored so far."""
        clean, corrupted = self.pair.by_role(self.base, self.donor)
        return SweepResult(
            values=self.values,
            axes=self.grid.axes,
            labels=self.grid.labels,
            clean=clean,
            corrupted=corrupted,
            site=self.site,
            direction=self.pair.direction,
            per_prompt=self.each,
            n_prompts=len(self.pair.base),
        )


class _Runner:
    """Runs batches of cells and stores their metrics."""

    def __init__(self, engine: Engine, measure: MetricLike, given: dict[Site, Tensor], table: _Table) -> None:
        self.engine, self.measure, self.given, self.table = engine, measure, given, table
        self.reads = measure.where(engine.n_positions) if isinstance(measure, Metric) else None

    def run(self, batch: Batch) -> None:
        """One forward for all cells of a batch."""
        engine, measure, n = self.engine, self.measure, self.engine.n_prompts
        if self.reads is not None and self.reads < batch.offset:
            base = measure(engine.logits)
            for cell in batch.cells:
                self.table.store(cell.index, per_prompt(base, n)[0])
            return
        logits = engine.run(batch, self._hooks(batch, n), position=self.reads)
        for k, cell in enumerate(batch.cells):
            own = logits[k * n : (k + 1) * n]
            if isinstance(measure, Metric):
                value = measure.at(own[:, 0])
            else:
                value = measure(engine.assembled(own, batch.offset))
            self.table.store(cell.index, per_prompt(value, n)[0])

    def _hooks(self, batch: Batch, n: int) -> Hooks:
        """One hook per site, which writes the donor's values into the rows of each cell there."""
        by_site: dict[Site, list[tuple[int, Cell]]] = {}
        for k, cell in enumerate(batch.cells):
            for site in cell.sites:
                by_site.setdefault(site, []).append((k, cell))
        hooks: Hooks = []
        for site, cells in by_site.items():
            states: list[Tensor] = []
            if isinstance(site, InjectionSite):
                hooks.append((site.sibling("state_in").flat, _keep(states)))
            hooks.append((site.flat, self._writer(site, cells, batch.offset, n, states)))
        return hooks

    def _writer(
        self, site: Site, cells: list[tuple[int, Cell]], offset: int, n: int, states: list[Tensor]
    ) -> Callable[[Tensor, Any], Tensor]:
        donor, body = _from(self.given[site], site.layout, offset), self.engine.model.body

        def write(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            for k, cell in cells:
                rows = slice(k * n, (k + 1) * n)
                given = body.inject(states[-1][rows], donor) if isinstance(site, InjectionSite) else donor
                where = _where(site.layout, cell.position, cell.head, offset)
                value[(rows, *where)] = given[(slice(None), *where)]
            return value

        return write


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
