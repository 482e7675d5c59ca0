"""``hops-ouro``: the same task, in the form of Ouro."""

from __future__ import annotations

from dataclasses import replace

from loop_lens.data.task import Task
from loop_lens.models.native.config import LoopedConfig
from loop_lens.training.config import TrainingConfig
from loop_lens.training.losses import ExitGateLoss
from loop_lens.training.recipes.hops import HOPS, hops_config


def _model(task: Task) -> LoopedConfig:
    return hops_config(
        task,
        prelude_layers=0,
        coda_layers=0,
        block_norm="sandwich",
        loop_norm=True,
        exit_gate=True,
        injection="none",
        initial_state="prelude",
    )


def _training(seed: int) -> TrainingConfig:
    """As ``hops``, with Ouro's loss; its first hop levels off at 0.96, so the next one begins earlier than there."""
    base = HOPS.training(seed)
    assert base.curriculum is not None
    return replace(base, loss=ExitGateLoss(beta=0.05), curriculum=replace(base.curriculum, threshold=0.93))


HOPS_OURO = replace(
    HOPS,
    name="hops-ouro",
    summary="The task of `hops` in the form of Ouro: no prelude and no coda, 2 core blocks with sandwich norms, a norm "
    "after every iteration, an exit gate, no injection, trained by the gate-weighted loss of every iteration.",
    intended=HOPS.intended + " Compare its dynamics with those of `hops`; its exit gate is trained.",
    model=_model,
    training=_training,
)
