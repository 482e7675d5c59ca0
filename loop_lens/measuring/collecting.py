"""What probes that keep sums share: padding, numbers that mean nothing, and the first value that is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from loop_lens.measuring.moments import Collector, DivergedError
from loop_lens.measuring.probe import Probe
from loop_lens.measuring.processes import shared
from loop_lens.measuring.run import measure
from loop_lens.prompts.reader import Batch
from loop_lens.unrolling.sites import Site

R = TypeVar("R")


class CollectingProbe(Probe, Generic[R]):
    """Base of probes that reduce what they see to sums, and say where the model diverged first.

    Subclasses make ``collectors``, `take` a site's value, and `put` numbers made of it.
    """

    collectors: tuple[Collector, ...] = ()

    def begin(self, batch: Batch, reference: Mapping[Site, Tensor]) -> None:
        """Start a batch."""
        self.mask = batch.mask
        self._finite: list[tuple[Site, Tensor]] = []
        for collector in self.collectors:
            collector.begin(len(batch.tokens), batch.tokens.device)

    def see(self, site: Site, value: Tensor) -> None:
        """Note whether the value is finite, and take it."""
        self._finite.append((site, all_finite(value, self.mask)))
        self.take(site, value)

    def take(self, site: Site, value: Tensor) -> None:
        """A value of the batch."""
        raise NotImplementedError

    def put(
        self,
        cell: tuple[int, ...],
        values: Mapping[str, Tensor],
        weights: Tensor | None = None,
        *,
        to: Collector | None = None,
    ) -> None:
        """Metrics' values at a cell, as `Collector.put` takes each; what is NaN means nothing and is left out."""
        collector = to or self.collectors[0]
        stacked = torch.stack(list(values.values()))
        real = ~stacked.isnan() if weights is None else weights & ~stacked.isnan()
        collector.put([collector.metrics.index(metric) for metric in values], cell, stacked, real)

    def end(self) -> None:
        """Add the batch up.

        Raises:
            DivergedError: If a value was NaN or infinite; names the first.
        """
        for site, finite in self._finite:
            if not bool(finite):
                raise DivergedError(diverged(f"at {self.place(site)}"))
        for collector in self.collectors:
            collector.end()

    def place(self, site: Site) -> str:
        """What a site is called in errors."""
        layer = site.short if site.layer is None else f"layer {site.layer}"
        iteration = "" if site.iteration is None else f" iteration {site.iteration},"
        return f"{site.segment}{iteration} {layer} ({site.place.prefix})"

    def result(self) -> R:
        """What was measured so far, by this process."""
        raise NotImplementedError


def measured(model: TransformerBridge, prompts: Any, probe: CollectingProbe[R], **options: Any) -> R:
    """What one probe measures on all processes' prompts; options as for `loop_lens.measuring.measure`."""
    measure(model, prompts, [probe], **options)
    return shared(probe.result())


def diverged(place: str, run: str = "") -> str:
    """What `DivergedError` says."""
    return (
        f"values became NaN or infinite{run}, first {place}: fewer iterations, a wider dtype, or other weights "
        "are needed"
    )


def all_finite(value: Tensor, mask: Bool[Tensor, "prompt pos"]) -> Bool[Tensor, ""]:
    """Whether a value [row ... pos size], of one or several rows a prompt, is finite where there is no padding."""
    rows = value.isfinite().all(-1).unflatten(0, (-1, len(mask)))
    real = mask.view(len(mask), *[1] * (rows.ndim - 3), -1)
    return (rows | ~real).all()


@torch.no_grad()
def first_diverged(
    model: TransformerBridge,
    tokens: Int[Tensor, "prompt pos"],
    mask: Bool[Tensor, "prompt pos"],
    sites: Iterable[Site],
) -> Site | None:
    """The first of some sites whose value is not finite, in a run that looks for it alone."""
    found: list[Site] = []

    def look(site: Site) -> Any:
        return lambda value, hook: None if bool(all_finite(value, mask)) else found.append(site)

    model.run_with_hooks(tokens, fwd_hooks=[(site.flat, look(site)) for site in sites], return_type=None)
    return found[0] if found else None
