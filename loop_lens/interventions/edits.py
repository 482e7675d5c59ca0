"""Edits: changes of sites that also hold when rows are repeated or a key-value cache is in use.

A plain hook sees a tensor and must guess which prompts and positions its entries are. An edit is
told: `View.rows` are the prompts of a batch's rows, `View.offset` the positions that came before.
That is what lets a sweep run many patched copies of a prompt at once, from the patched position on,
while an edit is in force, and what makes edits right in every step of ``generate``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.bridge.names import Shown
from loop_lens.unrolling.sites import Layout, layout_of


@dataclass(frozen=True)
class View:
    """How the tensor at a site relates to the prompts.

    Attributes:
        layout: How it is indexed.
        offset: Positions before its first one.
        rows: The prompt of each row [batch], None where row i is prompt i.
        live: Values of the sites that the edit reads, in this very forward.

    Example:
        >>> from loop_lens.interventions import edit
        >>> def double_from_the_fifth(value, view):
        ...     position = view.offset + torch.arange(view.length(value))
        ...     return torch.where(position[:, None] < 5, value, 2 * value)
        >>> with edit(model, "mlp_out", double_from_the_fifth, iterations=0):
        ...     changed = model(prompt)
        >>> (changed != model(prompt)).any(-1)[0].tolist().index(True)
        5
    """

    layout: Layout
    offset: int
    rows: Tensor | None
    live: dict[str, Tensor]

    def length(self, value: Tensor) -> int:
        """Number of (query) positions in a value."""
        return value.shape[2 if self.layout == "pattern" else 1]

    def take(self, values: Tensor, like: Tensor) -> Tensor:
        """The part of values, given for whole prompts, that stands where ``like`` stands.

        Positions beyond the values given are those of ``like``.
        """
        values = values.to(like.device, like.dtype)
        dim = 2 if self.layout == "pattern" else 1
        n, have = self.length(like), values.shape[dim]
        stop = min(self.offset + n, have)
        if stop <= self.offset:
            return like
        part = values.narrow(dim, self.offset, stop - self.offset)
        if part.shape[0] > 1 and self.rows is not None:
            part = part[self.rows.to(part.device)]
        if part.shape[0] not in (1, like.shape[0]):
            raise ValueError(f"values of {part.shape[0]} prompts do not fit a batch of {like.shape[0]}")
        if self.layout == "pattern":
            part = _fit_keys(part, like.shape[-1])
        part = part.expand(like.shape[0], *part.shape[1:])
        if stop < self.offset + n:
            rest = like.narrow(dim, stop - self.offset, self.offset + n - stop)
            part = torch.cat([part, rest], dim=dim)
        return part


def _fit_keys(pattern: Tensor, n_keys: int) -> Tensor:
    """A causal pattern with more or fewer keys: those beyond its queries are never attended to."""
    missing = n_keys - pattern.shape[-1]
    return torch.nn.functional.pad(pattern, (0, missing)) if missing > 0 else pattern[..., :n_keys]


@dataclass(frozen=True)
class Edit:
    """One change of one site.

    Attributes:
        name: The site's hook, in either spelling.
        change: From the value there and the view of it to the value that goes on.
        reads: Hooks, earlier in the same forward, whose values the change needs.
        positions: Positions to change, from 0; all by default.
        heads: Heads to change; all by default.

    Example:
        >>> from loop_lens.interventions import Edit, Surgery
        >>> zero = Edit("loop.2.blocks.1.hook_mlp_out", lambda value, view: 0 * value, positions=(8,))
        >>> with Surgery(model, [zero]):
        ...     _, cache = model.run_with_cache(prompt)
        >>> cache["loop.2.blocks.1.hook_mlp_out"][0, 8].abs().max().item()
        0.0
    """

    name: str
    change: Callable[[Tensor, View], Tensor]
    reads: tuple[str, ...] = ()
    positions: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    def apply(self, value: Tensor, view: View) -> Tensor:
        """The value with the edit's positions and heads changed."""
        changed = self.change(value, view)
        if changed is value:
            return value
        if changed.shape != value.shape:
            raise ValueError(
                f"an edit of {self.name} gives shape {tuple(changed.shape)}, but the value there has "
                f"{tuple(value.shape)}"
            )
        if self.positions is None and self.heads is None:
            return changed
        mask = torch.ones_like(value, dtype=torch.bool)
        if self.positions is not None:
            n = view.length(value)
            chosen = torch.zeros(n, dtype=torch.bool)
            inside = [p - view.offset for p in self.positions if 0 <= p - view.offset < n]
            chosen[inside] = True
            shape = [1] * value.ndim
            shape[2 if view.layout == "pattern" else 1] = n
            mask &= chosen.view(shape).to(value.device)
        if self.heads is not None:
            dim = {"pattern": 1, "heads": 2}[view.layout]
            chosen = torch.zeros(value.shape[dim], dtype=torch.bool)
            chosen[list(self.heads)] = True
            shape = [1] * value.ndim
            shape[dim] = value.shape[dim]
            mask &= chosen.view(shape).to(value.device)
        return torch.where(mask, changed, value)


@dataclass
class Surgery:
    """Edits in force within a context: ``with surgery: ...``, around any run of the model.

    Leaving the context takes them away, whatever happened in it, and so does losing the last reference to one
    that was entered by hand. Contexts nest.

    Attributes:
        model: The model.
        edits: What to change.

    Example:
        >>> from loop_lens.interventions import skip, steer
        >>> surgery = skip(model, 3)
        >>> with surgery, steer(model, torch.ones(64), iterations=0):
        ...     logits = model(prompt)
        >>> [edit.name for edit in surgery.edits]
        ['loop.3.hook_state_out']
    """

    model: HookedLoopedTransformer
    edits: Sequence[Edit]
    _hooks: AbstractContextManager[Any] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for one in self.edits:
            _, hook = self.model.locate(one.name)
            layout = layout_of(hook)
            if one.heads is not None and layout == "stream":
                raise ValueError(f"{one.name} has no heads: heads are in z, q, k, v, pattern, attn_scores")
            if any(p < 0 for p in one.positions or ()):
                raise ValueError("positions of an edit count from 0: the prompt's length is not known here")
            for name in one.reads:
                self.model.locate(name)

    def __enter__(self) -> HookedLoopedTransformer:
        if self._hooks is not None:
            raise RuntimeError("this surgery is in force already")
        reads = dict.fromkeys(name for one in self.edits for name in one.reads)
        hooks: list[Any] = [(name, _Reader(self.model, name)) for name in reads]
        hooks += [(one.name, _Editor(self.model, one)) for one in self.edits]
        context = self.model.hooks(fwd_hooks=hooks)
        context.__enter__()
        self._hooks = context
        return self.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        context, self._hooks = self._hooks, None
        if context is not None:
            context.__exit__(None, None, None)


def active_edits(model: HookedLoopedTransformer) -> list[Edit]:
    """The edits in force on a model."""
    return [hook.edit for _, hook in _hooks_of(model) if isinstance(hook, _Editor)]


def foreign_hooks(model: HookedLoopedTransformer) -> list[str]:
    """Names of hook points with forward hooks that are not edits: these know nothing of rows."""
    return [point.name or "?" for point, hook in _hooks_of(model) if not isinstance(hook, _Reader | _Editor)]


def _hooks_of(model: HookedLoopedTransformer) -> Iterator[tuple[HookPoint, Any]]:
    """Every forward hook that was put on a hook point, with the point."""
    for point in model.registry.existing():
        for handle in point.fwd_hooks:
            function = handle.user_hook
            yield point, function.function if isinstance(function, Shown) else function


@dataclass
class _Reader:
    """Keeps a site's value for the edits of the same forward."""

    model: HookedLoopedTransformer
    name: str

    def __call__(self, value: Tensor, hook: Any) -> None:
        run = self.model.body.run
        if run is not None:
            run.notes.setdefault("live", {})[self.name] = value.clone()


@dataclass
class _Editor:
    """Applies an edit."""

    model: HookedLoopedTransformer
    edit: Edit
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        self.layout = layout_of(self.model.locate(self.edit.name).hook)

    def __call__(self, value: Tensor, hook: Any) -> Tensor | None:
        run = self.model.body.run
        if run is None:
            return None
        live = run.notes.get("live", {})
        # More rows may join later in the forward.
        rows = None if run.rows is None else run.rows[: len(value)]
        view = View(self.layout, run.offset, rows, live)
        return self.edit.apply(value, view)
