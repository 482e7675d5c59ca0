"""Interventions across iterations: sweeps, surgery, gradients, paths."""

from loop_lens.interventions.edits import Edit, Surgery, View
from loop_lens.interventions.gradients import attribution_sweep
from loop_lens.interventions.metrics import KL, LogitDiff, Loss, Metric, Probability, Rank
from loop_lens.interventions.paths import Node, PathResult, path_patch
from loop_lens.interventions.surgery import (
    ablate,
    cut_injection,
    edit,
    freeze,
    noise,
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
    "Loss",
    "Metric",
    "Node",
    "PathResult",
    "Probability",
    "Rank",
    "Surgery",
    "SweepResult",
    "View",
    "ablate",
    "attribution_sweep",
    "cut_injection",
    "edit",
    "freeze",
    "noise",
    "patch_sweep",
    "path_patch",
    "reorder",
    "replace_injection",
    "skip",
    "steer",
    "stop_after",
    "transplant",
]
