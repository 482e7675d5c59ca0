"""``hops-no-injection``: the same task, in a loop that is given the prelude's output once only."""

from __future__ import annotations

from loop_lens.data.task import Task
from loop_lens.models.native.config import LoopedConfig
from loop_lens.training.recipes import hops
from loop_lens.training.recipes.recipe import Recipe


def model(of: Task) -> LoopedConfig:
    """As ``hops``, but the loop starts from the prelude's output and never sees it again."""
    return LoopedConfig.from_dict(
        hops.model(of).to_dict() | {"injection": "none", "initial_state": "prelude"}
    )


HOPS_NO_INJECTION = Recipe(
    name="hops-no-injection",
    summary="The model of `hops` without injection: prelude 1, core 2, coda 1, and a loop that starts from the "
    "prelude's output and never sees it again, so that all it needs must stay in its state.",
    intended=hops.INTENDED + " Compare its dynamics with those of `hops`.",
    task=hops.task,
    model=model,
    training=hops.training,
    measure=hops.measure,
)
