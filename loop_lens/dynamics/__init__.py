"""Dynamics of the loop: where trajectories go, and how an iteration acts near them.

Every measure is a function, and a probe that can share a run with others (`loop_lens.measuring.measure`). All take

- ``model``: the model, at the number of iterations to measure;
- ``prompts``: texts, tokens or a dataset, of any lengths, see `loop_lens.prompts.read_prompts`;
- ``segment``: the loop; the innermost by default;
- ``batch_size``: prompts a forward, and ``progress``: whether to show a progress bar, for work beyond two seconds;

and raise ValueError if there are no prompts or too few iterations, and `loop_lens.measuring.DivergedError` if a value
becomes NaN or infinite, naming the first that does. Lengths, distances and cosines are computed in float64, and those
that a vector of zeros leaves undefined are left out of means.
"""

from loop_lens.dynamics.attention import AttentionSettling, AttentionSettlingProbe, attention_settling
from loop_lens.dynamics.bound import AttentionBound, AttentionBoundProbe, attention_bound
from loop_lens.dynamics.converging import Convergence, ConvergenceProbe, convergence
from loop_lens.dynamics.distances import jensen_shannon, total_variation
from loop_lens.dynamics.extrapolation import Extrapolation, ExtrapolationProbe, extrapolate
from loop_lens.dynamics.geometry import StepGeometry, StepGeometryProbe, step_geometry
from loop_lens.dynamics.limit_counts import LimitTable, LimitTableProbe, limit_table
from loop_lens.dynamics.limits import (
    LIMIT_KINDS,
    LimitingBehaviour,
    limiting_behaviour,
)
from loop_lens.dynamics.paths import PathIndependence, PathIndependenceProbe, path_independence
from loop_lens.dynamics.projection import Trajectories, TrajectoriesProbe, trajectories
from loop_lens.dynamics.similarity import FiringSimilarity, FiringSimilarityProbe, firing_similarity
from loop_lens.dynamics.spectrum import JacobianSpectrum, jacobian_spectrum, spectral_radius

__all__ = [
    "LIMIT_KINDS",
    "AttentionBound",
    "AttentionBoundProbe",
    "AttentionSettling",
    "AttentionSettlingProbe",
    "Convergence",
    "ConvergenceProbe",
    "Extrapolation",
    "ExtrapolationProbe",
    "FiringSimilarity",
    "FiringSimilarityProbe",
    "JacobianSpectrum",
    "LimitTable",
    "LimitTableProbe",
    "LimitingBehaviour",
    "PathIndependence",
    "PathIndependenceProbe",
    "StepGeometry",
    "StepGeometryProbe",
    "Trajectories",
    "TrajectoriesProbe",
    "attention_bound",
    "attention_settling",
    "convergence",
    "extrapolate",
    "firing_similarity",
    "jacobian_spectrum",
    "jensen_shannon",
    "limit_table",
    "limiting_behaviour",
    "path_independence",
    "spectral_radius",
    "step_geometry",
    "total_variation",
    "trajectories",
]
