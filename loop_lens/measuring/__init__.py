"""Measuring while the model runs: probes, moments that merge, results on disk."""

from loop_lens.measuring.moments import Collector, DivergedError, Measured, Moments
from loop_lens.measuring.probe import Probe
from loop_lens.measuring.processes import shared
from loop_lens.measuring.results import Result
from loop_lens.measuring.run import measure

__all__ = [
    "Collector",
    "DivergedError",
    "Measured",
    "Moments",
    "Probe",
    "Result",
    "measure",
    "shared",
]
