"""Measuring while the model runs: prompts of any length go in, probes see every site, nothing is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.measuring.probe import Probe
from loop_lens.prompts.forms import count_prompts
from loop_lens.prompts.reader import Batch, batches_of
from loop_lens.unrolling.numbers import plain
from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.sites import Site, act_name
from loop_lens.unrolling.tree import Blocks, Segments

Hook = tuple[str, Callable[..., Any]]


def schedule_of(model: TransformerBridge) -> Schedule:
    """The firings of one forward; of a feed-forward model, its layers as one segment ``"blocks"``."""
    if isinstance(model, HookedLoopedTransformer):
        return model.schedule
    return Schedule(Segments(Blocks("blocks", int(model.cfg.n_layers))))


@torch.no_grad()
def measure(
    model: TransformerBridge,
    prompts: Any,
    probes: Sequence[Probe],
    *,
    reference: int | None = None,
    rows: Callable[[Batch], tuple[Int[Tensor, "row pos"], list[Hook]]] | None = None,
    batch_size: int = 8,
    progress: bool = True,
    what: str = "measuring",
) -> None:
    """Run prompts through a model while probes look on.

    With a reference, each batch runs twice: first to the reference's number of iterations, with hooks on the
    last iteration alone, so that a probe can measure distances to it without any state being kept.

    Args:
        model: A looped model, or any `TransformerBridge` of a causal language model.
        prompts: As for `loop_lens.prompts.read_prompts`; lengths may differ.
        probes: What measures.
        reference: Number of iterations of the reference run.
        rows: What runs for a batch, from the batch: tokens [row pos], and hooks that change how they run. By
            default the batch's own tokens.
        batch_size: Prompts a forward.
        progress: Whether to show a progress bar, for work beyond two seconds.
        what: Its caption.

    Raises:
        ValueError: If there are no prompts, the reference ends before what is measured, or the model has no
            attention patterns to see.

    Example:
        >>> from loop_lens.dynamics import ConvergenceProbe
        >>> from loop_lens.measuring import measure
        >>> from loop_lens.stages import StagesProbe
        >>> probes = [ConvergenceProbe(model, reference=16), StagesProbe(model)]
        >>> measure(model, prompts, probes, reference=16, progress=False)
        >>> convergence, stages = (probe.result() for probe in probes)
        >>> convergence.mean("distance").shape  # iteration layer
        torch.Size([8, 2])
    """
    reference, batch_size = plain(reference), plain(batch_size)
    looped = model if isinstance(model, HookedLoopedTransformer) else None
    if reference is not None:
        if looped is None:
            raise ValueError("a reference is a number of iterations, and this model has no loop")
        if reference < looped.recurrences:
            raise ValueError(
                f"reference={reference} comes before the end of what is measured "
                f"({looped.recurrences} iterations)"
            )
    schedule = schedule_of(model)
    wanted = _wanted(schedule, probes)
    uncomputed = {hook for hook, _, _ in wanted}
    watching = [(site.flat, _watch(site, hook, those, uncomputed)) for hook, site, those in wanted]
    stop = _stop(schedule, (site for _, site, _ in wanted))
    for batch in batches_shown(model, prompts, batch_size, progress=progress, what=what):
        kept = _references(looped, batch, probes, reference) if looped and reference else [{} for _ in probes]
        for probe, own in zip(probes, kept, strict=True):
            probe.begin(batch, own)
        tokens, changes = rows(batch) if rows else (batch.tokens, [])
        model.run_with_hooks(tokens, fwd_hooks=[*changes, *watching], return_type=None, stop_at_layer=stop)
        if uncomputed:
            raise ValueError(
                f"this architecture never computes {', '.join(sorted(uncomputed))}, so it cannot be measured: "
                "measure without it (patterns=False), or open the model with eager attention"
            )
        for probe in probes:
            probe.end()


@torch.no_grad()
def values_at(
    model: HookedLoopedTransformer, tokens: Int[Tensor, "prompt pos"], sites: Iterable[Site]
) -> dict[Site, Tensor]:
    """The values of some sites in one run, which ends behind the last of them."""
    sites = list(sites)
    values: dict[Site, Tensor] = {}
    hooks: list[Any] = [
        (site.flat, lambda value, hook, site=site: values.__setitem__(site, value)) for site in sites
    ]
    stop = _stop(model.schedule, sites)
    model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None, stop_at_layer=stop)
    return values


def batches_shown(
    model: TransformerBridge, prompts: Any, batch_size: int, *, progress: bool, what: str
) -> Iterator[Batch]:
    """Batches, and a progress bar that counts them."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    n = count_prompts(prompts)
    total = None if n is None or batch_size < 1 else math.ceil(n / batch_size / processes)
    with tqdm(total=total, desc=what, delay=2, disable=not progress, leave=False) as bar:
        for batch in batches_of(model, prompts, batch_size):
            yield batch
            bar.update()


def _wanted(schedule: Schedule, probes: Sequence[Probe]) -> list[tuple[str, Site, list[Probe]]]:
    """Every site that a probe wants, with the short name that the probes call its hook by."""
    wanted: list[tuple[str, Site, list[Probe]]] = []
    for hook in dict.fromkeys(hook for probe in probes for hook in probe.hooks):
        asked = [probe for probe in probes if hook in probe.hooks]
        for site in _sites(schedule, hook):
            if those := [probe for probe in asked if probe.wants(site)]:
                wanted.append((hook, site, those))
    return wanted


def _sites(schedule: Schedule, hook: str) -> Iterator[Site]:
    """Every site of a hook, between blocks or within them."""
    if (own := f"hook_{hook.removeprefix('hook_')}") in schedule.hooks_between:
        yield from (site for site in schedule.sites.values() if site.hook == own)
    else:
        yield from (Site(firing, act_name(hook, firing.index), schedule) for firing in schedule)


def _stop(schedule: Schedule, sites: Iterable[Site]) -> int | None:
    """Where the forward may end: behind the last of some sites."""
    stop = max([1, *(site.start + 1 for site in sites)])
    return stop if stop < len(schedule) else None


def _watch(site: Site, hook: str, watching: list[Probe], uncomputed: set[str]) -> Callable[..., None]:
    def see(value: Tensor, hook: Any, short: str = hook) -> None:
        uncomputed.discard(short)
        for probe in watching:
            probe.see(site, value)

    return see


def _references(
    model: HookedLoopedTransformer, batch: Batch, probes: Sequence[Probe], recurrences: int
) -> list[dict[Site, Tensor]]:
    """What each probe refers to, in a run of so many iterations."""
    with model.at_recurrences(recurrences):
        schedule = model.schedule
        last = {
            segment: schedule.iterations(segment)[-1] for segment in (*schedule.segments, *schedule.loops)
        }
        kept = [
            [
                site
                for _, site, _ in _wanted(schedule, [probe])
                if probe.refers_to(site, last=site.segment is None or site.iteration == last[site.segment])
            ]
            for probe in probes
        ]
        values = values_at(model, batch.tokens, dict.fromkeys(site for sites in kept for site in sites))
    return [{site: values[site] for site in sites} for sites in kept]
