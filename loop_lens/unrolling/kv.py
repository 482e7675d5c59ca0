"""The key-value cache as one firing sees it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.masking_utils import create_causal_mask

CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What transformers calls the key-value cache: 5.24 renamed it."""


class CacheSlot:
    """A key-value cache seen by one firing: whatever layer the block asks for, it gets its own.

    The first firing of a block has the slot that the plain model would use; the others follow
    behind the plain model's slots.
    """

    def __init__(self, cache: Any, slot: int, like: int) -> None:
        self._cache, self._slot, self._like = cache, slot, like

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Add keys and values to the firing's slot, as ``transformers.Cache.update``."""
        self._grow()
        return self._cache.update(keys, values, self._slot, *args, **kwargs)

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        """Add keys of a sparse attention's indexer to the firing's slot."""
        self._grow()
        return self._cache.update_indexer(keys, self._slot)

    def _grow(self) -> None:
        layers = self._cache.layers
        replicates = getattr(self._cache, "layer_class_to_replicate", None) is not None
        while not replicates and len(layers) <= self._slot:
            layers.append(_fresh_layer(layers[self._like]))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the firing's slot."""
        return 0 if self._slot >= len(self._cache.layers) else self._cache.get_seq_length(self._slot)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _fresh_layer(layer: Any) -> Any:
    window = getattr(layer, "sliding_window", None)
    if type(layer).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer"):
        raise ValueError(
            f"a looped model needs a cache that can grow by layers, got one of {type(layer).__name__}: "
            "use transformers.DynamicCache"
        )
    return type(layer)() if window is None else type(layer)(sliding_window=window)


def past_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Positions in the key-value cache that a call passes, under whatever name; 0 without one."""
    caches = (value for value in (*kwargs.values(), *args) if isinstance(value, Cache))
    return next((int(cache.get_seq_length()) for cache in caches), 0)
