"""The native looped decoder."""

from loop_lens.model.config import LoopedConfig
from loop_lens.model.modeling import LoopedOutput, LoopedTransformer

__all__ = ["LoopedConfig", "LoopedOutput", "LoopedTransformer"]
