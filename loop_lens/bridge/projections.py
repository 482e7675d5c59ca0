"""Queries, keys and values that transformer-lens split from a fused projection."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class SplitProjection:
    """One attention's queries, keys and values, kept equal to the fused projection they come from.

    They are parameters of their own, made once: training or moving the fused one leaves them behind.
    """

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.seen = self._state()

    def _state(self) -> tuple[tuple[int, int], ...]:
        fused = self.attention.qkv.original_component.parameters()
        return tuple((parameter.data_ptr(), parameter._version) for parameter in fused)

    def follow(self) -> None:
        """Split anew if the fused projection changed since."""
        state = self._state()
        if state == self.seen:
            return
        parts = self.attention.split_qkv_matrix(self.attention.original_component)
        with torch.no_grad():
            for name, part in zip("qkv", parts, strict=True):
                own = dict(getattr(self.attention, name).original_component.named_parameters())
                for key, parameter in part.named_parameters():
                    own[key].data = parameter.data
        self.seen = state


def split_projections(blocks: Iterable[nn.Module]) -> list[SplitProjection]:
    """Those of all blocks whose attention has a fused projection."""
    attentions: list[Any] = [getattr(block, "attn", None) for block in blocks]
    return [
        SplitProjection(attention)
        for attention in attentions
        if getattr(attention, "split_qkv_matrix", None) is not None and hasattr(attention, "qkv")
    ]
