"""Measuring while the model runs: prompts of any length go in, probes see every block, nothing is kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from loop_lens.bridge import HookedLoopedTransformer
from loop_lens.cache import act_name
from loop_lens.schedule import Blocks, Firing, Schedule
from loop_lens.schedule import Sequence as Segments

T = TypeVar("T")
_BUCKET = 32  # batches whose prompts are sorted by length together, so that little is padded


@dataclass(frozen=True)
class Batch:
    """Prompts that run together, padded on the right: no token of a causal model sees what follows it.

    Attributes:
        tokens: [prompt pos].
        mask: Whether a position holds a token rather than padding [prompt pos].
        index: Each prompt's place among those that were given, from 0.
    """

    tokens: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]
    index: tuple[int, ...]

    @property
    def lengths(self) -> Int[Tensor, " prompt"]:
        """Tokens of each prompt."""
        return self.mask.sum(-1)


Ends = dict[tuple[str, str, int], Tensor]
"""What the reference run left, by (hook, segment, layer)."""


class Probe(Protocol):
    """What measures one thing while batches run.

    Attributes:
        hooks: transformer-lens' short names of what it sees, e.g. ``("resid_post", "pattern")``.
    """

    hooks: tuple[str, ...]

    def wants(self, hook: str, firing: Firing) -> bool:
        """Whether it sees this hook of this firing."""
        ...

    def begin(self, batch: Batch, ends: Ends) -> None:
        """A batch is about to run; ``ends`` is empty without a reference."""
        ...

    def see(self, hook: str, firing: Firing, value: Tensor) -> None:
        """A value, in firing order. It may be kept, not written to."""
        ...

    def end(self) -> None:
        """The batch has run."""
        ...


class Mergeable(Protocol):
    """A result that takes in another one's prompts."""

    def merge(self, other: Any) -> Any: ...


def schedule_of(model: TransformerBridge) -> Schedule:
    """The firings of one forward; of a feed-forward model, its layers as one segment ``"blocks"``."""
    if isinstance(model, HookedLoopedTransformer):
        return model.schedule
    return Schedule(Segments(Blocks("blocks", int(model.cfg.n_layers))))


def device_of(model: TransformerBridge) -> torch.device:
    """Where the model's weights are."""
    return next(model.original_model.parameters()).device


def prompts_of(model: TransformerBridge, prompts: Any) -> Iterator[Int[Tensor, " pos"]]:
    """Prompts one by one, as tokens without padding.

    Args:
        model: For its tokenizer.
        prompts: Text; tokens [prompt pos]; a list (or any iterable) of texts or of tokens [pos]; or a
            ``datasets.Dataset`` (or any iterable of rows) with a column ``input_ids``, and perhaps
            ``attention_mask``, or a column ``text``.

    Raises:
        ValueError: If a prompt is none of these, or empty.
    """
    if isinstance(prompts, str) or (isinstance(prompts, Tensor) and prompts.ndim == 1):
        prompts = [prompts]
    for i, row in enumerate(prompts):
        mask = None
        if isinstance(row, dict):
            if "input_ids" not in row and "text" not in row:
                raise ValueError(
                    f"rows have the columns {', '.join(map(str, row))}: give one called 'text' or 'input_ids'"
                )
            mask, row = row.get("attention_mask"), row.get("input_ids", row.get("text"))
        if isinstance(row, str):
            tokens = model.to_tokens(row)[0]
        else:
            tokens = torch.as_tensor(row)
            tokens = tokens[0] if tokens.ndim == 2 and len(tokens) == 1 else tokens
        if tokens.ndim != 1 or (tokens.is_floating_point() and tokens.numel()):
            raise ValueError(
                f"prompt {i} is neither text nor tokens [pos], but {tokens.dtype} {tuple(tokens.shape)}"
            )
        if mask is not None:
            tokens = tokens[torch.as_tensor(mask).bool()]
        if tokens.numel() == 0:
            raise ValueError(f"prompt {i} has no tokens")
        yield tokens.cpu()


def batches_of(model: TransformerBridge, prompts: Any, batch_size: int) -> Iterator[Batch]:
    """Batches of prompts of similar length; under `torch.distributed`, this process's share of them.

    Raises:
        ValueError: If there are no prompts, or ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = iter(enumerate(prompts_of(model, prompts)))
    device = device_of(model)
    some = False
    while bucket := list(itertools.islice(rows, _BUCKET * batch_size * world)):
        some = True
        bucket = sorted(bucket[rank::world], key=lambda row: len(row[1]))
        for start in range(0, len(bucket), batch_size):
            chunk = bucket[start : start + batch_size]
            lengths = torch.tensor([len(tokens) for _, tokens in chunk])
            tokens = torch.nn.utils.rnn.pad_sequence([tokens.long() for _, tokens in chunk], batch_first=True)
            mask = torch.arange(tokens.shape[1]) < lengths[:, None]
            yield Batch(tokens.to(device), mask.to(device), tuple(i for i, _ in chunk))
    if not some:
        raise ValueError("there are no prompts")


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
        prompts: As for `prompts_of`; lengths may differ.
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
        last = max(model.schedule.locate(name).place.index for name in latest.values())  # type: ignore[union-attr]
        ends: Ends = {}
        hooks: list[Any] = [
            (name, lambda value, hook, key=key: ends.__setitem__(key, value)) for key, name in latest.items()
        ]
        stop = last + 1 if last + 1 < len(model.schedule) else None
        model.run_with_hooks(batch.tokens, fwd_hooks=hooks, return_type=None, stop_at_layer=stop)
    return ends


def shared(result: T) -> T:
    """Under `torch.distributed`, the result of all processes' prompts; otherwise the result itself.

    Every process gets it. Launch with ``accelerate launch`` (and create ``accelerate.PartialState()``) or
    ``torchrun``.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return result
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, result)
    merged = every[0]
    for other in every[1:]:
        merged = merged.merge(other)
    return merged
