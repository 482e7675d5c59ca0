"""Two processes that share prompts of unequal length measure what one measures alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.multiprocessing.spawn import spawn

from loop_lens import HookedLoopedTransformer
from loop_lens.dynamics import (
    attention_bound,
    attention_settling,
    convergence,
    extrapolate,
    firing_similarity,
)
from loop_lens.measuring.moments import Moments
from tests.interventions.models import opened

LENGTHS = (3, 9, 5, 2, 7)
MEASURES: dict[str, Callable[[HookedLoopedTransformer, Any], Any]] = {
    "convergence": lambda model, prompts: convergence(
        model, prompts, reference=6, batch_size=2, progress=False
    ),
    "settling": lambda model, prompts: attention_settling(model, prompts, batch_size=2, progress=False),
    "pairs": lambda model, prompts: firing_similarity(model, prompts, batch_size=2, progress=False),
    "bound": lambda model, prompts: attention_bound(model, prompts, batch_size=2, progress=False),
    "extrapolation": lambda model, prompts: extrapolate(
        model, prompts, recurrences=(1, 2, 6), batch_size=2, progress=False
    ),
}


def every_measure(n: int = len(LENGTHS)) -> dict[str, Any]:
    """All results on the first prompts."""
    generator = torch.Generator().manual_seed(4)
    model = opened("huginn")
    prompts = [torch.randint(1, model.cfg.d_vocab, (length,), generator=generator) for length in LENGTHS[:n]]
    return {name: measure(model, prompts) for name, measure in MEASURES.items()}


def moments_of(result: Any) -> list[Moments]:
    """All moments that a result holds."""
    parts = [getattr(result, name, None) for name in ("moments", "attention", "residual", "convergence")]
    found: list[Moments] = []
    for part in parts:
        if isinstance(part, Moments):
            found.append(part)
        elif part is not None:
            found += moments_of(part)
    return found


def require_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Results are equal to 1e-6, counts exactly."""
    for name, result in one.items():
        pairs = list(zip(moments_of(result), moments_of(other[name]), strict=True))
        assert pairs, name
        for a, b in pairs:
            assert a.axes == b.axes and a.metrics == b.metrics
            assert torch.equal(a.count, b.count) and torch.equal(a.prompts, b.prompts), name
            for metric in a.metrics:
                for over in ("values", "prompts"):
                    x, y = a.mean(metric, over=over), b.mean(metric, over=over)
                    assert torch.allclose(x, y, rtol=1e-6, atol=1e-6, equal_nan=True), (name, metric)
    assert one["settling"].prompts == other["settling"].prompts
    assert torch.equal(one["settling"].settled_prompts, other["settling"].settled_prompts)
    for ratio, worst in one["bound"].worst.items():
        assert torch.allclose(worst, other["bound"].worst[ratio], rtol=1e-4, equal_nan=True)


def one_of_two(rank: int, folder: str, port: int) -> None:
    """A process's share, under torch by a file and then as ``accelerate launch --cpu`` starts processes.

    Both in one process: importing everything takes longer than all measures.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for n in (1, len(LENGTHS)):
        torch.save(every_measure(n), f"{folder}/torch.{n}.{rank}")
    dist.destroy_process_group()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    state = PartialState(cpu=True)
    assert state.num_processes == 2 and dist.get_backend() == "gloo"
    torch.save(every_measure(), f"{folder}/accelerate.{len(LENGTHS)}.{rank}")
    state.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they measured."""
    found = tmp_path_factory.mktemp("shared")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(one_of_two, (str(found), port), nprocs=2)
    return found


@pytest.mark.parametrize(
    ("launcher", "n"), [("torch", len(LENGTHS)), ("torch", 1), ("accelerate", len(LENGTHS))]
)
def test_both_processes_have_the_result_of_one(folder: Path, launcher: str, n: int) -> None:
    # With one prompt, the second process has none and still ends up with the result.
    alone = every_measure(n)
    for rank in (0, 1):
        require_same(alone, torch.load(folder / f"{launcher}.{n}.{rank}", weights_only=False))
