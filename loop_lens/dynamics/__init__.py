"""Dynamics of the loop: where trajectories go, and how an iteration acts near them."""

from loop_lens.dynamics.attention import AttentionSettling, attention_settling
from loop_lens.dynamics.bound import AttentionBound, attention_bound
from loop_lens.dynamics.convergence import Convergence, convergence
from loop_lens.dynamics.distances import jensen_shannon, total_variation
from loop_lens.dynamics.extrapolation import Extrapolation, extrapolate
from loop_lens.dynamics.limit_table import LimitTable, limit_table
from loop_lens.dynamics.limits import (
    LIMIT_KINDS,
    LimitingBehaviour,
    LimitingBehaviours,
    limiting_behaviour,
    limiting_behaviours,
)
from loop_lens.dynamics.local import StepGeometry, step_geometry
from loop_lens.dynamics.pairs import FiringSimilarity, firing_similarity
from loop_lens.dynamics.paths import PathIndependence, path_independence
from loop_lens.dynamics.spectrum import (
    JacobianSpectrum,
    jacobian_spectrum,
    leading_singular_value,
    spectral_radius,
)
from loop_lens.dynamics.trajectories import Trajectories, trajectories

__all__ = [
    "LIMIT_KINDS",
    "AttentionBound",
    "AttentionSettling",
    "Convergence",
    "Extrapolation",
    "FiringSimilarity",
    "JacobianSpectrum",
    "LimitTable",
    "LimitingBehaviour",
    "LimitingBehaviours",
    "PathIndependence",
    "StepGeometry",
    "Trajectories",
    "attention_bound",
    "attention_settling",
    "convergence",
    "extrapolate",
    "firing_similarity",
    "jacobian_spectrum",
    "jensen_shannon",
    "leading_singular_value",
    "limit_table",
    "limiting_behaviour",
    "limiting_behaviours",
    "path_independence",
    "spectral_radius",
    "step_geometry",
    "total_variation",
    "trajectories",
]
