"""What fires when, and how a model's own forward tells its firings apart."""

from loop_lens.unrolling.body import LoopBody
from loop_lens.unrolling.clones import tied_clone
from loop_lens.unrolling.runs import Run
from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.sites import Boundary, Firing, Site
from loop_lens.unrolling.tree import Blocks, Iteration, Loop, Segments, UnknownNameError
from loop_lens.unrolling.unroller import FiringCountError, Unroller

__all__ = [
    "Blocks",
    "Boundary",
    "Firing",
    "FiringCountError",
    "Iteration",
    "Loop",
    "LoopBody",
    "Run",
    "Schedule",
    "Segments",
    "Site",
    "UnknownNameError",
    "Unroller",
    "tied_clone",
]
