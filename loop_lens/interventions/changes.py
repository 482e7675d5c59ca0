"""From a kind of site and what happens to it to the edits of a surgery."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from loop_lens.bridge.cache import LoopCache
from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.bridge.names import InjectionSite
from loop_lens.interventions.edits import Edit, View
from loop_lens.interventions.where import Where
from loop_lens.unrolling.sites import Site
from loop_lens.unrolling.tree import UnknownNameError

Change = Callable[[Tensor, View], Tensor]
"""From the value at a site and the view of it to the value that goes on."""


def edits_at(
    model: HookedLoopedTransformer, kind: str, where: Where, change: Callable[[Site], Change]
) -> list[Edit]:
    """One edit for each of the sites of a kind that are meant."""
    sites = where.sites(model, kind)
    where.require_heads(model, sites[0])
    return [edit_at(model, site, where, change(site)) for site in sites]


def edit_at(
    model: HookedLoopedTransformer, site: Site, where: Where, change: Change, reads: tuple[str, ...] = ()
) -> Edit:
    """The edit of one site; at an injection, of what is injected."""
    if isinstance(site, InjectionSite):
        state = site.sibling("state_in").flat
        change, reads = _of_injection(model, state, change), (*reads, state, "hook_prelude_out")
    return Edit(
        site.flat,
        change,
        reads,
        None if where.positions is None else tuple(where.positions),
        None if where.heads is None else tuple(where.heads),
    )


def _of_injection(model: HookedLoopedTransformer, state_name: str, change: Change) -> Change:
    """A change of what is injected, as a change of what comes of it."""
    body = model.body

    def through(value: Tensor, view: View) -> Tensor:
        state = view.live[state_name]
        e = body.injection(state, value, view.live["hook_prelude_out"])
        return body.inject(state, change(e, view))

    return through


def cached(cache: Mapping[str, Tensor], site: Site) -> Tensor:
    """A site's value [batch pos ...] in a cache, which may be of another number of iterations.

    Raises:
        UnknownNameError: If the cache has none.
    """
    try:
        value = cache[site.name if isinstance(cache, LoopCache) else site.flat]
    except KeyError:
        raise UnknownNameError(
            f"the cache has no {site.flat!r}: run with names_filter including it"
        ) from None
    return value if getattr(cache, "has_batch_dim", True) else value.unsqueeze(0)


def given_value(value: Tensor) -> Change:
    """Put a value of whole prompts [batch pos ...] in a site's place."""
    return lambda old, view: view.take(value, old)


def live_value(name: str) -> Change:
    """Put another site's value of the same forward in a site's place."""
    return lambda old, view: view.live[name]
