"""What a sweep may leave out for a model: what its body claims, tried once by a small forward.

A body says where a forward resumes from one residual, and whether keys and values of earlier positions serve
for any later ones. A wrong claim would put every cell of a sweep off, so what two cells do not bear out is
dropped, with one warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.interventions.edits import foreign_hooks
from loop_lens.interventions.engine import Abilities, Engine
from loop_lens.interventions.plan import Batch, Cell

WHOLE = Abilities(batched=False, cached=False, resumed=False, joins=False)
"""Every cell by itself, from the first token through all firings."""
TOLERANCE = 1e-3
"""Largest error of a cell's logits, over the largest logit. Measured: 0 on every family, in float32, bfloat16 and
float16 up to 64 iterations on a CPU; 0.04 to 1.1 where a body claims too much. Kernels that round otherwise with other
shapes are allowed 16 roundings of the weights' precision."""

_TRIED: WeakKeyDictionary[HookedLoopedTransformer, dict[Abilities, Abilities]] = WeakKeyDictionary()
"""For each model what it claims, and what of that held."""


@torch.no_grad()
def abilities_of(model: HookedLoopedTransformer, tokens: Tensor) -> Abilities:
    """What may be left out for a model in its present state.

    Args:
        model: The model.
        tokens: Prompts [prompt pos] on which claims are tried.
    """
    if foreign_hooks(model) or model.body.order is not None:
        return WHOLE  # hooks that are not edits know nothing of copies and offsets
    resumed = [model.body.resume_at(firing.index) for firing in model.schedule]
    claimed = Abilities(
        cached=model.body.keeps_prefix,
        resumed=resumed[-1] is not None,
        joins=all(start == index for index, start in enumerate(resumed)),
    )
    tried = _TRIED.setdefault(model, {})
    if claimed not in tried:
        tried[claimed] = _held(model, tokens, claimed)
    return tried[claimed]


def _held(model: HookedLoopedTransformer, tokens: Tensor, claimed: Abilities) -> Abilities:
    """The most of what is claimed that two cells bear out: one within the loop, one at the last firing."""
    schedule, at = model.schedule, tokens.shape[1] // 2
    inside = [firing for firing in schedule if firing.iteration is not None]
    names = [f"blocks.{f.index}.hook_resid_pre" for f in (inside[len(inside) // 2], schedule[-1])]
    rows = [slice(k * len(tokens), (k + 1) * len(tokens)) for k in range(len(names))]
    whole = torch.cat(
        [model.run_with_hooks(tokens, fwd_hooks=[(name, _reversed(rows[0], at))]) for name in names]
    )
    limit = max(TOLERANCE, 16 * torch.finfo(next(model.original_model.parameters()).dtype).eps)
    lesser = (replace(claimed, resumed=False, joins=False), replace(claimed, cached=False))
    error = 0.0
    for abilities in dict.fromkeys((claimed, *lesser)):
        engine = Engine(model, tokens, abilities)
        offset = at if abilities.cached else 0
        starts = [engine.start_of([model.locate(name)]) for name in names]
        cells = tuple(Cell((), (), at, None, start, offset) for start in starts)
        engine.run_base(starts)
        batch = Batch(cells, min(starts), offset, min(starts) >= max(0, engine.joins_from()))
        hooks = [(name, _reversed(own, at - offset)) for name, own in zip(names, rows, strict=True)]
        inputs, options, hooks = engine.prepared(batch, hooks)
        logits = model.run_with_hooks(inputs, fwd_hooks=hooks, **options)
        parts = torch.cat([engine.assembled(logits[own], offset) for own in rows])
        error = max(error, off := _difference(parts, whole))
        if off <= limit:
            break
    else:
        abilities = WHOLE
    if abilities != claimed:
        lost = {
            "a forward resumes from one residual": claimed.resumed and not abilities.resumed,
            "keys and values of earlier positions can be kept": claimed.cached and not abilities.cached,
        }
        warnings.warn(
            f"{type(model.body).__name__} says that {' and that '.join(k for k, v in lost.items() if v)}, but a patch "
            f"computed so is off by {error:.2g} of the largest logit: sweeps of this model do without. Mend its "
            "resume_at() or keeps_prefix",
            stacklevel=4,
        )
    return abilities


def _reversed(rows: slice, start: int) -> Callable[[Tensor, Any], Tensor]:
    """A patch of the size of what is there: the stream from a position on, last dimension first."""

    def patch(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[rows, start:] = value[rows, start:].flip(-1)
        return value

    return patch


def _difference(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, over the largest logit; the same NaN or infinity is no difference."""
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    scale = wanted.nan_to_num(0, 0, 0).abs().max().clamp_min(1e-30)
    return float((got - wanted).masked_fill(same, 0).abs().max() / scale)
