"""Readouts at every iteration: lenses, attribution that adds up, exit rules."""

from loop_lens.lenses.attribution import Attribution, Component, attribute
from loop_lens.lenses.base import Lens
from loop_lens.lenses.coda import CodaLens
from loop_lens.lenses.exit_rules import EXIT_RULES, exit_probabilities, exit_scores
from loop_lens.lenses.exits import ExitCurve, ExitResult, exit_curve, find_exits
from loop_lens.lenses.jacobian import LoopJacobianLens
from loop_lens.lenses.jacobian_fit import fit_jacobian_lens
from loop_lens.lenses.logit import LogitLens
from loop_lens.lenses.native import NativeLens
from loop_lens.lenses.readout import LENS_KINDS, lens
from loop_lens.lenses.result import LensResult
from loop_lens.lenses.tuned import TunedLens
from loop_lens.lenses.tuned_fit import fit_tuned_lens

__all__ = [
    "EXIT_RULES",
    "LENS_KINDS",
    "Attribution",
    "CodaLens",
    "Component",
    "ExitCurve",
    "ExitResult",
    "Lens",
    "LensResult",
    "LogitLens",
    "LoopJacobianLens",
    "NativeLens",
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
