"""What measuring dynamics and stages while the model runs costs: time against a forward, memory against R.

    python benchmarks/dynamics.py [--rounds 5]

The unit is one forward that exposes every attention pattern (a hook that does nothing on each). What is
measured: M1 to M6 and M9 of arXiv 2604.11791 (`convergence`, with the last iteration as reference, so the
loop runs twice), the stages (`stages`), both at once, and both at once with the states of one run kept
(`keep=True`). Memory is the peak beyond what was there before, of processes of their own, after a first
forward with hooks has made the bridges of all firings, which stay and grow with R.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from memory import peak_in_process, peak_of
from torch import Tensor

import loop_lens
from loop_lens import LoopedConfig, LoopedTransformer
from loop_lens.dynamics import ConvergenceProbe
from loop_lens.measuring.run import measure
from loop_lens.stages import StagesProbe

RUNS = ("forward", "convergence", "stages", "both", "both, kept")


def native(recurrences: int) -> tuple[Any, Tensor]:
    """d_model 512, 8 heads, 4 layers in the loop, eight prompts of 64 tokens."""
    torch.manual_seed(0)
    config = LoopedConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_attention_heads=8,
        prelude_layers=2,
        core_layers=4,
        coda_layers=2,
        recurrences=recurrences,
    )
    return loop_lens.wrap(LoopedTransformer(config).eval()), torch.randint(0, 4096, (8, 64))


def job(model: Any, tokens: Tensor, how: str) -> Callable[[], Any]:
    """One of the things to compare."""
    if how == "forward":
        patterns = model.names("pattern")
        hooks = [(name, lambda value, hook: None) for name in patterns]
        return lambda: model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None)

    def run() -> None:
        probes: list[Any] = []
        keep = how == "both, kept"
        if how != "stages":
            probes.append(ConvergenceProbe(model, reference=model.recurrences, keep=keep))
        if how != "convergence":
            probes.append(StagesProbe(model))
        reference = None if keep or how == "stages" else model.recurrences
        measure(model, tokens, probes, reference=reference, progress=False)

    return run


@torch.no_grad()
def _memory(recurrences: int, how: str, queue: Any) -> None:
    model, tokens = native(recurrences)
    job(model, tokens, "forward")()
    queue.put(peak_of(job(model, tokens, how)))


def memory() -> None:
    """Print peaks against R."""
    print("peak memory, MiB: " + "; ".join(RUNS))
    for recurrences in (32, 64, 128):
        peaks = [peak_in_process(_memory, recurrences, how) for how in RUNS]
        print(f"  R = {recurrences:>3}   " + " ".join(f"{peak:8.1f}" for peak in peaks), flush=True)


@torch.no_grad()
def duration(rounds: int) -> None:
    """Print times against one forward that exposes patterns."""
    print(f"\ntime, in forwards that expose patterns; {torch.get_num_threads()} threads")
    for recurrences in (32, 64, 128):
        model, tokens = native(recurrences)
        runs = {how: job(model, tokens, how) for how in RUNS}
        times: dict[str, list[float]] = {how: [] for how in RUNS}
        for run in runs.values():
            run()
        for _ in range(rounds):
            for how, run in runs.items():
                start = time.perf_counter()
                run()
                times[how].append(time.perf_counter() - start)
        ratios = {
            how: statistics.median(a / b for a, b in zip(times[how], times["forward"], strict=True))
            for how in RUNS
        }
        told = "   ".join(f"{how} {ratio:.2f}" for how, ratio in ratios.items() if how != "forward")
        print(f"  R = {recurrences:>3}   {told}", flush=True)


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    memory()
    duration(arguments.rounds)


if __name__ == "__main__":
    main()
