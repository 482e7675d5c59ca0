"""Published weights as native ones and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from loop_lens.models.checkpoint import require_fitting, require_shapes
from loop_lens.models.files import reading

Split = Callable[[Tensor], tuple[Tensor, ...]]
Join = Callable[..., Tensor]


@dataclass(frozen=True)
class Entry:
    """One published tensor and the native parameters that hold its content.

    Attributes:
        published: Its name in the checkpoint.
        native: Names of the parameters.
        split: Published tensor to parameters.
        join: Parameters to the published tensor, the inverse.
    """

    published: str
    native: tuple[str, ...]
    split: Split
    join: Join


def same(published: str, native: str) -> Entry:
    """An entry whose tensor is a parameter as it is."""
    return Entry(published, (native,), lambda t: (t,), lambda t: t)


def fused(published: str, native: Iterable[str], rows: Iterable[int], heads: Iterable[int] = ()) -> Entry:
    """An entry that stacks parameters along their rows.

    Args:
        published: Name in the checkpoint.
        native: Names of the parameters, in the order of the stack.
        rows: Rows of each.
        heads: For the first parameters, number of heads whose rows are in interleaved RoPE order;
            0 or nothing for those to be taken as they are.
    """
    names, sizes, interleaved = tuple(native), list(rows), list(heads)
    interleaved += [0] * (len(names) - len(interleaved))

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        parts = tensor.split(sizes)
        return tuple(rope_to_half(p, h) if h else p for p, h in zip(parts, interleaved, strict=True))

    def join(*parts: Tensor) -> Tensor:
        return torch.cat(
            [rope_to_interleaved(p, h) if h else p for p, h in zip(parts, interleaved, strict=True)]
        )

    return Entry(published, names, split, join)


def rope_to_half(rows: Tensor, heads: int) -> Tensor:
    """Reorder projection rows [head * d_head, ...] from interleaved RoPE pairs to rotated halves."""
    d_head = rows.shape[0] // heads
    shaped = rows.reshape(heads, d_head // 2, 2, *rows.shape[1:])
    return shaped.transpose(1, 2).reshape(rows.shape)


def rope_to_interleaved(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `rope_to_half`."""
    d_head = rows.shape[0] // heads
    shaped = rows.reshape(heads, 2, d_head // 2, *rows.shape[1:])
    return shaped.transpose(1, 2).reshape(rows.shape)


def to_native(
    published: Mapping[str, Tensor],
    entries: Iterable[Entry],
    native: Mapping[str, Tensor],
    *,
    ignored: Iterable[str] = (),
    source: str = "the checkpoint",
) -> dict[str, Tensor]:
    """Map a published checkpoint onto native parameters.

    Args:
        published: Tensors by published name.
        entries: The family's map.
        native: The model's own parameters, for their shapes (they may be on the meta device).
        ignored: Published names that hold nothing to load.
        source: What to call the checkpoint in errors.

    Raises:
        WeightsError: If weights are missing, unknown or misshapen; names them.
    """
    entries = list(entries)
    wanted = {entry.published for entry in entries}
    require_fitting(
        source,
        missing=wanted - set(published),
        unknown=set(published) - wanted - set(ignored),
    )
    layout = getattr(published, "layout", published)  # a checkpoint knows shapes before it reads tensors
    with reading(f"{source}: its config.json"):
        wants = {e.published: e.join(*(native[n].to("meta") for n in e.native)) for e in entries}
    require_shapes(source, layout, wants)
    loaded: dict[str, Tensor] = {}
    for entry in tqdm(entries, desc="loading weights", delay=2, leave=False):
        for name, part in zip(entry.native, entry.split(published[entry.published]), strict=True):
            loaded[name] = part.contiguous()
    return loaded
