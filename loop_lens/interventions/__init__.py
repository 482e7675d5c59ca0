"""Interventions across iterations: sweeps, surgery, gradients, paths."""

from loop_lens.interventions.edits import Edit, Surgery, View
from loop_lens.interventions.gradients import attribution_sweep
from loop_lens.interventions.metrics import KL, LogitDiff, Metric, NextTokenLoss, Probability, Rank
from loop_lens.interventions.paths import PathNode, PathResult, path_patch
from loop_lens.interventions.surgery import (
    ablate,
    add_noise,
    cut_injection,
    edit,
    freeze,
    reorder,
    replace_injection,
    skip,
    steer,
    stop_after,
    transplant,
)
from loop_lens.interventions.sweep import SweepResult, patch_sweep

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
    "attribution_sweep",
    "cut_injection",
    "edit",
    "freeze",
    "patch_sweep",
    "path_patch",
    "reorder",
    "replace_injection",
    "skip",
    "steer",
    "stop_after",
    "transplant",
]
