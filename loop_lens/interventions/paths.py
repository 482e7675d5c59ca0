"""Path patching: the effect of one site through chosen paths only.

A sender gets the donor run's value. Every attention and MLP output after it is held at its value of
the base run, except those of the mediators, and the receivers' values in that run are what reached
them: directly through the stream (norms, injections and ends of iterations included) or through
mediators. A second run gives one receiver that value, and is free otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.bridge.names import find_sites
from loop_lens.figures.canvas import new_figure
from loop_lens.figures.heatmap import draw_heatmap
from loop_lens.interventions.grid import Direction, Pair
from loop_lens.interventions.metrics import MetricLike, bind, per_prompt
from loop_lens.interventions.where import require_head
from loop_lens.measuring.results import Result, require_alike
from loop_lens.unrolling.numbers import plain
from loop_lens.unrolling.sites import Firing, Site
from loop_lens.unrolling.tree import Iteration

Hook = tuple[str, Callable[..., Any]]


@dataclass(frozen=True)
class PathNode:
    """One site of one firing, or one head of it.

    Attributes:
        site: ``"z"``, ``"q"``, ``"k"``, ``"v"``, ``"attn_out"``, ``"mlp_out"``, ``"resid_pre"``, ...
        iteration: Iteration; None outside loops.
        layer: Layer within the segment.
        head: Head, for sites that have heads; all of them by default.
        segment: Segment; the innermost loop by default.

    Example:
        >>> from loop_lens.interventions import PathNode
        >>> str(PathNode("z", iteration=0, layer=1, head=3))
        't0.l1.z.h3'
    """

    site: str
    iteration: Iteration = None
    layer: int = 0
    head: int | None = None
    segment: str | None = None

    def __post_init__(self) -> None:
        for name in ("iteration", "layer", "head"):
            object.__setattr__(self, name, plain(getattr(self, name)))

    def __str__(self) -> str:
        where = [] if self.segment is None else [self.segment]
        where += [] if self.iteration is None else [f"t{self.iteration}"]
        where += [f"l{self.layer}", self.site]
        return ".".join(where) + ("" if self.head is None else f".h{self.head}")

    def at(self, model: HookedLoopedTransformer) -> Site:
        """Where it is.

        Raises:
            UnknownNameError: If the model has no such site.
            ValueError: If it has no such head.
        """
        segment = self.segment or model.schedule.innermost_loop
        found = find_sites(model, self.site, iteration=self.iteration, layer=self.layer, segment=segment)[0]
        if self.head is not None:
            if found.layout == "stream":
                raise ValueError(f"{self} names a head, but {self.site} has none")
            require_head(model, found, self.head)
        return found

    def part(self, layout: str) -> tuple[Any, ...]:
        """The index of its head in a value."""
        if self.head is None:
            return (slice(None),)
        return (slice(None), self.head) if layout == "pattern" else (slice(None), slice(None), self.head)


@dataclass(frozen=True)
class PathResult(Result):
    """A metric under path patches.

    Attributes:
        values: The metric, averaged over prompts [sender receiver].
        senders: The senders, as text.
        receivers: The receivers, as text; ``"logits"`` for the logits.
        clean: The metric of the clean run.
        corrupted: The metric of the corrupted run.
        direction: ``"denoising"`` or ``"noising"``.
        n_prompts: Number of prompts that the means are over.

    Example:
        >>> from loop_lens.interventions import LogitDiff, PathNode, path_patch
        >>> other, metric = "a c c b b a ? b -> -> ->", LogitDiff("c", "a", position=-3)
        >>> sender = PathNode("mlp_out", iteration=0, layer=1)
        >>> path_patch(model, prompt, other, metric, senders=sender).to_dataframe().columns.tolist()
        ['sender', 'receiver', 'value', 'effect']
    """

    values: Tensor
    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    clean: float
    corrupted: float
    direction: str
    n_prompts: int = 1

    def merge(self, other: Self) -> Self:
        """The effects over both results' prompts."""
        require_alike(self, other, "senders", "receivers", "direction")
        n = self.n_prompts + other.n_prompts
        mine, theirs = self.n_prompts / n, other.n_prompts / n
        return replace(
            self,
            values=self.values * mine + other.values * theirs,
            clean=self.clean * mine + other.clean * theirs,
            corrupted=self.corrupted * mine + other.corrupted * theirs,
            n_prompts=n,
        )

    @property
    def effect(self) -> Tensor:
        """Change of the metric by each path [sender receiver]."""
        return self.values - (self.corrupted if self.direction == "denoising" else self.clean)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per sender and receiver: value and effect."""
        return pd.DataFrame(
            [
                {"sender": sender, "receiver": receiver, "value": value, "effect": effect}
                for sender, values, effects in zip(
                    self.senders, self.values.tolist(), self.effect.tolist(), strict=True
                )
                for receiver, value, effect in zip(self.receivers, values, effects, strict=True)
            ]
        )

    def plot(self) -> Any:
        """A heat map of the effects; a matplotlib figure, not shown."""
        figure, axes = new_figure(
            2 + 0.4 * max(4, len(self.receivers)), 1.5 + 0.3 * max(3, len(self.senders))
        )
        image = draw_heatmap(
            axes,
            self.effect.cpu(),
            rows=list(self.senders),
            columns=list(self.receivers),
            row_name="sender",
            column_name="receiver",
        )
        figure.colorbar(image, ax=axes, label="change of the metric")
        return figure


def _text(receiver: PathNode | None) -> str:
    return "logits" if receiver is None else str(receiver)


@torch.no_grad()
def path_patch(
    model: HookedLoopedTransformer,
    clean: Any,
    corrupted: Any,
    metric: MetricLike,
    *,
    senders: PathNode | Sequence[PathNode],
    receivers: PathNode | Sequence[PathNode | None] | None = None,
    mediators: Sequence[PathNode] | Literal["all"] = (),
    direction: Direction = "denoising",
    progress: bool = True,
) -> PathResult:
    """Patch paths between sites, of the same or of different iterations.

    Args:
        model: The model.
        clean: As in `loop_lens.patch_sweep`.
        corrupted: As in `loop_lens.patch_sweep`.
        metric: As in `loop_lens.patch_sweep`.
        senders: Sites that get the donor's value, one at a time: ``PathNode("z", iteration=0, layer=1, head=3)``.
        receivers: Sites that read what comes of it, one at a time: ``PathNode("q", iteration=2, layer=0,
            head=1)``; None for the logits.
        mediators: Attention (``"attn_out"``, or ``"z"`` with a head) and MLPs (``"mlp_out"``) on the way
            that may pass on what reaches them. None of them: direct paths. ``"all"``: every path, which
            for the logits is the plain patch of the sender.
        direction: As in `loop_lens.patch_sweep`.
        progress: Whether to show a progress bar, for work beyond two seconds.

    Raises:
        ValueError: If a receiver fires before a sender, or a mediator is neither attention nor MLP.
        UnknownNameError: If a node does not exist.

    Source:
        Wang et al., arXiv 2211.00593, appendix B; here the stream between sender and receiver keeps the
        norms and injections of the loop, so "direct" holds on streams that are not one sum, too.

    Example:
        >>> from loop_lens.interventions import LogitDiff, PathNode, path_patch
        >>> other, metric = "a c c b b a ? b -> -> ->", LogitDiff("c", "a", position=-3)
        >>> to = PathNode("q", iteration=2, layer=0, head=1)
        >>> sender = PathNode("mlp_out", iteration=0, layer=1)
        >>> path_patch(model, prompt, other, metric, senders=sender, receivers=[to, None]).effect.shape
        torch.Size([1, 2])
    """
    measure = bind(metric, model)
    pair = Pair.of(model, clean, corrupted, direction)
    froms = (senders,) if isinstance(senders, PathNode) else tuple(senders)
    tos = (receivers,) if isinstance(receivers, PathNode) or receivers is None else tuple(receivers)
    if not froms or not tos:
        raise ValueError("give at least one sender and one receiver (None for the logits)")
    _require_order(model, froms, tos)
    held = _held(model, mediators)
    places = {node: node.at(model) for node in (*froms, *tos) if node is not None}
    names = [*dict.fromkeys([*(s.flat for s in places.values()), *(name for name, _ in held)])]
    donor_logits, donor = model.run_with_cache(pair.donor, names_filter=[places[node].flat for node in froms])
    base_logits, base = model.run_with_cache(pair.base, names_filter=names)
    values = torch.full((len(froms), len(tos)), float("nan"))
    with tqdm(total=values.numel(), desc="paths", delay=2, disable=not progress, leave=False) as bar:
        for i, sender in enumerate(froms):
            where = places[sender]
            patch = _put(sender, where, donor[where.flat])
            seen: dict[str, Tensor] = {}
            hooks: list[Hook] = [(where.flat, patch), *_hold(model, held, base, where)]
            hooks += [(places[n].flat, _see(seen, places[n].flat)) for n in tos if n is not None]
            logits = model.run_with_hooks(pair.base, fwd_hooks=hooks)
            for j, receiver in enumerate(tos):
                if receiver is None:
                    values[i, j] = _mean(measure, logits, len(pair.base))
                else:
                    there = places[receiver]
                    reached = [(there.flat, _put(receiver, there, seen[there.flat]))]
                    values[i, j] = _mean(
                        measure, model.run_with_hooks(pair.base, fwd_hooks=reached), len(pair.base)
                    )
                bar.update()
    plain = (_mean(measure, logits, len(pair.base)) for logits in (base_logits, donor_logits))
    clean_value, corrupted_value = pair.by_role(*plain)
    return PathResult(
        values=values,
        senders=tuple(map(str, froms)),
        receivers=tuple(map(_text, tos)),
        clean=clean_value,
        corrupted=corrupted_value,
        direction=direction,
        n_prompts=len(pair.base),
    )


def _mean(measure: MetricLike, logits: Tensor, n: int) -> float:
    return float(per_prompt(measure(logits), n)[0].float().mean())


def _require_order(
    model: HookedLoopedTransformer, senders: Sequence[PathNode], receivers: Sequence[PathNode | None]
) -> None:
    for sender in senders:
        for receiver in receivers:
            if receiver is None:
                continue
            if receiver.at(model).start < sender.at(model).start:
                raise ValueError(f"{receiver} fires before {sender}: nothing can reach it")


def _held(
    model: HookedLoopedTransformer, mediators: Sequence[PathNode] | Literal["all"]
) -> list[tuple[str, list[int]]]:
    """Hooks to hold, each with the heads that stay free; none where mediators are all."""
    if mediators == "all":
        return []
    free: dict[tuple[str, str], list[int | None]] = {}
    for node in mediators:
        assert isinstance(node, PathNode)
        kind = {"attn_out": "attn", "z": "attn", "mlp_out": "mlp"}.get(node.site)
        place = node.at(model).place
        if kind is None or not isinstance(place, Firing):
            raise ValueError(f"the mediator {node} is neither attention (attn_out, z) nor an MLP (mlp_out)")
        free.setdefault((place.prefix, kind), []).append(node.head)
    held: list[tuple[str, list[int]]] = []
    for firing in model.schedule:
        heads = free.get((firing.prefix, "attn"))
        if heads is None:
            held.append((model.locate(f"{firing.prefix}.hook_attn_out").flat, []))
        elif None not in heads:
            held.append(
                (model.locate(f"{firing.prefix}.attn.hook_z").flat, [h for h in heads if h is not None])
            )
        if (firing.prefix, "mlp") not in free:
            held.append((model.locate(f"{firing.prefix}.hook_mlp_out").flat, []))
    return held


def _hold(
    model: HookedLoopedTransformer, held: Sequence[tuple[str, list[int]]], base: Any, sender: Site
) -> list[Hook]:
    """Hooks that hold what comes after the sender."""
    start = sender.start
    own = sender.flat.rsplit(".", 1)[-1]
    within = own not in ("hook_resid_pre", "hook_in")  # part of its own attention or MLP
    hooks: list[Hook] = []
    for name, free in held:
        firing = model.locate(name).place
        assert isinstance(firing, Firing)
        if firing.index < start or name == sender.flat:
            continue
        is_attn = "attn" in name
        in_attn = ".attn." in sender.flat or own in ("hook_attn_out",)
        if firing.index == start and within and isinstance(sender.place, Firing) and is_attn == in_attn:
            continue
        hooks.append((name, _fix(base[name], free)))
    return hooks


def _fix(value: Tensor, free: list[int]) -> Callable[..., Tensor]:
    def fix(now: Tensor, hook: Any) -> Tensor:
        fixed = value.to(now.dtype).clone()
        if free:
            fixed[:, :, free] = now[:, :, free]
        return fixed

    return fix


def _put(node: PathNode, where: Site, value: Tensor) -> Callable[..., Tensor]:
    part = node.part(where.layout)

    def put(now: Tensor, hook: Any) -> Tensor:
        now = now.clone()
        now[part] = value[part]
        return now

    return put


def _see(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def see(value: Tensor, hook: Any) -> None:
        seen[name] = value.clone()

    return see
