"""Training: what it gives, that it can be killed anywhere, and how it fails."""

from __future__ import annotations

import errno
import itertools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import loop_lens
from loop_lens.data.task import TaskBatch
from loop_lens.training import (
    CheckpointError,
    Curriculum,
    ExitGateLoss,
    Fixed,
    LogNormalPoisson,
    NonFiniteLossError,
    Ramp,
    StepRecord,
    TrainingConfig,
    TrainingResult,
    Uniform,
    WeightedIterations,
    checkpoints,
    train,
)
from tests.training.toy import Copying, quick, same_weights, tiny, weights

EVERYTHING: dict[str, Any] = {
    "recurrences": LogNormalPoisson(3.0, most=6),
    "ramp": Ramp(4),
    "backprop_iterations": 2,
    "loss": ExitGateLoss(0.1),
    "curriculum": Curriculum((1, 2), threshold=0.05, window=2),
    "schedule": "1-sqrt",
    "cooldown": 3,
    "log_every": 2,
}


class Killed(Exception):
    """Raised from a callback."""


def kill_at(step: int) -> Any:
    def see(record: StepRecord) -> None:
        if record.step == step:
            raise Killed

    return see


def test_one_seed_gives_equal_weights_and_another_gives_others(tmp_path: Path) -> None:
    results = [
        train(tiny(), Copying(), quick(4, seed=seed), folder=tmp_path / name)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert same_weights(results[0].model, results[1].model)
    assert not same_weights(results[0].model, results[2].model)


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_killed_at_any_step_and_resumed_equals_never_killed(tmp_path: Path, options: dict[str, Any]) -> None:
    config, gated = quick(6, **options), {"exit_gate": True, "attention_dropout": 0.1}
    whole = train(tiny(**gated), Copying(), config, folder=tmp_path / "whole")
    for step in range(1, 6):
        folder = tmp_path / f"killed at {step}"
        with pytest.raises(Killed):
            train(tiny(**gated), Copying(), config, folder=folder, on_step=kill_at(step))
        # Where there was a checkpoint, the weights that come in do not matter.
        seed = 9 if step >= 2 else 0
        resumed = train(tiny(seed, **gated), Copying(), config, folder=folder)
        assert same_weights(whole.model, resumed.model)
        assert resumed.passed == whole.passed and resumed.steps == whole.steps
        columns = whole.log.columns.drop("seconds")
        assert resumed.log[columns].equals(whole.log[columns])


def test_a_process_killed_from_outside_goes_on(tmp_path: Path) -> None:
    script = (
        "import os, signal\n"
        "from tests.training.toy import *\n"
        "from loop_lens.training import train\n"
        "def see(record):\n"
        "    if record.step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"train(tiny(), Copying(), quick(6), folder={str(tmp_path / 'killed')!r}, on_step=see)\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env=env, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    resumed = train(tiny(5), Copying(), quick(6), folder=tmp_path / "killed")
    whole = train(tiny(), Copying(), quick(6), folder=tmp_path / "whole")
    assert same_weights(resumed.model, whole.model)


def test_a_finished_training_is_opened_not_run(tmp_path: Path) -> None:
    first = train(tiny(), Copying(), quick(4), folder=tmp_path)
    again = train(tiny(9), Copying(), quick(4), folder=tmp_path, on_step=kill_at(4))
    assert same_weights(first.model, again.model) and again.log.equals(first.log)
    longer = train(tiny(9), Copying(), quick(6), folder=tmp_path)
    assert longer.steps == 6
    with pytest.raises(Killed):
        train(tiny(), Copying(), quick(4), folder=tmp_path, resume=False, on_step=kill_at(1))
    assert checkpoints.last_checkpoint(tmp_path) is None


def test_training_leaves_depth_and_initial_state_as_they_were(tmp_path: Path) -> None:
    model = tiny(recurrences=5)
    train(model, Copying(), quick(3, recurrences=Uniform(1, 3)), folder=tmp_path)
    assert model.config.recurrences == 5 and model.model.initial_state == 0 and not model.training
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_batch_can_be_overfitted(tmp_path: Path) -> None:
    class OneBatch(Copying):
        def batch(self, n: int, *, level: int, generator: torch.Generator, split: Any = "train") -> TaskBatch:
            generator = torch.Generator().manual_seed(0)
            return super().batch(n, level=level, generator=generator, split=split)

    config = quick(120, lr=1e-2, checkpoint_every=None, level=2, loss=WeightedIterations("linear"))
    log = train(tiny(), OneBatch(), config, folder=tmp_path).log
    assert log["loss"].iloc[0] > 1.8
    assert log["loss"].iloc[-1] < 0.05 and log["accuracy"].iloc[-1] == 1.0


def test_log_holds_the_loss_of_the_weights_and_the_means_of_its_steps(tmp_path: Path) -> None:
    model, seen = tiny(), list[StepRecord]()
    at_start = tiny()
    result = train(
        model,
        Copying(),
        quick(5, log_every=2, recurrences=Fixed(2), schedule="cosine"),
        folder=tmp_path,
        on_step=seen.append,
    )
    log = result.log
    assert list(log["step"]) == [2, 4, 5]
    assert log["loss"].iloc[0] == (seen[0].loss + seen[1].loss) / 2
    assert log["accuracy"].iloc[2] == seen[4].accuracy
    assert [record.lr for record in seen] == pytest.approx([5e-3, 1e-2, 1e-2, 5e-3, 0.0])
    from loop_lens.training.draws import generator_of, noise_state

    batch = Copying().batch(8, level=1, generator=generator_of(0, 0, "data"))
    at_start.config.recurrences = 2
    state = noise_state(at_start.config, (8, 6), generator_of(0, 0, "state"))
    logits = at_start(batch.input_ids, initial_state=state).logits
    expected = cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert seen[0].loss == pytest.approx(expected.item(), abs=1e-6)
    assert (result.folder / "log.csv").exists()
    result.plot()
    result.save(tmp_path / "result.safetensors")
    loaded = TrainingResult.load(tmp_path / "result.safetensors")
    assert loaded.log.equals(log) and same_weights(loaded.model, model)


NORMS = ("pre", "sandwich", "post_branch", "post_residual")
INJECTIONS = ("none", "add", "linear", "diagonal")


@pytest.mark.parametrize(("norm", "injection"), itertools.product(NORMS, INJECTIONS))
def test_loss_at_init_is_that_of_guessing(norm: str, injection: str) -> None:
    generator = torch.Generator().manual_seed(4)
    ids, targets = torch.randint(0, 64, (2, 16, 12), generator=generator)
    for tied, loop_norm, start in itertools.product((False, True), (False, True), ("noise", "prelude")):
        model = tiny(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=256,
            block_norm=norm,
            injection=injection,
            tie_word_embeddings=tied,
            loop_norm=loop_norm,
            initial_state=start,
        )
        with torch.no_grad():
            loss = cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), targets.flatten())
        assert abs(loss.item() / math.log(64) - 1) < 0.05


def test_ties_hold_after_training_and_reloading_is_exact(tmp_path: Path) -> None:
    model = train(tiny(tie_word_embeddings=True), Copying(), quick(4), folder=tmp_path).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.tensor([[1, 2, 3, 4], [6, 5, 0, 0]])
    expected = model(ids).logits
    reloaded = loop_lens.LoopedTransformer.from_pretrained(tmp_path / "model")
    assert torch.equal(reloaded(ids).logits, expected)
    opened = loop_lens.boot(tmp_path / "model")
    assert torch.equal(opened(ids), expected)
    assert opened.original_model.lm_head.weight is opened.original_model.model.embed_tokens.weight
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pt"))


def test_levels_rise_with_accuracy_and_training_ends_when_they_are_passed(tmp_path: Path) -> None:
    config = quick(
        30,
        checkpoint_every=None,
        curriculum=Curriculum((1, 3), threshold=0.01, window=3, settle=2),
        recurrences=Uniform(0, 0, per_level=1),
        loss=WeightedIterations(),
        batch_size=32,
    )
    result = train(tiny(), Copying(), config, folder=tmp_path)
    assert result.passed == {1: 3, 3: 6} and result.steps == 8
    assert list(result.log["level"]) == [1, 1, 1, 3, 3, 3, 3, 3]
    assert list(result.log["recurrences"]) == list(result.log["level"])


def test_norms_biases_and_embeddings_are_not_decayed(tmp_path: Path) -> None:
    model = tiny(attention_bias=True, injection="diagonal")
    before = weights(model)
    frozen = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 1}
    frozen["model.embed_tokens.weight"] = model.model.embed_tokens.weight
    from loop_lens.training.trainer import parameter_groups

    groups = parameter_groups(model, 0.3)
    plain = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert plain == {id(p) for p in frozen.values()}
    assert sum(len(group["params"]) for group in groups) == len(before)


def test_a_loss_that_is_not_a_number_stops_and_names_the_step(tmp_path: Path) -> None:
    model = tiny()

    def spoil(record: StepRecord) -> None:
        if record.step == 5:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = math.nan

    with pytest.raises(NonFiniteLossError, match=r"step 5: .*checkpoint-4"):
        train(model, Copying(), quick(8), folder=tmp_path, on_step=spoil)
    resumed = train(tiny(9), Copying(), quick(8), folder=tmp_path)
    assert same_weights(resumed.model, train(tiny(), Copying(), quick(8), folder=tmp_path / "b").model)


@pytest.mark.parametrize("writer", ["save_file", "save_quietly"])
def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    real, calls = getattr(checkpoints, writer), []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, writer, full)
        with pytest.raises(CheckpointError, match=r"No space left.*goes on from checkpoint-4"):
            train(tiny(), Copying(), quick(8), folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-4"]
    resumed = train(tiny(9), Copying(), quick(8), folder=tmp_path)
    assert same_weights(resumed.model, train(tiny(), Copying(), quick(8), folder=tmp_path / "b").model)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    train(tiny(), Copying(), quick(2), folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"lr: 0.01 there, 0.5 now"):
        train(tiny(), Copying(), quick(2, lr=0.5), folder=tmp_path)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        train(tiny(hidden_size=32), Copying(), quick(4), folder=tmp_path)


def test_models_and_tasks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="wrap"):
        train(loop_lens.wrap(tiny()), Copying(), quick(), folder=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="vocab_size=7"):
        train(tiny(vocab_size=5), Copying(), quick(), folder=tmp_path)
    with pytest.raises(ValueError, match="exit_gate"):
        train(tiny(), Copying(), quick(loss=ExitGateLoss()), folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": math.nan}, "lr"),
        ({"warmup": -1}, "warmup"),
        ({"schedule": "steps"}, "schedule"),
        ({"schedule": "1-sqrt"}, "cooldown"),
        ({"cooldown": 5}, "cooldown"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"clip": 0.0}, "clip"),
        ({"backprop_iterations": 0}, "backprop_iterations"),
        ({"mixed_precision": "fp8"}, "mixed_precision"),
        ({"final_lr": 2.0}, "final_lr"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{"steps": 3, **options})


def test_rules_of_the_wrong_kind_and_impossible_curricula_are_named() -> None:
    with pytest.raises(TypeError, match=r"Fixed\(n\)"):
        TrainingConfig(steps=3, recurrences=4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LastIteration"):
        TrainingConfig(steps=3, loss="last")  # type: ignore[arg-type]
    for wrong in (
        {"levels": ()},
        {"levels": (0,)},
        {"levels": (1,), "threshold": 1.5},
        {"levels": (1,), "window": 0},
    ):
        with pytest.raises(ValueError):
            Curriculum(**wrong)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 3}, "multiple of 3 heads"),
        ({"recurrences": 0}, "recurrences"),
        ({"core_layers": 0}, "core layer"),
        ({"num_key_value_heads": 3, "num_attention_heads": 4}, "key-value"),
        ({"prelude_layers": 0, "initial_state": "prelude"}, "prelude"),
    ],
)
def test_impossible_models_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**fields)


def test_bf16_and_checkpointed_blocks_train_too(tmp_path: Path) -> None:
    plain = train(tiny(), Copying(), quick(3), folder=tmp_path / "a")
    again = train(tiny(), Copying(), quick(3, gradient_checkpointing=True), folder=tmp_path / "b")
    assert same_weights(plain.model, again.model)
    half = train(tiny(), Copying(), quick(3, mixed_precision="bf16"), folder=tmp_path / "c")
    assert half.model.dtype == torch.float32 and not same_weights(plain.model, half.model)
    assert torch.equal(half.model(torch.tensor([[1]])).logits, half.model(torch.tensor([[1]])).logits)
    assert half.model(torch.tensor([[1]])).logits.dtype == torch.float32
