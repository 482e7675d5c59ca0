"""What hooks on every firing cost, as ratios to the bare model in the same run.

    python benchmarks/overhead.py [--smollm2] [--rounds 15]

One thread, interleaved runs, medians of paired ratios: machines are noisy, so only ratios count.
Rows: nothing hooked, one site patched, all blocks' outputs cached, everything cached. Columns:
loop_lens; torch hooks written by hand on an untied copy; transformer-lens' own bridge on that copy
(every firing a layer of its own: it cannot tell iterations apart otherwise); nnsight on that copy,
if installed (the extra ``bench``). Each is divided by the bare model that it wraps.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import LlamaConfig, LlamaForCausalLM

import loop_lens
from loop_lens import LoopedConfig, LoopedTransformer
from loop_lens.shipped.smollm2 import load_smollm2

Row = Callable[[], Any]
ROWS = ("no hooks", "one site patched", "all block outputs cached", "everything cached")


def native_pair() -> tuple[nn.Module, nn.Module, LlamaForCausalLM, Tensor]:
    """A looped model of 64 firings (d_model 256), twice, and its untied copy as a Llama."""
    config = LoopedConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=1024,
        prelude_layers=2,
        core_layers=4,
        coda_layers=2,
        recurrences=15,
        injection="none",
        initial_state="prelude",
    )
    torch.manual_seed(0)
    model = LoopedTransformer(config).eval()
    schedule = config.schedule()
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=256,
            intermediate_size=1024,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_hidden_layers=len(schedule),
        )
    ).eval()
    return copy.deepcopy(model), model, llama, torch.randint(0, 1000, (1, 64))


def smollm2_pair() -> tuple[nn.Module, nn.Module, LlamaForCausalLM, Tensor]:
    """SmolLM2 with layers 10-19 run three times: bare (unrolled copy), to be looped, and untied."""
    model, tokenizer = load_smollm2()
    order = [*range(10), *[*range(10, 20)] * 3, *range(20, 30)]
    untied = copy.deepcopy(model)
    layers = [copy.deepcopy(untied.model.layers[i]) for i in order]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    untied.model.layers = nn.ModuleList(layers)
    untied.config.num_hidden_layers = len(order)
    tokens = tokenizer("The capital of France is Paris, and the capital of Italy is", return_tensors="pt")
    return untied, model, untied, tokens.input_ids


def looped_rows(model: Any, tokens: Tensor) -> list[Row]:
    """The rows under loop_lens."""
    n = len(model.schedule)
    site, outputs = model.schedule[n // 2].prefix, [f"blocks.{i}.hook_resid_post" for i in range(n)]
    hooks = [(f"{site}.hook_resid_post", lambda value, hook: value.mul_(1.0))]
    return [
        lambda: model(tokens),
        lambda: model.run_with_hooks(tokens, fwd_hooks=hooks),
        lambda: model.run_with_cache(tokens, names_filter=outputs),
        lambda: model.run_with_cache(tokens),
    ]


def bridge_rows(model: Any, tokens: Tensor) -> list[Row]:
    """The rows under transformer-lens' own bridge."""
    n = len(model.blocks)
    hooks = [(f"blocks.{n // 2}.hook_resid_post", lambda value, hook: value.mul_(1.0))]
    outputs = [f"blocks.{i}.hook_resid_post" for i in range(n)]
    return [
        lambda: model(tokens),
        lambda: model.run_with_hooks(tokens, fwd_hooks=hooks),
        lambda: model.run_with_cache(tokens, names_filter=outputs),
        lambda: model.run_with_cache(tokens),
    ]


def torch_rows(model: LlamaForCausalLM, tokens: Tensor) -> list[Row | None]:
    """The rows with torch hooks by hand. Not everything: scores and pattern are out of reach."""
    layers = model.model.layers

    def patched() -> None:
        handle = layers[len(layers) // 2].register_forward_hook(lambda m, a, out: out.mul_(1.0))
        model(tokens)
        handle.remove()

    def cached() -> list[Tensor]:
        kept: list[Tensor] = []
        handles = [layer.register_forward_hook(lambda m, a, out: kept.append(out)) for layer in layers]
        model(tokens)
        for handle in handles:
            handle.remove()
        return kept

    return [lambda: model(tokens), patched, cached, None]


def nnsight_rows(model: LlamaForCausalLM, tokens: Tensor) -> list[Row | None]:
    """The rows under nnsight."""
    from nnsight import NNsight

    wrapped = NNsight(model)
    n = len(model.model.layers)

    def bare() -> None:
        with wrapped.trace(tokens):
            wrapped.lm_head.output.save()

    def patched() -> None:
        with wrapped.trace(tokens):
            wrapped.model.layers[n // 2].output[:] = wrapped.model.layers[n // 2].output * 1.0
            wrapped.lm_head.output.save()

    def cached() -> None:
        with wrapped.trace(tokens):
            for layer in wrapped.model.layers:
                layer.output.save()

    return [bare, patched, cached, None]


def measure(rows: dict[str, Row | None], base: dict[str, str], rounds: int) -> dict[str, float]:
    """Median ratio of each row to its base, over interleaved rounds."""
    timed = {name: row for name, row in rows.items() if row is not None}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for row in timed.values():
        row()
    for _ in range(rounds):
        for name, row in timed.items():
            start = time.perf_counter()
            row()
            times[name].append(time.perf_counter() - start)
    return {
        name: statistics.median(a / b for a, b in zip(times[name], times[base[name]], strict=True))
        for name in timed
    }


def compare(
    title: str, pair: tuple[nn.Module, nn.Module, LlamaForCausalLM, Tensor], loop: Any, rounds: int
) -> None:
    """Print one table of ratios."""
    bare, model, untied, tokens = pair
    looped = loop(model)
    columns: dict[str, list[Any]] = {
        "loop_lens": looped_rows(looped, tokens),
        "torch hooks": torch_rows(copy.deepcopy(untied), tokens),
    }
    if find_spec("nnsight"):
        columns["nnsight"] = nnsight_rows(copy.deepcopy(untied), tokens)
    stock = copy.deepcopy(untied)
    bridge = build_bridge_from_module(stock, "LlamaForCausalLM", hf_config=stock.config)
    columns["transformer-lens"] = bridge_rows(bridge, tokens)
    rows: dict[str, Row | None] = {"bare looped": lambda: bare(tokens), "bare untied": lambda: untied(tokens)}
    base = {"bare looped": "bare looped", "bare untied": "bare untied"}
    for column, functions in columns.items():
        for row, function in zip(ROWS, functions, strict=True):
            rows[f"{column}/{row}"] = function
            base[f"{column}/{row}"] = "bare looped" if column == "loop_lens" else "bare untied"
    with torch.no_grad():
        ratios = measure(rows, base, rounds)
    print(f"\n{title}: {len(looped.schedule)} firings, {tokens.shape[1]} tokens; ratio to the bare model")
    print(f"{'':<26}" + "".join(f"{column:>18}" for column in columns))
    for row in ROWS:
        cells = [ratios.get(f"{column}/{row}") for column in columns]
        print(f"{row:<26}" + "".join(f"{'-' if c is None else format(c, '.2f'):>18}" for c in cells))


def opening(recurrences: int = 127) -> None:
    """Time to open many firings, and memory per iteration."""
    config = LoopedConfig(hidden_size=256, prelude_layers=2, core_layers=4, coda_layers=2)
    model = LoopedTransformer(config).eval()
    start = time.perf_counter()
    looped = loop_lens.wrap(model)
    wrapped = time.perf_counter()
    looped.set_recurrences(recurrences)
    changed = time.perf_counter()
    gc.collect()
    tracemalloc.start()
    list(looped.blocks)
    everything, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    fresh = loop_lens.wrap(LoopedTransformer(config).eval(), recurrences=recurrences)
    before = time.perf_counter()
    list(fresh.blocks)
    after = time.perf_counter()
    print(
        f"\nopening {len(looped.schedule)} firings: wrap {wrapped - start:.2f} s, "
        f"set_recurrences {1e3 * (changed - wrapped):.1f} ms, every block's hook points {after - before:.2f} s; "
        f"{everything / recurrences / 2**20:.2f} MiB of hook points per iteration once all are asked for"
    )


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--smollm2", action="store_true", help="also on SmolLM2-135M (extra smollm2)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    compare("native, d_model 256", native_pair(), loop_lens.wrap, options.rounds)
    if options.smollm2:
        compare(
            "SmolLM2-135M, layers 10-19 three times",
            smollm2_pair(),
            lambda model: loop_lens.loopify(model, layers=range(10, 20), times=3),
            options.rounds,
        )
    opening()


if __name__ == "__main__":
    main()
