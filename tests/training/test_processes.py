"""Two processes train as one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from loop_lens import LoopedTransformer
from loop_lens.training import ExitGateLoss, train
from tests.training.toy import Copying, quick, tiny, weights

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from loop_lens.training import ExitGateLoss, train
from tests.training.toy import Copying, quick, tiny
result = train(tiny(exit_gate=True), Copying(), quick(4, loss=ExitGateLoss(), level=2), folder=sys.argv[1])
result.log.to_csv(f"{sys.argv[1]}/seen by {torch.distributed.get_rank()}.csv")
"""


def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    folder, root = tmp_path / "two", Path(__file__).parents[2]
    folder.mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    ports = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 2000), "WORLD_SIZE": "2"}
    shared = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(root),
    }
    running = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), str(folder)],
            env={**os.environ, **ports, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]
    errors = [process.communicate()[1].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    config = quick(4, loss=ExitGateLoss(), level=2)
    one = train(tiny(exit_gate=True), Copying(), config, folder=tmp_path / "one")
    two = weights(LoopedTransformer.from_pretrained(folder / "model"))
    for name, parameter in weights(one.model).items():
        torch.testing.assert_close(two[name], parameter, atol=1e-5, rtol=0)
    logs = [(folder / f"seen by {rank}.csv").read_text().splitlines() for rank in (0, 1)]
    assert [line.split(",")[1:4] for line in logs[0]] == [line.split(",")[1:4] for line in logs[1]]
