"""Dynamics of the loop: where trajectories go, and how an iteration acts near them."""

from loop_lens.dynamics.limits import LimitingBehaviour, limiting_behaviour
from loop_lens.dynamics.spectrum import spectral_radius

__all__ = ["LimitingBehaviour", "limiting_behaviour", "spectral_radius"]
