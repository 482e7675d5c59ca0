"""Hook points for every iteration and layer of looped language models."""

from loop_lens.bridge import HookedLoopedTransformer
from loop_lens.cache import LoopCache, NonAdditiveStreamError
from loop_lens.checkpoint import UnsafeCheckpointError
from loop_lens.families import UnknownFamilyError
from loop_lens.families.weights import WeightsError
from loop_lens.interventions.sweep import SweepResult, patch_sweep
from loop_lens.lenses.attribution import attribute
from loop_lens.lenses.readout import lens
from loop_lens.model import LoopedConfig, LoopedTransformer
from loop_lens.opening import boot, loopify, wrap
from loop_lens.registration import register
from loop_lens.schedule import Blocks, Boundary, Firing, Loop, Schedule, Sequence, UnknownNameError
from loop_lens.shipped import shipped_models
from loop_lens.unroll import LoopBody, Unroller, tied_clone

__version__ = "0.1.0"

__all__ = [
    "Blocks",
    "Boundary",
    "Firing",
    "HookedLoopedTransformer",
    "Loop",
    "LoopBody",
    "LoopCache",
    "LoopedConfig",
    "LoopedTransformer",
    "NonAdditiveStreamError",
    "Schedule",
    "Sequence",
    "SweepResult",
    "UnknownFamilyError",
    "UnknownNameError",
    "Unroller",
    "UnsafeCheckpointError",
    "WeightsError",
    "attribute",
    "boot",
    "lens",
    "loopify",
    "patch_sweep",
    "register",
    "shipped_models",
    "tied_clone",
    "wrap",
]
