"""``python -m loop_lens.demo.smollm2``: open a loop, look into every iteration, and patch one of them.

Loops the middle layers of SmolLM2-135M, all offline: what the logit lens reads after each
iteration, how far each moves the state, what happens to the answer when one place of the loop gets
the residual stream of another prompt, and one head's attention at each iteration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformer_lens.tools.analysis import logit_readout

from loop_lens.demo.parts import head_page, restless_head, say_table
from loop_lens.interventions import LogitDiff, patch_sweep
from loop_lens.opening.entry import loopify
from loop_lens.shipped.smollm2 import load_smollm2


@torch.no_grad()
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
    net, tokenizer = load_smollm2()
    layers = range(first, last + 1)
    model = loopify(net, layers=layers, times=times, tokenizer=tokenizer, model_name="SmolLM2-135M")
    model.cfg.default_prepend_bos = False  # its prompts begin without one
    say(f"\n{model}\n")
    words = [str(word) for word in model.to_str_tokens(prompt)]
    tokens, others = model.to_tokens(prompt), model.to_tokens(other)
    if tokens.shape != others.shape:
        raise typer.BadParameter(f"{prompt!r} and {other!r} have different numbers of tokens")
    right, wrong = (model.to_single_token(text) for text in (answer, other_answer))
    logits, cache = model.run_with_cache(tokens)

    say(f"1. The logit lens after each iteration of {prompt!r}, last position")
    say(f"   (cosine: to the state before it; rank: of {answer!r})\n")
    say("  iteration   cosine    rank  top tokens")
    states = torch.cat([cache["hook_initial_state"][:1, -1], cache.over_iterations("state_out")[:, 0, -1]])
    cosines = torch.cosine_similarity(states[1:], states[:-1], dim=-1)
    readings = [*logit_readout(model, states[1:]).values, logits[0, -1]]
    places = [*(f"{t:>9}  {cosine:>7.3f}" for t, cosine in enumerate(cosines.tolist())), "   output        -"]
    for place, reading in zip(places, readings, strict=True):
        rank = int((reading > reading[right]).sum())
        top = " ".join(repr(model.to_single_str_token(int(i))) for i in reading.topk(5).indices)
        say(f"  {place}  {rank:>6}  {top}")

    difference = (logits[0, -1, right] - logits[0, -1, wrong]).item()
    say(
        f"\n2. The logit difference {answer!r} - {other_answer!r} is {difference:+.2f}. How it changes when one"
    )
    say(f"   (iteration, layer) gets the residual stream of {other!r} ...\n")
    differs = (tokens != others)[0].nonzero().flatten().tolist() or [0]
    positions = (differs[0], tokens.shape[1] - 1)
    sweep = patch_sweep(
        model,
        tokens,
        others,
        LogitDiff(right, wrong),
        site="resid_post",
        over=("position", "iteration", "layer"),
        direction="noising",
        positions=positions,
    )
    for position, grid in zip(positions, sweep.effect, strict=True):
        say(f"   ... at {words[position]!r}")
        say_table(map(str, layers), ([f"{value:+.2f}" for value in row.tolist()] for row in grid), width=7)
        say("")

    patterns = cache.grid("pattern")[:, :, 0]
    layer, head = restless_head((patterns[-1] - patterns[0]).norm(dim=(-2, -1)))
    title = f"Layer {first + layer}, head {head}: {prompt!r}"
    text = "The head of the loop whose pattern moves most between the first and the last iteration."
    page = head_page(cache, layer, head, words, out, title=title, text=text)
    say(f"3. The head that moves most over the iterations, layer {first + layer} head {head}: {page}")


if __name__ == "__main__":
    typer.run(main)
