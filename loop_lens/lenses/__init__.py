"""Readouts at every iteration: lenses, attribution that adds up, exit rules."""

from loop_lens.lenses.attribution import Attribution, attribute
from loop_lens.lenses.exits import (
    EXIT_RULES,
    ExitResult,
    exit_curve,
    exit_probabilities,
    exit_scores,
    find_exits,
)
from loop_lens.lenses.jacobian import LoopJacobianLens, fit_jacobian_lens
from loop_lens.lenses.readout import LensResult, lens
from loop_lens.lenses.tuned import TunedLens, fit_tuned_lens

__all__ = [
    "EXIT_RULES",
    "Attribution",
    "ExitResult",
    "LensResult",
    "LoopJacobianLens",
    "TunedLens",
    "attribute",
    "exit_curve",
    "exit_probabilities",
    "exit_scores",
    "find_exits",
    "fit_jacobian_lens",
    "fit_tuned_lens",
    "lens",
]
