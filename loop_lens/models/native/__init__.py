"""The native looped decoder."""

from loop_lens.models.native.config import LoopedConfig
from loop_lens.models.native.modeling import LoopedOutput, LoopedTransformer

__all__ = ["LoopedConfig", "LoopedOutput", "LoopedTransformer"]
