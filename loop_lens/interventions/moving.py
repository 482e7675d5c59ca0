"""Surgery that moves values between iterations: transplant, freeze, skip, reorder, replace the injection.

Each function returns a context manager; what it changes is in force within, around any run of the
model: a forward, a cache, a sweep, ``generate`` with or without a key-value cache.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from loop_lens.bridge.cache import LoopCache
from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.interventions.changes import cached, edit_at, given_value, live_value
from loop_lens.interventions.edits import Edit, Surgery, View
from loop_lens.interventions.where import Iterations, Layers, Where
from loop_lens.unrolling.numbers import whole
from loop_lens.unrolling.sites import Boundary, Site
from loop_lens.unrolling.tree import Iteration, UnknownNameError


def transplant(
    model: HookedLoopedTransformer,
    site: str,
    *,
    source: Iteration,
    to: Iterations,
    layers: Layers = None,
    cache: Mapping[str, Tensor] | None = None,
    positions: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    segment: str | None = None,
) -> Surgery:
    """Put a site's value of one iteration in its place at others.

    Args:
        model: The model.
        site: As in `loop_lens.patch_sweep`.
        source: Iteration that the value comes from, of those of the cache's run where there is one.
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

    Example:
        >>> from loop_lens.interventions import transplant
        >>> _, cache = model.run_with_cache("a c c b b a ? b -> -> ->")
        >>> with transplant(model, "state_out", source=2, to=2, cache=cache, positions=[8]):
        ...     patched = model(prompt)
        >>> torch.equal(patched[:, :8], model(prompt)[:, :8])
        True
    """
    where = Where(to, layers, positions, heads, segment)
    with cache.as_recorded() if isinstance(cache, LoopCache) else nullcontext():
        origins = Where(source, layers, segment=segment).sites(model, site)
    by_layer = {origin.layer: origin for origin in origins}
    edits: list[Edit] = []
    for target in where.sites(model, site):
        where.require_heads(model, target)
        given = by_layer[target.layer]
        if cache is not None:
            edits.append(edit_at(model, target, where, given_value(cached(cache, given))))
            continue
        if given.start > target.start:
            raise ValueError(
                f"{given.flat} fires after {target.flat}, so its value is not known there: pass the cache of "
                "an earlier run, cache=..."
            )
        if given.flat != target.flat:
            edits.append(edit_at(model, target, where, live_value(given.flat), (given.flat,)))
    return Surgery(model, edits)


def freeze(
    model: HookedLoopedTransformer,
    site: str,
    *,
    at: int,
    iterations: Iterations = None,
    layers: Layers = None,
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

    Example:
        >>> from loop_lens.interventions import freeze
        >>> with freeze(model, "pattern", at=1):
        ...     _, cache = model.run_with_cache(prompt)
        >>> patterns = cache.over_iterations("pattern", layer=0)
        >>> torch.equal(patterns[1], patterns[7])
        True
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
    layers: Layers = None,
    segment: str | None = None,
) -> Surgery:
    """Let iterations, or single layers in them, leave the state as it was.

    Args:
        model: The model.
        iterations: Iterations to skip. In nested loops an outer iteration is skipped with all inner.
        layers: Layers to skip in these iterations; whole iterations by default.
        segment: Segment; the innermost loop by default.

    Example:
        >>> from loop_lens.interventions import skip
        >>> with skip(model, 3):
        ...     _, cache = model.run_with_cache(prompt)
        >>> torch.equal(cache["loop.3.hook_state_in"], cache["loop.4.hook_state_in"])
        True
    """
    if layers is not None:
        ends = Where(iterations, layers, segment=segment).sites(model, "resid_post")
        pairs = [(end.flat, end.sibling("resid_pre").flat) for end in ends]
    else:
        pairs = [(end.flat, end.sibling("state_in").flat) for end in _ends(model, iterations, segment)]
    return Surgery(model, [Edit(out, live_value(came), (came,)) for out, came in pairs])


def _ends(model: HookedLoopedTransformer, iterations: Iterations, segment: str | None) -> list[Site]:
    """Where the iterations end, and those of loops nested in them."""
    outer = Where(iterations, segment=segment).sites(model, "state_out")
    inside: list[Site] = []
    for outside in outer:
        assert isinstance(outside.place, Boundary)
        prefix = f"{outside.place.prefix}."
        for boundary in model.schedule.boundaries:
            if boundary.prefix.startswith(prefix):
                inside.append(model.schedule.sites[f"{boundary.prefix}.hook_state_out"])
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

    Example:
        >>> from loop_lens.interventions import reorder
        >>> with reorder(model, [0, 2, 1, 1, 3]):
        ...     shuffled = model(prompt)
        >>> torch.equal(shuffled, model(prompt, recurrences=5))  # weights are the same in all iterations
        True
    """
    n, order = model.recurrences, [whole(t, "an iteration") for t in order]
    missing = [t for t in order if not 0 <= t < n]
    if missing:
        raise UnknownNameError(f"iteration {missing[0]} does not exist: there are 0 to {n - 1}")
    if not order:
        raise ValueError("order is empty: give at least one iteration")
    with model.body.reordered(tuple(order)):
        yield model


def replace_injection(
    model: HookedLoopedTransformer,
    e: Float[Tensor, "batch pos d_model"] | Literal["bypass"] | None,
    iterations: Iterations = None,
    *,
    positions: Sequence[int] | None = None,
    segment: str | None = None,
) -> Surgery:
    """Inject something else than the prelude's output, or nothing, at some iterations.

    Args:
        model: The model.
        e: What to inject, e.g. ``cache["hook_prelude_out"]`` of another prompt; None for zeros, on
            which an injection matrix still acts beside the state; ``"bypass"`` to let the state through
            as it is.
        iterations: Iterations at which to do so; all by default.
        positions: Positions at which to do so, from 0; all by default.
        segment: Segment; the innermost loop by default.

    Raises:
        UnknownNameError: If the model has no injection.
        ValueError: If ``e`` is something else.

    Example:
        >>> from loop_lens.interventions import replace_injection
        >>> with replace_injection(model, "bypass", 3):
        ...     _, cache = model.run_with_cache(prompt)
        >>> torch.equal(cache["loop.3.hook_state_in"], cache["loop.3.hook_injected"])
        True
    """
    if not (e is None or isinstance(e, Tensor) or e == "bypass"):
        raise ValueError(f"e={e!r} cannot be injected: give a tensor, None for zeros, or 'bypass'")
    body = model.body
    where = Where(iterations, positions=positions, segment=segment)
    edits: list[Edit] = []
    for site in where.sites(model, "injected"):
        state_name = site.sibling("state_in").flat

        def change(value: Tensor, view: View, state_name: str = state_name) -> Tensor:
            state = view.live[state_name]
            if isinstance(e, str):
                return state
            return body.inject(state, torch.zeros_like(state) if e is None else view.take(e, state))

        edits.append(edit_at(model, site, where, change, (state_name,)))
    return Surgery(model, edits)
