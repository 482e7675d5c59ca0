"""Two processes measure trajectories of shared prompts as one does alone."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from loop_lens.dynamics import limit_table, path_independence, step_geometry, trajectories
from tests.interventions.models import opened

LENGTHS = (3, 9, 5, 2, 7)


def every_measure(n: int) -> dict[str, Any]:
    """All results on the first prompts."""
    generator = torch.Generator().manual_seed(4)
    model = opened("huginn")
    model.set_recurrences(6)
    prompts = [torch.randint(1, model.cfg.d_vocab, (length,), generator=generator) for length in LENGTHS[:n]]
    options: dict[str, Any] = {"batch_size": 2, "progress": False}
    return {
        "local": step_geometry(model, prompts, **options),
        "limits": limit_table(model, prompts, tau=(0.05, 0.2), **options),
        "paths": path_independence(model, prompts, starts=2, **options),
        "chosen": trajectories(model, prompts, components=2, **options),
        "all": trajectories(model, prompts, components=2, over="tokens", **options),
    }


def tensors(result: Any, prefix: str) -> dict[str, Tensor]:
    """Every tensor in a result, by where it is."""
    found: dict[str, Tensor] = {}
    items = [(f.name, getattr(result, f.name)) for f in fields(result)]
    for name, value in items:
        if isinstance(value, Tensor):
            found[f"{prefix}.{name}"] = value
        elif is_dataclass(value):
            found |= tensors(value, f"{prefix}.{name}")
    return found


def one_of_two(rank: int, folder: str) -> None:
    """A process's share."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for n in (1, len(LENGTHS)):
        torch.save(every_measure(n), f"{folder}/{n}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they measured."""
    found = tmp_path_factory.mktemp("shared")
    spawn(one_of_two, (str(found),), nprocs=2)
    return found


@pytest.mark.parametrize("n", [len(LENGTHS), 1])
def test_both_processes_have_the_result_of_one(folder: Path, n: int) -> None:
    # With one prompt, the second process has none and still ends up with the result.
    alone = every_measure(n)
    for rank in (0, 1):
        shared = torch.load(folder / f"{n}.{rank}", weights_only=False)
        for name, result in alone.items():
            one, other = tensors(result, name), tensors(shared[name], name)
            assert one.keys() == other.keys()
            for key, value in one.items():
                assert torch.allclose(value, other[key], rtol=1e-4, atol=1e-4, equal_nan=True), key
        tables = [
            each["limits"].moving_tokens().sort_values(["prompt", "position", "layer"])
            for each in (alone, shared)
        ]
        assert tables[0].kind.tolist() == tables[1].kind.tolist()
