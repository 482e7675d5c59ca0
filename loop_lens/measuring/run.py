"""Measuring while the model runs: prompts of any length go in, probes see every block, nothing is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.measuring.probe import Ends, Probe
from loop_lens.prompts.reader import Batch, batches_of
from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.sites import Firing, act_name
from loop_lens.unrolling.tree import Blocks, Segments


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
    batch_size: int = 8,
    progress: bool = True,
    what: str = "measuring",
) -> None:
    """Run prompts through a model while probes look on.

    With a reference, each batch runs twice: first to the reference's number of iterations, with hooks on the
    last iteration alone, so that a probe can measure distances to it without any state being kept.

    Args:
        model: A looped model, or any `TransformerBridge` of a causal language model.
        prompts: As for `read_prompts`; lengths may differ.
        probes: What measures.
        reference: Number of iterations of the reference run.
        batch_size: Prompts a forward.
        progress: Whether to show a progress bar, for work beyond two seconds.
        what: Its caption.

    Raises:
        ValueError: If there are no prompts, the reference ends before what is measured, or the model has no
            attention patterns to see.
    """
    schedule = schedule_of(model)
    looped = model if isinstance(model, HookedLoopedTransformer) else None
    if reference is not None:
        if looped is None:
            raise ValueError("a reference is a number of iterations, and this model has no loop")
        if reference < looped.recurrences:
            raise ValueError(
                f"reference={reference} comes before the end of what is measured "
                f"({looped.recurrences} iterations)"
            )
    seen = _sites(schedule, probes)
    unseen = {hook for _, hook, _, _ in seen}
    stop = _stop(schedule, seen)
    hooks: list[Any] = [
        (name, _watch(hook, firing, watching, unseen)) for name, hook, firing, watching in seen
    ]
    bar = tqdm(total=_n_batches(prompts, batch_size), desc=what, delay=2, disable=not progress, leave=False)
    with bar:
        for batch in batches_of(model, prompts, batch_size):
            ends = _ends(looped, batch, probes, reference) if looped and reference else {}
            for probe in probes:
                probe.begin(batch, ends)
            model.run_with_hooks(batch.tokens, fwd_hooks=hooks, return_type=None, stop_at_layer=stop)
            if unseen:
                raise ValueError(
                    f"this architecture never computes {', '.join(sorted(unseen))}, so it cannot be measured: "
                    "measure without it (patterns=False), or open the model with eager attention"
                )
            for probe in probes:
                probe.end()
            bar.update()


def _n_batches(prompts: Any, batch_size: int) -> int | None:
    """How many batches this process will see, None where nobody knows."""
    single = isinstance(prompts, str) or (isinstance(prompts, Tensor) and prompts.ndim == 1)
    if not single and not hasattr(prompts, "__len__"):
        return None
    n = 1 if single else len(prompts)
    return math.ceil(n / batch_size / (dist.get_world_size() if dist.is_initialized() else 1))


def _sites(schedule: Schedule, probes: Sequence[Probe]) -> list[tuple[str, str, Firing, tuple[Probe, ...]]]:
    """Every hook point that somebody wants, in firing order."""
    every = list(dict.fromkeys(hook for probe in probes for hook in probe.hooks))
    found: list[tuple[str, str, Firing, tuple[Probe, ...]]] = []
    for firing in schedule:
        for hook in every:
            watching = tuple(p for p in probes if hook in p.hooks and p.wants(hook, firing))
            if watching:
                found.append(
                    (f"blocks.{firing.index}.{act_name(hook, firing.index)}", hook, firing, watching)
                )
    return found


def _stop(schedule: Schedule, seen: Iterable[tuple[str, str, Firing, Any]]) -> int | None:
    """Where the forward may end: behind the last firing that somebody sees."""
    last = max((firing.index for _, _, firing, _ in seen), default=-1)
    return last + 1 if last + 1 < len(schedule) else None


def _watch(hook: str, firing: Firing, watching: tuple[Probe, ...], unseen: set[str]) -> Callable[..., None]:
    def see(value: Tensor, hook: Any, short: str = hook) -> None:
        unseen.discard(short)
        for probe in watching:
            probe.see(short, firing, value)

    return see


def _ends(model: HookedLoopedTransformer, batch: Batch, probes: Sequence[Probe], reference: int) -> Ends:
    """Each layer's values in the last of so many iterations."""
    with model.at_recurrences(reference):
        latest: dict[tuple[str, str, int], str] = {}
        for name, hook, firing, _ in _sites(model.schedule, probes):
            latest[hook, firing.segment, firing.layer] = name
        last = max(model.schedule.site(name).start for name in latest.values())
        ends: Ends = {}
        hooks: list[Any] = [
            (name, lambda value, hook, key=key: ends.__setitem__(key, value)) for key, name in latest.items()
        ]
        stop = last + 1 if last + 1 < len(model.schedule) else None
        model.run_with_hooks(batch.tokens, fwd_hooks=hooks, return_type=None, stop_at_layer=stop)
    return ends
