"""What a lens over all sites of 64 iterations costs: time against one forward, memory against R.

    python benchmarks/lenses.py [--rounds 5]

A lens runs the model twice (its own output, then site by site) and unembeds every site: the floor is
those two forwards plus one unembedding per site. Memory is the peak beyond what one plain forward
takes; it must not grow with the number of iterations. Each in a process of its own.
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


def native(recurrences: int) -> tuple[Any, Tensor]:
    """d_model 256, 4 layers in the loop, a vocabulary of 32,000, 64 tokens."""
    torch.manual_seed(0)
    config = LoopedConfig(
        vocab_size=32000,
        hidden_size=256,
        intermediate_size=688,
        num_attention_heads=4,
        prelude_layers=2,
        core_layers=4,
        coda_layers=2,
        recurrences=recurrences,
    )
    return loop_lens.wrap(LoopedTransformer(config).eval()), torch.randint(0, 32000, (1, 64))


@torch.no_grad()
def _memory(recurrences: int, how: str, queue: Any) -> None:
    model, tokens = native(recurrences)
    model(tokens)
    names = model.names("resid_post")
    if how == "lens":
        queue.put(peak_of(lambda: loop_lens.lens(model, tokens, progress=False)))
    else:

        def by_cache() -> list[Tensor]:
            _, cache = model.run_with_cache(tokens, names_filter=names)
            return [model.unembed(model.ln_final(cache[name])) for name in names]

        queue.put(peak_of(by_cache))


def memory() -> None:
    """Print peaks against R."""
    print("peak memory, MiB: the lens, and all sites' logits from a cache")
    for recurrences in (4, 16, 64):
        peaks = [peak_in_process(_memory, recurrences, how) for how in ("lens", "cache")]
        print(f"  R = {recurrences:>3}   {peaks[0]:8.1f} {peaks[1]:10.1f}", flush=True)


@torch.no_grad()
def duration(rounds: int) -> None:
    """Print times against one forward."""
    model, tokens = native(64)
    sites = len(model.schedule)
    stream = torch.randn(1, 64, 256)
    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: model(tokens),
        "unembedding": lambda: model.unembed(model.ln_final(stream)),
        "logit lens, all sites": lambda: loop_lens.lens(model, tokens, progress=False),
        "logit lens, last position": lambda: loop_lens.lens(model, tokens, positions=[-1], progress=False),
        "coda lens, every iteration": lambda: loop_lens.lens(model, tokens, kind="coda", progress=False),
        "attribution of a logit": lambda: loop_lens.attribute(model, tokens, target=5),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)

    def ratio(a: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times["forward"], strict=True))

    print(f"\ntime, in forwards of {sites} firings; {torch.get_num_threads()} threads")
    for name in runs:
        print(f"  {name:<28}{ratio(name):7.2f}")
    print(
        f"  floor of all sites: 2 + {sites} x {ratio('unembedding'):.3f} = {2 + sites * ratio('unembedding'):.1f}"
    )


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    memory()
    duration(arguments.rounds)


if __name__ == "__main__":
    main()
