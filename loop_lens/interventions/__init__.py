"""Interventions across iterations: sweeps, surgery, gradients, paths."""

from loop_lens.interventions.altering import ablate, add_noise, edit, steer
from loop_lens.interventions.edits import Edit, Surgery, View
from loop_lens.interventions.metrics import KL, LogitDiff, Metric, NextTokenLoss, Probability, Rank
from loop_lens.interventions.moving import freeze, reorder, replace_injection, skip, transplant
from loop_lens.interventions.paths import PathNode, PathResult, path_patch
from loop_lens.interventions.results import SweepResult
from loop_lens.interventions.sweep import patch_sweep

__all__ = [
    "KL",
    "Edit",
    "LogitDiff",
    "Metric",
    "NextTokenLoss",
    "PathNode",
    "PathResult",
    "Probability",
    "Rank",
    "Surgery",
    "SweepResult",
    "View",
    "ablate",
    "add_noise",
    "edit",
    "freeze",
    "patch_sweep",
    "path_patch",
    "reorder",
    "replace_injection",
    "skip",
    "steer",
    "transplant",
]
