"""``hops``: follows arrows through a random cycle, one hop an iteration."""

from __future__ import annotations

from typing import Any

from loop_lens.data.hops import HopsTask
from loop_lens.data.task import Task
from loop_lens.models.native.config import LoopedConfig
from loop_lens.training.config import TrainingConfig
from loop_lens.training.curriculum import Curriculum
from loop_lens.training.recipes.measure import measure_chain
from loop_lens.training.recipes.recipe import Recipe
from loop_lens.training.recurrences import Uniform


def hops_config(task: Task, **changed: Any) -> LoopedConfig:
    """Prelude, core and coda with injection and noise, or other fields."""
    fields: dict[str, Any] = {
        "vocab_size": task.vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "prelude_layers": 1,
        "core_layers": 2,
        "coda_layers": 1,
        "recurrences": 8,
        "injection": "linear",
        "initial_state": "noise",
        "pad_token_id": task.tokenizer.pad_token_id,
        "eos_token_id": task.tokenizer.eos_token_id,
        "max_position_embeddings": 256,
    }
    return LoopedConfig(**fields | changed)


def _training(seed: int) -> TrainingConfig:
    """One hop until it is right, then two, up to six; one to three iterations more than hops."""
    return TrainingConfig(
        steps=8000,
        batch_size=32,
        lr=1e-3,
        warmup=200,
        schedule="1-sqrt",
        cooldown=400,
        betas=(0.9, 0.98),
        weight_decay=0.05,
        seed=seed,
        recurrences=Uniform(1, 3, per_level=1),
        curriculum=Curriculum(levels=(1, 2, 3, 4, 5, 6), threshold=0.97, window=50, settle=800),
        checkpoint_every=100,
        log_every=10,
    )


HOPS = Recipe(
    name="hops",
    summary="A looped transformer that follows arrows through a random cycle of eight symbols and solves more hops "
    "with more iterations: prelude 1, core 2, coda 1, a linear injection, a random initial state.",
    intended="Showing what a loop does: prompts are `a c f b ... ? a -> -> ->`, the 8 pairs of one random cycle, a "
    "query, a start and arrows, and the i-th arrow is to name the start's i-th successor. It knows this one task, with "
    "words between spaces and no BOS; on anything else it says nothing of meaning.",
    # Many queries a sequence while the first hops are learnt: more labels for the same pairs.
    task=lambda: HopsTask(queries=(8, 8, 4, 2, 2, 2)),
    model=hops_config,
    training=_training,
    measure=lambda model, task: measure_chain(model, HopsTask()),  # as users write them, with one query
)
