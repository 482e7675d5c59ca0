"""Run many patched copies of a prompt, computing only what a patch can change.

The base run is kept: its stream at every firing where a batch starts, its keys and values, its
logits. A batch then starts at its first patched firing from the kept stream, and at its first
patched position with the kept keys and values before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.interventions.edits import active_edits
from loop_lens.interventions.plan import Batch
from loop_lens.unrolling.kv import CACHE_NAME
from loop_lens.unrolling.sites import Site

Hooks = list[tuple[str, Callable[..., Any]]]


class _Prefix(DynamicLayer):
    """Keys and values of earlier positions, for as many copies of their prompts as are asked for.

    What is added is returned and not kept: a batch runs once.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.device, self.dtype = keys.device, keys.dtype
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        copies = key_states.shape[0] // self.keys.shape[0]
        return tuple(
            torch.cat([_copies(kept, copies), new], dim=-2)
            for kept, new in ((self.keys, key_states), (self.values, value_states))
        )


def _join(rows: Tensor) -> Callable[..., Tensor]:
    return lambda value, hook: torch.cat([value, rows])


def _copies(values: Tensor, n: int) -> Tensor:
    """Copies of a batch, one after the other; a view where the batch is one prompt."""
    if len(values) == 1:
        return values.expand(n, *values.shape[1:])
    return values.repeat(n, *[1] * (values.ndim - 1))


@dataclass(frozen=True)
class Abilities:
    """What the engine may leave out for a model in its present state.

    Attributes:
        batched: Whether several cells may run in one forward.
        cached: Whether keys and values of earlier positions may be reused.
        resumed: Whether a forward may start at a later firing.
        joins: Whether rows may join a forward at a later firing.
    """

    batched: bool = True
    cached: bool = True
    resumed: bool = True
    joins: bool = True


class Engine:
    """Runs batches of cells on top of one base run.

    Args:
        model: The model.
        tokens: The base run's tokens [prompt pos].
        abilities: What may be left out.
    """

    def __init__(self, model: HookedLoopedTransformer, tokens: Tensor, abilities: Abilities) -> None:
        self.model, self.tokens, self.abilities = model, tokens, abilities
        self.edits = active_edits(model)
        self.n_prompts, self.n_positions = tokens.shape
        forward = inspect.signature(type(model.original_model).forward).parameters
        self.picks_logits = "logits_to_keep" in forward
        self.logits: Tensor = torch.empty(0)
        self.kept: dict[str, Tensor] = {}
        self.prefix: list[tuple[Tensor, Tensor]] = []

    def start_of(self, sites: Sequence[Site]) -> int:
        """The firing from which a forward must run to intervene at these sites; -1 for the tokens."""
        if not self.abilities.resumed:
            return -1
        start = min(site.start for site in sites)
        # What an edit reads must fire in the same forward as the edit.
        for edit in self.edits:
            if self.model.locate(edit.name).start >= start:
                reads = (self.model.locate(name).start for name in edit.reads)
                start = min([start, *reads])
        if start < 0:
            return -1
        resumed = self.model.body.resume_at(start)
        return -1 if resumed is None else resumed

    def run_base(self, starts: Iterable[int], names: Sequence[str] = ()) -> Mapping[str, Tensor]:
        """Run the base prompts; keep what batches with these starts need.

        Returns:
            The values of the hooks ``names``.
        """
        model = self.model
        kept = [f"blocks.{start}.hook_resid_pre" for start in sorted(set(starts)) if start >= 0]
        if kept and "hook_prelude_out" in model.schedule.sites:
            kept.append("hook_prelude_out")
        wanted = [*dict.fromkeys([*kept, *(model.registry.flat(name) for name in names)])]
        cache = DynamicCache()
        options: dict[str, Any] = {CACHE_NAME: cache, "use_cache": True} if self.abilities.cached else {}
        logits, values = model.run_with_cache(self.tokens, names_filter=wanted, **options)
        self.logits = logits
        self.kept = {name: values[name] for name in kept}
        if self.abilities.cached:
            layers: list[Any] = list(cache.layers)
            self.prefix = [(layer.keys, layer.values) for layer in layers]
        return values

    def run(self, batch: Batch, hooks: Hooks, *, position: int | None = None) -> Tensor:
        """Run a batch with hooks.

        Args:
            batch: Its start, its offset, and how many copies of the prompts it takes.
            hooks: Hooks by name; values there hold the positions from the batch's offset on.
            position: The only position whose logits are needed.

        Returns:
            Logits [copies * prompt, pos, vocab] of the positions from the offset on, or of the one.
        """
        inputs, options, hooks = self.prepared(batch, hooks)
        if position is not None and self.picks_logits:
            options["logits_to_keep"] = torch.tensor([position - batch.offset])
        logits = self.model.run_with_hooks(inputs, fwd_hooks=hooks, **options)
        if position is not None and not self.picks_logits:
            logits = logits[:, position - batch.offset].unsqueeze(1)
        return logits

    def prepared(self, batch: Batch, hooks: Hooks) -> tuple[Tensor, dict[str, Any], Hooks]:
        """What a batch's forward takes: its input, options and hooks."""
        model, copies, offset = self.model, len(batch.cells), batch.offset
        options: dict[str, Any] = {}
        if copies > 1:
            options["rows"] = torch.arange(self.n_prompts).repeat(copies)
        if offset:
            cache: Any = DynamicCache()
            cache.layers = [_Prefix(k[..., :offset, :], v[..., :offset, :]) for k, v in self.prefix]
            options |= {CACHE_NAME: cache, "use_cache": True}
        initial = model.initial_state
        first_loop = model.schedule.boundaries[0].first
        if isinstance(initial, Tensor) and batch.start < first_loop:
            state = initial if len(initial) == 1 else _copies(initial, copies)
            stop = self.n_positions
            options["initial_state"] = state[:, offset:stop].expand(copies * self.n_prompts, -1, -1)
        if batch.start < 0:
            inputs = self.tokens[:, offset:].repeat(copies, 1)
        else:
            inputs = self._stream(batch.start, offset, batch.copies_at(batch.start))
            options["start_at_layer"] = batch.start
            if batch.start >= first_loop and "hook_prelude_out" in self.kept:
                options["prelude_out"] = self.kept["hook_prelude_out"][:, offset:]
            hooks = [*self._joins(batch), *hooks]
        return inputs, options, hooks

    def _stream(self, firing: int, offset: int, copies: int) -> Tensor:
        """Copies of the base run's stream that enters a firing."""
        return _copies(self.kept[f"blocks.{firing}.hook_resid_pre"][:, offset:], copies)

    def _joins(self, batch: Batch) -> Hooks:
        """Hooks that add rows to the stream where later cells of a batch start."""
        hooks: Hooks = []
        if batch.joins:
            for start in sorted({cell.start for cell in batch.cells} - {batch.start}):
                copies = sum(cell.start == start for cell in batch.cells)
                name = f"blocks.{start}.hook_resid_pre"
                hooks.append((name, _join(self._stream(start, batch.offset, copies))))
        return hooks

    def joins_from(self) -> int:
        """First firing from which rows may join: before it, what is injected depends on the rows."""
        if not self.abilities.joins:
            return len(self.model.schedule)
        return self.model.schedule.boundaries[0].first if self.model.body.injects else 0

    def assembled(self, logits: Tensor, offset: int) -> Tensor:
        """Logits [prompt pos vocab] of whole prompts, from those of the positions from offset on."""
        return torch.cat([self.logits[:, :offset], logits], dim=1) if offset else logits

    def max_tokens(self, budget: int, *, all_logits: bool) -> int:
        """How many tokens one batch may have to stay within a budget in bytes, beyond the base run."""
        cfg: Any = self.model.cfg
        bytes_each = max(2, self.logits.element_size() if self.logits.numel() else 4)
        n = self.n_positions
        d_mlp = int(getattr(cfg, "d_mlp", None) or 4 * cfg.d_model)
        # Live at once within a block: about four of the MLP's width, twenty of the stream's, scores and
        # mask per head, keys and values with their prefix. Measured in benchmarks/patching.py: peaks of 6, 15
        # and 47 MiB under budgets of 4, 16 and 64.
        token = 4 * d_mlp + 20 * cfg.d_model + 3 * cfg.n_heads * n + 4 * n
        if all_logits:
            token += 3 * cfg.d_vocab
        else:
            token += 3 * cfg.d_vocab // n
        return max(1, budget // (token * bytes_each))
