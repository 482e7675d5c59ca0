"""Dynamics of the loop: where trajectories go, and how an iteration acts near them."""

from loop_lens.dynamics.convergence import Convergence, convergence
from loop_lens.dynamics.limits import LimitingBehaviour, limiting_behaviour
from loop_lens.dynamics.spectrum import spectral_radius

__all__ = ["Convergence", "LimitingBehaviour", "convergence", "limiting_behaviour", "spectral_radius"]
