"""Loop surgery: transplants, skips, freezes, cuts, ablations, steering, noise.

Each function returns a context manager; what it changes is in force within, around any run of the
model: a forward, a cache, a sweep, ``generate`` with or without a key-value cache.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.bridge.names import InjectionSite, find_sites, n_heads
from loop_lens.interventions.edits import Edit, Surgery, View
from loop_lens.unrolling.sites import Boundary, Firing, Site
from loop_lens.unrolling.tree import Iteration, UnknownNameError

Select = int | slice | Iterable[int] | None
Iterations = int | tuple[int, ...] | slice | Iterable[Any] | None
Change = Callable[[Tensor, View], Tensor]


def edit(
    model: HookedLoopedTransformer,
    site: str,
    change: Change,
    *,
    iterations: Iterations = None,
    layers: Select = None,
    positions: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    segment: str | None = None,
) -> Surgery:
    """Change a kind of site by a function: what the other surgeries are made of.

    Args:
        model: The model.
        site: As in `loop_lens.patch_sweep`.
        change: From the value at the site and its `View` to the value that goes on.
        iterations: Iterations at which to change it; all by default.
        layers: Layers at which to change it; all by default.
        positions: Positions to change, from 0; all by default.
        heads: Heads to change, in sites that have heads; all by default.
        segment: Segment; the innermost loop by default.

    Raises:
        UnknownNameError: If the model has no such site, iteration or layer.
    """
    found = find_sites(model, site, iteration=iterations, layer=layers, segment=segment)
    _require_heads(model, found[0], heads)
    return Surgery(model, [_edit(model, one, change, positions, heads) for one in found])


def _edit(
    model: HookedLoopedTransformer,
    where: Site,
    change: Change,
    positions: Sequence[int] | None,
    heads: Sequence[int] | None,
    reads: tuple[str, ...] = (),
) -> Edit:
    if isinstance(where, InjectionSite):
        change, reads = _of_injection(model, where, change), (*reads, _state_of(where), "hook_prelude_out")
    return Edit(
        where.flat,
        change,
        reads,
        None if positions is None else tuple(positions),
        None if heads is None else tuple(heads),
    )


def _state_of(where: Site) -> str:
    """The state that enters the iteration of an injection."""
    return where.sibling("state_in").flat


def _of_injection(model: HookedLoopedTransformer, where: Site, change: Change) -> Change:
    """A change of what is injected, as a change of what comes of it."""
    body, state_name = model.body, _state_of(where)

    def through(value: Tensor, view: View) -> Tensor:
        state = view.live[state_name]
        e = body.injection(state, value, view.live["hook_prelude_out"])
        return body.inject(state, change(e, view))

    return through


def _require_heads(model: HookedLoopedTransformer, where: Site, heads: Sequence[int] | None) -> None:
    if heads is None:
        return
    if where.layout == "stream":
        raise ValueError(f"{where.flat} has no heads: heads are in z, q, k, v, pattern, attn_scores")
    n = n_heads(model, where.flat)
    outside = [h for h in heads if not 0 <= h < n]
    if outside:
        raise ValueError(f"head {outside[0]} does not exist: there are heads 0-{n - 1}")


def transplant(
    model: HookedLoopedTransformer,
    site: str,
    *,
    source: Iteration,
    to: Iterations,
    layers: Select = None,
    cache: Mapping[str, Tensor] | None = None,
    positions: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    segment: str | None = None,
) -> Surgery:
    """Put a site's value of one iteration in its place at others.

    Args:
        model: The model.
        site: As in `loop_lens.patch_sweep`.
        source: Iteration that the value comes from.
        to: Iterations that receive it.
        layers: Layers at which to do so, each from and to itself; all by default.
        cache: Another run's cache to take the value from (of another prompt, or of this one where
            ``source`` comes later than ``to``). Without one, the value is that of the same forward.
        positions: Positions that receive it, from 0; all by default.
        heads: Heads that receive it, in sites that have heads; all by default.
        segment: Segment; the innermost loop by default.

    Raises:
        ValueError: If the source comes later in the same forward.
        UnknownNameError: If a site does not exist, or the cache lacks it.
    """
    origin = find_sites(model, site, iteration=source, layer=layers, segment=segment)
    targets = find_sites(model, site, iteration=to, layer=layers, segment=segment)
    _require_heads(model, origin[0], heads)
    by_layer = {_layer(one): one for one in origin}
    edits: list[Edit] = []
    for target in targets:
        given = by_layer[_layer(target)]
        if cache is not None:
            value = _cached(cache, given.flat)
            edits.append(_edit(model, target, _given(value), positions, heads))
            continue
        if given.start > target.start:
            raise ValueError(
                f"{given.flat} fires after {target.flat}, so its value is not known there: pass the cache of "
                "an earlier run, cache=..."
            )
        if given.flat != target.flat:
            edits.append(_edit(model, target, _live(given.flat), positions, heads, (given.flat,)))
    return Surgery(model, edits)


def _layer(where: Site) -> int | None:
    return where.place.layer if isinstance(where.place, Firing) else None


def _cached(cache: Mapping[str, Tensor], name: str) -> Tensor:
    try:
        return cache[name]
    except KeyError:
        raise UnknownNameError(f"the cache has no {name!r}: run with names_filter including it") from None


def _given(value: Tensor) -> Change:
    return lambda old, view: view.take(value, old)


def _live(name: str) -> Change:
    return lambda old, view: view.live[name]


def freeze(
    model: HookedLoopedTransformer,
    site: str,
    *,
    at: int,
    iterations: Iterations = None,
    layers: Select = None,
    heads: Sequence[int] | None = None,
    segment: str | None = None,
) -> Surgery:
    """Keep a pattern, a head or a block's output at the value that it had at one iteration.

    Args:
        model: The model.
        site: ``"pattern"`` for attention, ``"z"`` for heads, ``"resid_post"`` for blocks, or any other.
        at: Iteration whose value is kept.
        iterations: Iterations that use it; all later ones by default.
        layers: Layers to freeze; all by default.
        heads: Heads to freeze, in sites that have heads; all by default.
        segment: Segment; the innermost loop by default.

    Raises:
        ValueError: If there is no later iteration.
    """
    every = model.schedule.iterations(segment or model.schedule.innermost_loop)
    if iterations is None:
        if at not in every:
            raise UnknownNameError(f"iteration {at} does not exist: there are {every[0]} to {every[-1]}")
        iterations = every[every.index(at) + 1 :]
        if not iterations:
            raise ValueError(f"iteration {at} is the last: there is none after it to freeze")
    return transplant(model, site, source=at, to=iterations, layers=layers, heads=heads, segment=segment)


def skip(
    model: HookedLoopedTransformer,
    iterations: Iterations,
    *,
    layers: Select = None,
    segment: str | None = None,
) -> Surgery:
    """Let iterations, or single layers in them, leave the state as it was.

    Args:
        model: The model.
        iterations: Iterations to skip. In nested loops an outer iteration is skipped with all inner.
        layers: Layers to skip in these iterations; whole iterations by default.
        segment: Segment; the innermost loop by default.
    """
    if layers is not None:
        ends = find_sites(model, "resid_post", iteration=iterations, layer=layers, segment=segment)
        pairs = [(end.flat, end.sibling("resid_pre").flat) for end in ends]
    else:
        pairs = [(end.flat, end.sibling("state_in").flat) for end in _ends(model, iterations, segment)]
    return Surgery(model, [Edit(out, _live(came), (came,)) for out, came in pairs])


def _ends(model: HookedLoopedTransformer, iterations: Iterations, segment: str | None) -> list[Site]:
    """Where the iterations end, and those of loops nested in them."""
    outer = find_sites(model, "state_out", iteration=iterations, segment=segment)
    inside: list[Site] = []
    for one in outer:
        assert isinstance(one.place, Boundary)
        prefix = f"{one.place.prefix}."
        for boundary in model.schedule.boundaries:
            if boundary.prefix.startswith(prefix):
                inside += find_sites(
                    model, "state_out", iteration=boundary.iteration, segment=boundary.segment
                )
    return [*inside, *outer]


@contextmanager
def reorder(
    model: HookedLoopedTransformer, order: Sequence[int]
) -> Generator[HookedLoopedTransformer, None, None]:
    """Run the outermost loop's iterations in another order, some several times or not at all.

    An iteration keeps its name, and with it its hooks and edits, wherever in the order it runs. The
    weights are the same in all of them, so without hooks only the number of iterations counts. One
    that runs twice fires its hooks twice; a cache keeps the last.

    Args:
        model: The model.
        order: Iterations by name, in the order in which they shall run; ``[0, 2, 1, 1]``.

    Raises:
        UnknownNameError: If an iteration does not exist.
    """
    n = model.recurrences
    missing = [t for t in order if not 0 <= t < n]
    if missing:
        raise UnknownNameError(f"iteration {missing[0]} does not exist: there are 0 to {n - 1}")
    if not order:
        raise ValueError("order is empty: give at least one iteration")
    with model.body.reordered(tuple(order)):
        yield model


def stop_after(
    model: HookedLoopedTransformer, iterations: int
) -> AbstractContextManager[HookedLoopedTransformer]:
    """Leave the loop after so many iterations and read out, as the model does at that R."""
    return model.at_recurrences(iterations)


def cut_injection(
    model: HookedLoopedTransformer,
    iterations: Iterations = None,
    *,
    mode: Literal["zero", "bypass"] = "zero",
    segment: str | None = None,
) -> Surgery:
    """Inject nothing at some iterations.

    Args:
        model: The model.
        iterations: Iterations at which to cut; all by default.
        mode: ``"zero"`` injects zeros, so that an injection matrix still acts on the state;
            ``"bypass"`` lets the state through as it is.
        segment: Segment; the innermost loop by default.

    Raises:
        UnknownNameError: If the model has no injection.
    """
    if mode == "zero":
        return replace_injection(model, None, iterations, segment=segment)
    if mode != "bypass":
        raise ValueError(f"mode {mode!r} is unknown: choose 'zero' or 'bypass'")
    found = find_sites(model, "injected", iteration=iterations, segment=segment)
    return Surgery(model, [Edit(one.flat, _live(_state_of(one)), (_state_of(one),)) for one in found])


def replace_injection(
    model: HookedLoopedTransformer,
    e: Float[Tensor, "batch pos d_model"] | None,
    iterations: Iterations = None,
    *,
    positions: Sequence[int] | None = None,
    segment: str | None = None,
) -> Surgery:
    """Inject something else than the prelude's output at some iterations.

    Args:
        model: The model.
        e: What to inject, e.g. ``cache["hook_prelude_out"]`` of another prompt; None for zeros.
        iterations: Iterations at which to do so; all by default.
        positions: Positions at which to do so, from 0; all by default.
        segment: Segment; the innermost loop by default.

    Raises:
        UnknownNameError: If the model has no injection.
    """
    body = model.body
    edits: list[Edit] = []
    for one in find_sites(model, "injected", iteration=iterations, segment=segment):
        state_name = _state_of(one)

        def change(value: Tensor, view: View, state_name: str = state_name) -> Tensor:
            state = view.live[state_name]
            other = torch.zeros_like(state) if e is None else view.take(e, state)
            return body.inject(state, other)

        chosen = None if positions is None else tuple(positions)
        edits.append(Edit(one.flat, change, (state_name,), chosen))
    return Surgery(model, edits)


def ablate(
    model: HookedLoopedTransformer,
    site: str,
    how: Literal["zero", "mean", "resample"] = "zero",
    *,
    reference: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    iterations: Iterations = None,
    layers: Select = None,
    positions: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    segment: str | None = None,
) -> Surgery:
    """Take a site's information away, at one, some or all iterations.

    Args:
        model: The model.
        site: As in `loop_lens.patch_sweep`.
        how: ``"zero"``; ``"mean"``, the reference's mean over prompts and positions (for patterns
            over prompts); or ``"resample"``, the value that a random prompt of the reference has at
            the same position.
        reference: Cache of a run on reference prompts, for mean and resample.
        seed: For resample: which prompt each prompt gets.
        iterations: As in `edit`.
        layers: As in `edit`.
        positions: As in `edit`.
        heads: As in `edit`.
        segment: As in `edit`.

    Raises:
        ValueError: If there is no reference for an ablation that needs one.
    """
    if how not in ("zero", "mean", "resample"):
        raise ValueError(f"how={how!r} is unknown: choose 'zero', 'mean' or 'resample'")
    if how != "zero" and reference is None:
        raise ValueError(f"an ablation by {how} needs reference=, the cache of a run on reference prompts")
    found = find_sites(model, site, iteration=iterations, layer=layers, segment=segment)
    _require_heads(model, found[0], heads)
    edits: list[Edit] = []
    for one in found:
        if reference is None or how == "zero":
            change: Change = _zero
        elif how == "mean":
            change = _mean(_cached(reference, one.flat), one.layout == "pattern")
        else:
            change = _resample(_cached(reference, one.flat), seed)
        edits.append(_edit(model, one, change, positions, heads))
    return Surgery(model, edits)


def _zero(value: Tensor, view: View) -> Tensor:
    return torch.zeros_like(value)


def _mean(reference: Tensor, is_pattern: bool) -> Change:
    if is_pattern:
        return _given(reference.mean(0, keepdim=True))
    mean = reference.mean((0, 1), keepdim=True)
    return lambda value, view: mean.to(value.device, value.dtype).expand_as(value)


def _resample(reference: Tensor, seed: int) -> Change:
    def change(value: Tensor, view: View) -> Tensor:
        rows = torch.arange(len(value)) if view.rows is None else view.rows.cpu()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(reference), (int(rows.max()) + 1,), generator=generator)
        whole = View(view.layout, view.offset, None, view.live)
        return whole.take(reference[drawn[rows].to(reference.device)], value)

    return change


def steer(
    model: HookedLoopedTransformer,
    vector: Float[Tensor, "*batch d_model"],
    site: str = "resid_post",
    *,
    scale: float = 1.0,
    iterations: Iterations = None,
    layers: Select = None,
    positions: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    segment: str | None = None,
) -> Surgery:
    """Add a vector to a site.

    Args:
        model: The model.
        vector: What to add, of the size of the site's last dimension.
        site: As in `loop_lens.patch_sweep`.
        scale: Factor of the vector.
        iterations: As in `edit`.
        layers: As in `edit`.
        positions: As in `edit`.
        heads: As in `edit`.
        segment: As in `edit`.

    Raises:
        ValueError: If the vector does not fit.
    """

    def change(value: Tensor, view: View) -> Tensor:
        if vector.ndim != 1 or vector.shape[0] != value.shape[-1]:
            raise ValueError(
                f"the vector has shape {tuple(vector.shape)}, but {site} has {value.shape[-1]} dimensions"
            )
        return value + scale * vector.to(value.device, value.dtype)

    return edit(
        model,
        site,
        change,
        iterations=iterations,
        layers=layers,
        positions=positions,
        heads=heads,
        segment=segment,
    )


def add_noise(
    model: HookedLoopedTransformer,
    std: float,
    *,
    iterations: Iterations = 0,
    seed: int = 0,
    site: str = "state",
    positions: Sequence[int] | None = None,
    segment: str | None = None,
) -> Surgery:
    """Add Gaussian noise to the state that enters an iteration.

    The noise belongs to (seed, site, prompt, position): the same run twice is the same, and so are a
    sweep's many copies of a prompt, and generation with and without a key-value cache.

    Args:
        model: The model.
        std: Standard deviation, in the units of the state.
        iterations: Iterations at whose start to add it; the first by default.
        seed: Seed.
        site: As in `loop_lens.patch_sweep`, one without heads.
        positions: Positions to change, from 0; all by default.
        segment: Segment; the innermost loop by default.
    """
    edits: list[Edit] = []
    for index, one in enumerate(find_sites(model, site, iteration=iterations, segment=segment)):
        if one.layout != "stream":
            raise ValueError(f"noise goes to sites of the stream, not to {site!r}")
        edits.append(_edit(model, one, _noisy(std, seed + 7919 * index), positions, None))
    return Surgery(model, edits)


def _noisy(std: float, seed: int) -> Change:
    def change(value: Tensor, view: View) -> Tensor:
        rows = list(range(len(value))) if view.rows is None else view.rows.tolist()
        stop = view.offset + value.shape[1]
        drawn: dict[int, Tensor] = {}
        for row in dict.fromkeys(rows):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + row)
            # Uniform numbers come one after the other, so a longer prompt only adds to them.
            uniform = torch.rand(stop, value.shape[-1], generator=generator, dtype=torch.float64)
            drawn[row] = torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))[view.offset :]
        return value + std * torch.stack([drawn[row] for row in rows]).to(value.device, value.dtype)

    return change
