"""One forward of the native model under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from loop_lens.unrolling.kv import CacheSlot


@dataclass
class Pass:
    """One forward under way: what its parts share.

    Attributes:
        shared: Arguments of every block: mask, positions, rotary embeddings, cache.
        past: Number of positions in the cache before this forward.
        times: Number of iterations.
        outputs: What the firings so far have put out, None where nobody asked.
    """

    shared: dict[str, Any]
    past: int
    times: int
    outputs: list[Tensor] | None

    def through(self, blocks: nn.ModuleList, stream: Tensor, slots: int | None = None) -> Tensor:
        """The stream [batch pos d_model] after these blocks.

        Args:
            blocks: The blocks.
            stream: What enters them.
            slots: Where their own slots of the key-value cache begin; each block's first by default.
        """
        for layer, block in enumerate(blocks):
            shared, cache = self.shared, self.shared["past_key_values"]
            if slots is not None and cache is not None:
                attention: Any = block.self_attn
                slot = CacheSlot(cache, slots + layer, attention.layer_idx)
                shared = {**shared, "past_key_values": slot}
            stream = block(stream, **shared)
            if self.outputs is not None:
                self.outputs.append(stream)
        return stream
