"""How much faster a sweep is than one whole forward per cell, with the same numbers.

    python benchmarks/patching.py [--rounds 3] [--threads 2] [--full] [--no-smollm2]

A full sweep of the residual stream, all firings and positions, by `loop_lens.patch_sweep` and by
``transformer_lens.patching``: on the same model, and on an untied copy under transformer-lens' own
bridge (what one would use without loop_lens). In turns in one run; medians of the paired ratios.
transformer-lens' sweep is timed on a sample of its cells (whole forwards, all alike) unless --full.
Two kinds of prompts: pairs that differ in one token in the middle, as most published ones do, so that
nothing differs before it; and the worst case, random pairs that differ from the first token on.
The floor is what a method must compute that resumes exactly where a patch begins: firings from the
patched one on, times positions from the patched one on.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformer_lens.patching as stock
from memory import peak_in_process, peak_of
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import LlamaConfig, LlamaForCausalLM

import loop_lens
from loop_lens import LoopedConfig, LoopedTransformer
from loop_lens.interventions import LogitDiff, engine, plan
from loop_lens.shipped.smollm2 import load_smollm2


def untied(config: Any, layers: list[Any], weights: dict[str, Tensor]) -> Any:
    """An ordinary Llama with these layers, under transformer-lens' own bridge."""
    llama = LlamaForCausalLM(config).eval()
    state = dict(weights)
    for index, layer in enumerate(layers):
        for name, tensor in layer.state_dict().items():
            theirs = name.replace("attn_norm", "input_layernorm")
            state[f"model.layers.{index}.{theirs.replace('mlp_norm', 'post_attention_layernorm')}"] = tensor
    llama.load_state_dict(state, strict=False)
    return build_bridge_from_module(llama, "LlamaForCausalLM", hf_config=llama.config)


def native() -> tuple[Any, Any, Tensor]:
    """40 firings, d_model 256, 32 positions: the model, its untied copy, two random prompts."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_attention_heads": 4,
    }
    config = LoopedConfig(
        **sizes,
        prelude_layers=2,
        core_layers=4,
        coda_layers=2,
        recurrences=9,
        injection="none",
        initial_state="prelude",
    )
    torch_model = LoopedTransformer(config).eval()
    trunk = torch_model.model
    blocks = [*trunk.prelude, *trunk.core, *trunk.coda]
    weights = {
        "model.embed_tokens.weight": trunk.embed_tokens.weight,
        "model.norm.weight": trunk.norm.weight,
        "lm_head.weight": torch_model.lm_head.weight,
    }
    order = [blocks[firing.block] for firing in config.schedule()]
    llama = LlamaConfig(**sizes, num_hidden_layers=len(order), rms_norm_eps=config.rms_norm_eps)
    return (
        loop_lens.wrap(torch_model),
        untied(llama, order, weights),
        torch.randperm(1000)[:64].view(2, 1, 32),
    )


def smollm2() -> tuple[Any, Any, Tensor]:
    """SmolLM2-135M, layers 10-19 three times, 12 positions."""
    torch_model, tokenizer = load_smollm2()
    order = [*range(10), *[*range(10, 20)] * 3, *range(20, 30)]
    config = copy.deepcopy(torch_model.config)
    config.num_hidden_layers = len(order)
    weights = {name: t for name, t in torch_model.state_dict().items() if "layers" not in name}
    twin = untied(config, [torch_model.model.layers[i] for i in order], weights)
    model = loop_lens.loopify(torch_model, layers=range(10, 20), times=3, tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(0)
    return model, twin, torch.randperm(40000, generator=generator)[:24].view(2, 1, 12)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and value of a call."""
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def batches_of(sweep: Callable[[], Any]) -> list[plan.Batch]:
    """The batches that a sweep makes."""
    taken: list[plan.Batch] = []
    original = engine.Engine.run

    def run(self: Any, batch: plan.Batch, *args: Any, **kwargs: Any) -> Tensor:
        taken.append(batch)
        return original(self, batch, *args, **kwargs)

    engine.Engine.run = run
    try:
        sweep()
    finally:
        engine.Engine.run = original
    return taken


def one_by_one(model: Any, clean: Tensor, corrupted: Tensor, full: bool) -> Callable[[], Tensor]:
    """transformer-lens' sweep, of every cell or of a sample."""
    n_firings, n_positions = len(model.blocks), clean.shape[1]
    names = {f"blocks.{i}.hook_resid_pre" for i in range(n_firings)}
    _, cache = model.run_with_cache(clean, names_filter=lambda name: name in names)
    step = 1 if full else max(1, n_positions // 4)
    cells = [(f, p) for f in range(0, n_firings, 1 if full else 8) for p in range(0, n_positions, step)]
    table = stock.pd.DataFrame(cells, columns=["layer", "pos"])

    def run() -> Tensor:
        found = stock.generic_activation_patch(
            model,
            corrupted,
            cache,
            lambda logits: (logits[:, -1, 5] - logits[:, -1, 7]).mean(),
            stock.layer_pos_patch_setter,
            "resid_pre",
            index_df=table,
        )
        values = torch.full((n_firings, n_positions), float("nan"))
        for (f, p), value in zip(cells, found.tolist(), strict=True):
            values[f, p] = value
        return values

    return run


@torch.no_grad()
def compare(
    title: str, models: tuple[Any, Any], clean: Tensor, corrupted: Tensor, rounds: int, full: bool
) -> None:
    """Print one table."""
    model, twin = models
    n_firings, n_positions = len(model.schedule), clean.shape[1]
    cells = n_firings * n_positions

    def swept(metric: Any) -> Callable[[], Tensor]:
        return lambda: (
            loop_lens.patch_sweep(
                model,
                clean,
                corrupted,
                metric,
                site="resid_pre",
                over=("firing", "position"),
                progress=False,
            ).values
        )

    runs: dict[str, Callable[[], Any]] = {
        "on the same model": one_by_one(model, clean, corrupted, full),
        "on an untied copy, its own bridge": one_by_one(twin, clean, corrupted, full),
        "LogitDiff": swept(LogitDiff(5, 7)),
        "a function of logits": swept(lambda logits: logits[:, -1, 5] - logits[:, -1, 7]),
        "forward": lambda: model(corrupted),
    }
    runs["LogitDiff"](), runs["forward"]()
    times: dict[str, list[float]] = {name: [] for name in runs}
    values: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds, values[name] = timed(run)
            measured = int((~values[name].isnan()).sum()) if name.startswith("on ") else cells
            times[name].append(seconds * cells / measured)

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    batches = batches_of(runs["LogitDiff"])
    done, least = plan.cost_ratio(batches, n_firings, n_positions)
    run_cells = sum(len(batch.cells) for batch in batches)
    share = run_cells / cells
    apart = (values["LogitDiff"] - values["on the same model"]).abs().nan_to_num().max().item()
    print(f"\n{title}: {n_firings} firings x {n_positions} positions = {cells} cells")
    print(f"  largest difference of a value: {apart:.1e}")
    for metric in ("LogitDiff", "a function of logits"):
        for other in ("on the same model", "on an untied copy, its own bridge"):
            print(f"  {metric:<22}{ratio(other, metric):7.1f} x transformer_lens.patching {other}")
    stock_cell = ratio("on the same model", "forward") / cells
    width = statistics.median(
        sum((n_firings - max(c.start, 0)) for c in b.cells) / (n_firings - max(b.start, 0)) for b in batches
    ) * (n_positions - statistics.median(b.offset for b in batches))
    copies = max(1, round(width / n_positions))
    many = corrupted.repeat(copies, 1)
    pairs = [(timed(lambda: model(many))[0], timed(lambda: model(corrupted))[0]) for _ in range(7)]
    each = statistics.median(a / b for a, b in pairs) / copies
    print(
        f"  cells that must run {share:.2f} of all; of a whole forward each computes {done:.3f}, floor {least:.3f}"
    )
    print(f"  {len(batches)} batches; in a forward of {copies} prompts each costs {each:.3f} of one alone")
    print(f"  a stock cell costs {stock_cell:.2f} bare forwards")
    print(
        f"  expected {stock_cell / (share * done * each):.0f} x; floor without batching "
        f"{stock_cell / (share * least):.1f} x, with it {stock_cell / (share * least * each):.0f} x"
    )


def _peak(budget: int, queue: Any) -> None:
    model, _, tokens = native()
    torch.set_num_threads(2)

    def sweep(**options: Any) -> None:
        loop_lens.patch_sweep(
            model,
            tokens[0],
            tokens[1],
            LogitDiff(5, 7),
            site="resid_pre",
            over=("firing", "position"),
            memory_budget=budget,
            progress=False,
            **options,
        )

    sweep(positions=[-1])  # weights, plain runs, libraries
    queue.put(peak_of(sweep))


def memory() -> None:
    """Print the peak memory of sweeps under several budgets, each in a process of its own."""
    print("\npeak memory of a sweep beyond the plain runs, MiB")
    for mib in (4, 16, 64, 256):
        print(f"  budget {mib:>4}   peak {peak_in_process(_peak, mib << 20):6.1f}", flush=True)


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="time every cell of transformer-lens' sweeps")
    parser.add_argument("--no-smollm2", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads")
    for title, make in (("native, d_model 256", native), ("SmolLM2-135M, looped", smollm2)):
        if make is smollm2 and arguments.no_smollm2:
            continue
        model, twin, tokens = make()
        near = tokens[0].clone()
        near[0, near.shape[1] // 2] = tokens[1, 0, 0]
        for kind, corrupted in (("one token differs", near), ("all tokens differ", tokens[1])):
            compare(f"{title}, {kind}", (model, twin), tokens[0], corrupted, arguments.rounds, arguments.full)
    memory()


if __name__ == "__main__":
    main()
