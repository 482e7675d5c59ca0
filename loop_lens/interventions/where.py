"""`Where`: the iterations, layers, positions, heads and segment that the keywords of an intervention choose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.bridge.names import find_sites, n_heads
from loop_lens.unrolling.numbers import plain, whole
from loop_lens.unrolling.sites import Site

Iterations = int | tuple[int, ...] | slice | Iterable[Any] | None
"""One iteration (a tuple where loops are nested), several, a slice of them, or None for all."""
Layers = int | slice | Iterable[int] | None
"""One layer, several, a slice of them, or None for all."""
Places = Iterable[int] | None
"""Several positions or heads (or one), or None for all."""


@dataclass(frozen=True)
class Where:
    """Which of a kind's sites an intervention is at, and which part of their values.

    Attributes:
        iterations: Iterations; all by default.
        layers: Layers within the segment; all by default.
        positions: Positions; all by default.
        heads: Heads; all by default.
        segment: Segment; the innermost loop by default.
    """

    iterations: Iterations = None
    layers: Layers = None
    positions: Places = None
    heads: Places = None
    segment: str | None = None

    def __post_init__(self) -> None:
        for each in fields(self)[:-1]:
            chosen = plain(getattr(self, each.name))
            if each.name in ("positions", "heads") and chosen is not None:
                several = [chosen] if not hasattr(chosen, "__iter__") else chosen
                chosen = [whole(one, f"one of {each.name}") for one in several]
                if not chosen:
                    raise ValueError(f"{each.name} is empty: give at least one, or None for all")
            object.__setattr__(self, each.name, chosen)

    def sites(self, model: HookedLoopedTransformer, kind: str) -> list[Site]:
        """The sites of a kind that are meant.

        Raises:
            UnknownNameError: If the model has no such site, iteration or layer.
        """
        sites = find_sites(model, kind, iteration=self.iterations, layer=self.layers, segment=self.segment)
        return sites

    def require_heads(self, model: HookedLoopedTransformer, site: Site) -> None:
        """Raise `ValueError` unless a site has the chosen heads."""
        for head in self.heads or ():
            require_head(model, site, int(head))


def require_head(model: HookedLoopedTransformer, site: Site, head: int) -> None:
    """Raise `ValueError` unless a site has a head."""
    if site.layout == "stream":
        raise ValueError(f"{site.flat} has no heads: heads are in z, q, k, v, pattern, attn_scores")
    n = n_heads(model, site.hook)
    if not 0 <= head < n:
        raise ValueError(f"head {head} does not exist: {site.short} has heads 0-{n - 1}")
