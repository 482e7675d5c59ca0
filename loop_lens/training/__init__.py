"""Training of looped models."""

from loop_lens.training.checkpoints import CheckpointError
from loop_lens.training.config import TrainingConfig
from loop_lens.training.curriculum import Curriculum
from loop_lens.training.evaluation import Evaluation, evaluate
from loop_lens.training.losses import ExitGateLoss, LastIteration, Loss, WeightedIterations
from loop_lens.training.pretrained import retrofit
from loop_lens.training.recurrences import Fixed, LogNormalPoisson, Ramp, Recurrences, Uniform
from loop_lens.training.result import StepRecord, TrainingResult
from loop_lens.training.trainer import NonFiniteLossError, train

__all__ = [
    "CheckpointError",
    "Curriculum",
    "Evaluation",
    "ExitGateLoss",
    "Fixed",
    "LastIteration",
    "LogNormalPoisson",
    "Loss",
    "NonFiniteLossError",
    "Ramp",
    "Recurrences",
    "StepRecord",
    "TrainingConfig",
    "TrainingResult",
    "Uniform",
    "WeightedIterations",
    "evaluate",
    "retrofit",
    "train",
]
