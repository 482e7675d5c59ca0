"""Readouts at every iteration: lenses, attribution that adds up, exit rules."""

from loop_lens.lenses.attribution import Attribution, attribute
from loop_lens.lenses.exits import (
    RULES,
    ExitResult,
    exit_curve,
    exit_probabilities,
    exit_scores,
    exits,
)
from loop_lens.lenses.jacobian import JacobianTransport, fit_jacobian
from loop_lens.lenses.readout import LensResult, lens
from loop_lens.lenses.tuned import TunedLens, train_tuned_lens

__all__ = [
    "RULES",
    "Attribution",
    "ExitResult",
    "JacobianTransport",
    "LensResult",
    "TunedLens",
    "attribute",
    "exit_curve",
    "exit_probabilities",
    "exit_scores",
    "exits",
    "fit_jacobian",
    "lens",
    "train_tuned_lens",
]
