"""Dynamics of the loop: where trajectories go, and how an iteration acts near them."""

from loop_lens.dynamics.attention import AttentionSettling, attention_settling
from loop_lens.dynamics.bound import AttentionBound, attention_bound
from loop_lens.dynamics.convergence import Convergence, convergence
from loop_lens.dynamics.distances import jensen_shannon, total_variation
from loop_lens.dynamics.extrapolation import Extrapolation, extrapolate
from loop_lens.dynamics.limit_table import LimitTable, limit_table
from loop_lens.dynamics.limits import (
    KINDS,
    LimitingBehaviour,
    LimitingBehaviours,
    limiting_behaviour,
    limiting_behaviours,
)
from loop_lens.dynamics.local import LocalDynamics, local_dynamics
from loop_lens.dynamics.pairs import PairMaps, pair_maps
from loop_lens.dynamics.paths import PathIndependence, path_independence
from loop_lens.dynamics.spectrum import (
    JacobianSpectrum,
    jacobian_spectrum,
    leading_singular_value,
    spectral_radius,
)
from loop_lens.dynamics.trajectories import Trajectories, trajectories

__all__ = [
    "KINDS",
    "AttentionBound",
    "AttentionSettling",
    "Convergence",
    "Extrapolation",
    "JacobianSpectrum",
    "LimitTable",
    "LimitingBehaviour",
    "LimitingBehaviours",
    "LocalDynamics",
    "PairMaps",
    "PathIndependence",
    "Trajectories",
    "attention_bound",
    "attention_settling",
    "convergence",
    "extrapolate",
    "jacobian_spectrum",
    "jensen_shannon",
    "leading_singular_value",
    "limit_table",
    "limiting_behaviour",
    "limiting_behaviours",
    "local_dynamics",
    "pair_maps",
    "path_independence",
    "spectral_radius",
    "total_variation",
    "trajectories",
]
