"""``python -m loop_lens.demo.smollm2``: open a loop, look into every iteration, and patch one of them.

Loops the middle layers of SmolLM2-135M, all offline: what the logit lens reads after each
iteration, how far each moves the state, what happens to the answer when one place of the loop gets
the residual stream of another prompt, and one head's attention at each iteration.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformer_lens.tools.analysis import logit_readout

from loop_lens.bridge.cache import LoopCache
from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.demo.parts import head_page, largest, table_lines
from loop_lens.interventions import LogitDiff, patch_sweep
from loop_lens.opening.entry import loopify
from loop_lens.shipped.smollm2 import load_smollm2


def top_tokens(model: HookedLoopedTransformer, logits: Tensor, k: int = 5) -> str:
    """The k most likely tokens of logits [vocab], most likely first."""
    return " ".join(repr(model.to_single_str_token(int(i))) for i in logits.topk(k).indices)


def lens_rows(model: HookedLoopedTransformer, cache: LoopCache, answer: int) -> Iterable[str]:
    """What the logit lens reads from the state after each iteration, at the last position."""
    states = cache.over_iterations("state_out")[:, 0, -1]
    readout = logit_readout(model, states).values
    before = cache["hook_initial_state"][0, -1]
    for t, (state, logits) in enumerate(zip(states, readout, strict=True)):
        cosine = torch.cosine_similarity(state, before, dim=0).item()
        rank = int((logits > logits[answer]).sum())
        yield f"  {t:>9}  {cosine:>7.3f}  {rank:>6}  {top_tokens(model, logits)}"
        before = state


def grid_rows(grid: Tensor, first_layer: int) -> Iterable[str]:
    """A grid [iteration layer] as lines of text."""
    columns = [str(first_layer + layer) for layer in range(grid.shape[1])]
    return table_lines(columns, ([f"{value:+.2f}" for value in row.tolist()] for row in grid), width=7)


def restless_head(cache: LoopCache) -> tuple[int, int]:
    """Layer and head whose pattern moves most between the first and the last iteration."""
    patterns = cache.grid("pattern")[:, :, 0]
    moved = (patterns[-1] - patterns[0]).norm(dim=(-2, -1))
    return largest(moved)


def main(
    prompt: Annotated[str, typer.Option(help="The prompt to look into.")] = "The capital of France is",
    other: Annotated[str, typer.Option(help="The prompt to patch from.")] = "The capital of Italy is",
    answer: Annotated[str, typer.Option(help="Right answer to the prompt.")] = " Paris",
    other_answer: Annotated[str, typer.Option(help="Right answer to the other.")] = " Rome",
    first: Annotated[int, typer.Option(help="First layer of the loop.")] = 10,
    last: Annotated[int, typer.Option(help="Last layer of the loop.")] = 19,
    times: Annotated[int, typer.Option(help="Number of iterations.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("out"),
) -> None:
    """Open a loop, look into every iteration, and patch one of them."""
    say = typer.echo
    say(f"Loading SmolLM2-135M and running layers {first}-{last} {times} times ...")
    torch.manual_seed(0)
    torch_model, tokenizer = load_smollm2()
    model = loopify(
        torch_model,
        layers=range(first, last + 1),
        times=times,
        tokenizer=tokenizer,
        model_name="SmolLM2-135M",
    )
    model.cfg.default_prepend_bos = False  # its prompts begin without one
    say(f"\n{model}\n")
    with torch.no_grad():
        _report(model, prompt, other, (answer, other_answer), first, out)


def _report(
    model: HookedLoopedTransformer,
    prompt: str,
    other: str,
    answers: tuple[str, str],
    first: int,
    out: Path,
) -> None:
    say = typer.echo
    words = [str(word) for word in model.to_str_tokens(prompt)]
    tokens, others = model.to_tokens(prompt), model.to_tokens(other)
    if tokens.shape != others.shape:
        raise typer.BadParameter(f"{prompt!r} and {other!r} have different numbers of tokens")
    right, wrong = (model.to_single_token(text) for text in answers)
    logits, cache = model.run_with_cache(tokens)

    say(f"1. The logit lens after each iteration of {prompt!r}, last position")
    say(f"   (cosine: to the state before it; rank: of {answers[0]!r})\n")
    say("  iteration   cosine    rank  top tokens")
    for row in lens_rows(model, cache, right):
        say(row)
    say(
        f"     output        -  {int((logits[0, -1] > logits[0, -1, right]).sum()):>6}  "
        f"{top_tokens(model, logits[0, -1])}"
    )

    difference = (logits[0, -1, right] - logits[0, -1, wrong]).item()
    say(
        f"\n2. The logit difference {answers[0]!r} - {answers[1]!r} is {difference:+.2f}. How it changes when one"
    )
    say(f"   (iteration, layer) gets the residual stream of {other!r} ...\n")
    differs = (tokens != others)[0].nonzero().flatten().tolist() or [0]
    places = (differs[0], tokens.shape[1] - 1)
    sweep = patch_sweep(
        model,
        tokens,
        others,
        LogitDiff(right, wrong),
        site="resid_post",
        over=("position", "iteration", "layer"),
        direction="noising",
        positions=places,
    )
    for position, grid in zip(places, sweep.effect, strict=True):
        say(f"   ... at {words[position]!r}")
        for row in grid_rows(grid, first):
            say(row)
        say("")

    layer, head = restless_head(cache)
    title = f"Layer {first + layer}, head {head}: {prompt!r}"
    text = "The head of the loop whose pattern moves most between the first and the last iteration."
    page = head_page(cache, layer, head, words, out, title=title, text=text)
    say(f"3. The head that moves most over the iterations, layer {first + layer} head {head}: {page}")


if __name__ == "__main__":
    typer.run(main)
