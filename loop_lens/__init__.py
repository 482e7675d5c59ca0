"""Hook points for every iteration and layer of looped language models."""

import importlib
from typing import Any

from loop_lens.bridge.cache import LoopCache
from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.interventions.results import SweepResult
from loop_lens.interventions.sweep import patch_sweep
from loop_lens.lenses.attribution import attribute
from loop_lens.lenses.readout import lens
from loop_lens.models.checkpoint import UnsafeCheckpointError, WeightsError
from loop_lens.models.files import UnreadableError
from loop_lens.models.kind import UnknownFamilyError
from loop_lens.models.native import LoopedConfig, LoopedTransformer
from loop_lens.opening.entry import boot, loopify, wrap
from loop_lens.opening.registration import register
from loop_lens.shipped import shipped_models
from loop_lens.unrolling.additive import NonAdditiveStreamError
from loop_lens.unrolling.tree import UnknownNameError

__version__ = "0.1.0"

__all__ = [
    "HookedLoopedTransformer",
    "LoopCache",
    "LoopedConfig",
    "LoopedTransformer",
    "NonAdditiveStreamError",
    "SweepResult",
    "UnknownFamilyError",
    "UnknownNameError",
    "UnreadableError",
    "UnsafeCheckpointError",
    "WeightsError",
    "attribute",
    "boot",
    "lens",
    "loopify",
    "patch_sweep",
    "register",
    "shipped_models",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """The rooms that are imported when they are asked for, so that ``loop_lens.dynamics`` is there."""
    if name in ("data", "dynamics", "stages", "training"):
        return importlib.import_module(f"loop_lens.{name}")
    raise AttributeError(f"module 'loop_lens' has no attribute {name!r}")
