"""``hops-ouro``: the same task, in the form of Ouro."""

from __future__ import annotations

from dataclasses import replace

from loop_lens.data.task import Task
from loop_lens.models.native.config import LoopedConfig
from loop_lens.training.config import TrainingConfig
from loop_lens.training.losses import ExitGateLoss
from loop_lens.training.recipes import hops
from loop_lens.training.recipes.recipe import Recipe


def model(of: Task) -> LoopedConfig:
    """Core blocks alone, with sandwich norms, a norm after every iteration and an exit gate."""
    ouro = {
        "prelude_layers": 0,
        "core_layers": 2,
        "coda_layers": 0,
        "block_norm": "sandwich",
        "loop_norm": True,
        "exit_gate": True,
        "injection": "none",
        "initial_state": "prelude",
    }
    return LoopedConfig.from_dict(hops.model(of).to_dict() | ouro)


def training(seed: int) -> TrainingConfig:
    """As ``hops``, with Ouro's loss: every iteration's, weighted by the gate.

    Its first hop levels off at 0.96, below the threshold of ``hops``: the next hop begins earlier.
    """
    base = hops.training(seed)
    assert base.curriculum is not None
    return replace(base, loss=ExitGateLoss(beta=0.05), curriculum=replace(base.curriculum, threshold=0.93))


HOPS_OURO = Recipe(
    name="hops-ouro",
    summary="The task of `hops` in the form of Ouro: no prelude and no coda, 2 core blocks with sandwich norms, a norm "
    "after every iteration, an exit gate, no injection, trained by the gate-weighted loss of every iteration.",
    intended=hops.INTENDED + " Compare its dynamics with those of `hops`; its exit gate is trained.",
    task=hops.task,
    model=model,
    training=training,
    measure=hops.measure,
)
