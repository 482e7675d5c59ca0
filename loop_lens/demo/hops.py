"""``python -m loop_lens.demo``: watch a looped model think one step per iteration, and change a step.

On ``loop-lens/hops``, a small looped model that comes with the package: what it would answer at each
arrow if the loop ended after each iteration, what happens to the answers when one iteration's state at one
arrow comes from another question, how the state settles, and one head's attention at each iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.demo.parts import head_page, restless_head, say_table
from loop_lens.dynamics import convergence
from loop_lens.interventions import transplant
from loop_lens.lenses.readout import lens
from loop_lens.opening.entry import boot

ARROW, QUERY = "->", "?"


def chain_of(words: Sequence[str], at: str | None = None, n: int | None = None) -> list[str]:
    """The right answer at each arrow of a prompt such as ``a c c b b a ? a -> ->``, or the n that follow another start.

    Raises:
        ValueError: If the prompt is not of this form, or nothing follows a symbol.
    """
    end = list(words).index(QUERY) if QUERY in words else 1
    arrows = list(words[end + 2 :])
    if end % 2 or not arrows or set(arrows) != {ARROW}:
        raise ValueError(
            f"a prompt is pairs, {QUERY!r}, a start, and arrows {ARROW!r}, got {' '.join(words)!r}"
        )
    follow = dict(zip(words[0:end:2], words[1:end:2], strict=True))
    chain = [words[end + 1] if at is None else at]
    for _ in range(len(arrows) if n is None else n):
        if chain[-1] not in follow:
            raise ValueError(f"no pair says what follows {chain[-1]!r}: there are {', '.join(follow)}")
        chain.append(follow[chain[-1]])
    return chain[1:]


def main(
    prompt: Annotated[
        str, typer.Option(help="Pairs, a question mark, a start, arrows.")
    ] = "a b g a h e e c b h d g c f f d ? c -> -> -> -> -> ->",
    other: Annotated[str, typer.Option(help="A start to take a step of the chain from.")] = "h",
    model: Annotated[str, typer.Option(help="A model of the same task.")] = "loop-lens/hops",
    recurrences: Annotated[int, typer.Option(help="Number of iterations.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("out"),
) -> None:
    """Watch a looped model think one step per iteration, and change a step."""
    looped = boot(model, recurrences=recurrences)
    words = prompt.split()
    try:
        right = chain_of(words)
        changed = [*words[: -len(right) - 1], other, *words[-len(right) :]]
        other_right = chain_of(changed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"{model}: {looped.n_params:,} parameters\n{looped.schedule}\n")
    with torch.no_grad():
        _report(looped, words, changed, right, other_right, out)


def _report(
    model: HookedLoopedTransformer,
    words: list[str],
    changed: list[str],
    right: list[str],
    other_right: list[str],
    out: Path,
) -> None:
    say = typer.echo
    tokens, others = model.to_tokens(" ".join(words)), model.to_tokens(" ".join(changed))
    arrows = list(range(len(words) - len(right), len(words)))

    def say_answers(follows: Sequence[str] = ()) -> None:
        """What the model answers at each arrow if the loop ends after each iteration."""
        read = lens(model, tokens, kind="coda", positions=arrows, top_k=1, progress=False)
        named = [[read.top_words[int(i)] for i in row[0, :, 0]] for row in read.top_ids]

        def cell(i: int, answer: str) -> str:
            if answer == right[i]:
                return f"[{answer}]"
            return f"<{answer}>" if answer in follows[i : i + 1] else f" {answer} "

        rows = ([cell(i, answer) for i, answer in enumerate(row)] for row in named)
        say_table([f"arrow {i + 1}" for i in range(len(right))], rows, width=9)

    start, other = words[arrows[0] - 1], changed[arrows[0] - 1]
    say(f"{' '.join(words[: arrows[0] - 2])}: from {start!r} the chain goes {' '.join(right)}.\n")
    say("1. What the model would answer at each arrow if the loop ended after each iteration")
    say("   (the coda lens; [right])\n")
    say_answers()

    t = hop = 2
    donor = model.run_with_cache(others)[1]
    reached = other_right[hop - 1]
    follows = ["", reached, *chain_of(words, reached, len(right) - hop)]
    place: dict[str, Any] = {"source": t, "cache": donor, "positions": [arrows[hop - 1]]}
    say(
        f"\n2. The same, when arrow {hop} gets the state that it has after iteration {t} of the question that starts at"
    )
    say(f"   {other!r} ({' '.join(other_right)}); <follows from it>. Once, at iteration {t}:\n")
    with transplant(model, "state_out", to=t, **place):
        say_answers(follows)
    say(f"\n   At every iteration from {t} on:\n")
    with transplant(model, "state_out", to=list(range(t, model.recurrences)), **place):
        say_answers(follows)

    settled = convergence(model, tokens, reference=4 * model.recurrences, progress=False)
    step = settled.mean("relative_step")[1:, -1].tolist()
    say("\n3. How far each iteration moves the state, relative to its length")
    say("  iteration " + "".join(f"{i:>7}" for i in range(model.recurrences)))
    say("       step       -" + "".join(f"{s:>7.3f}" for s in step))

    _, cache = model.run_with_cache(tokens)
    patterns = cache.grid("pattern")[:, :, 0][..., arrows, :]
    layer, head = restless_head((patterns[1:] - patterns[:-1]).norm(dim=-1).sum((0, -1)))
    title = f"Layer {layer}, head {head} of the loop, iteration by iteration"
    text = "The head whose attention from the arrows moves most over the iterations."
    page = head_page(cache, layer, head, words, out, title=title, text=text)
    say(
        f"\n4. Where the loop's most restless head (layer {layer}, head {head}) looks at each iteration: {page}"
    )
