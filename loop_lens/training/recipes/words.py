"""``words``: a small looped language model of Python's own documentation."""

from __future__ import annotations

from loop_lens.data.task import Task
from loop_lens.data.text import TextTask
from loop_lens.models.native.config import LoopedConfig
from loop_lens.training.config import TrainingConfig
from loop_lens.training.recipes.measure import measure_text
from loop_lens.training.recipes.recipe import Recipe
from loop_lens.training.recurrences import LogNormalPoisson


def _model(task: Task) -> LoopedConfig:
    end = task.tokenizer.bos_token_id
    return LoopedConfig(
        vocab_size=task.vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_attention_heads=4,
        prelude_layers=1,
        core_layers=2,
        coda_layers=1,
        recurrences=4,
        injection="linear",
        initial_state="noise",
        # Brings embeddings to the scale of the noise that the loop starts from.
        embedding_scale=128**0.5,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )


def _training(seed: int) -> TrainingConfig:
    return TrainingConfig(
        steps=2000,
        batch_size=16,
        lr=3e-3,
        warmup=150,
        schedule="1-sqrt",
        cooldown=500,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        seed=seed,
        recurrences=LogNormalPoisson(mean=3, sigma=0.5, most=12),
        backprop_iterations=4,
        checkpoint_every=100,
        log_every=10,
    )


WORDS = Recipe(
    name="words",
    summary="A small looped language model of English as Python's documentation writes it: prelude 1, core 2, "
    "coda 1, a linear injection, and a number of iterations drawn anew at each training step.",
    intended="A real language model at hand without a hub, for trying lenses, patching and measurements on text. "
    "It completes short phrases of technical English, knows few facts and is no source of information on "
    "Python. Prompts should begin with `<|endoftext|>`, which loop_lens prepends by default.",
    task=TextTask,
    model=_model,
    training=_training,
    measure=measure_text,
    text_licence="The training text is the documentation of Python's standard library and language reference "
    "(docstrings and `pydoc_data.topics`), Copyright Python Software Foundation, under the PSF licence version 2; "
    "see NOTICE. The text itself is not included. It differs a little between versions of Python, and so would a "
    "model made again: this one read Python 3.11's.",
)
