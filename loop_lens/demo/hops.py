"""``python -m loop_lens.demo``: watch a looped model think one step per iteration, and change a step.

On ``loop-lens/hops``, a small looped model that comes with the package: what it would answer at each
arrow if the loop ended after each iteration, what happens to the answers when one iteration's state at one
arrow comes from another question, how the state settles, and one head's attention at each iteration.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from loop_lens.bridge.cache import LoopCache
from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.demo.parts import head_page, largest, table_lines
from loop_lens.dynamics import convergence
from loop_lens.interventions import transplant
from loop_lens.lenses.readout import lens
from loop_lens.opening.entry import boot

ARROW, QUERY = "->", "?"


def pairs_of(words: Sequence[str]) -> dict[str, str]:
    """What follows what, in a prompt such as ``a c c b b a ? a -> ->``.

    Raises:
        ValueError: If the prompt is not of this form.
    """
    end = list(words).index(QUERY) if QUERY in words else 1
    arrows = list(words[end + 2 :])
    if end % 2 or not arrows or set(arrows) != {ARROW}:
        raise ValueError(
            f"a prompt is pairs, {QUERY!r}, a start, and arrows {ARROW!r}, got {' '.join(words)!r}"
        )
    return dict(zip(words[0:end:2], words[1:end:2], strict=True))


def chain_after(words: Sequence[str], at: str, n: int) -> list[str]:
    """The n symbols that follow one in a prompt.

    Raises:
        ValueError: If nothing follows one of them.
    """
    follow, chain = pairs_of(words), list[str]()
    for _ in range(n):
        if at not in follow:
            raise ValueError(f"no pair says what follows {at!r}: there are {', '.join(follow)}")
        at = follow[at]
        chain.append(at)
    return chain


def chain_of(words: Sequence[str]) -> list[str]:
    """The right answer at each arrow of a prompt."""
    pairs_of(words)
    end = list(words).index(QUERY)
    return chain_after(words, words[end + 1], len(words) - end - 2)


def answers(model: HookedLoopedTransformer, tokens: Tensor, arrows: Sequence[int]) -> list[list[str]]:
    """The model's answer at each arrow if the loop ended after each iteration [iteration][arrow]."""
    read = lens(model, tokens, kind="coda", positions=arrows, top_k=1, progress=False)
    return [[read.top_words[int(i)] for i in row[0, :, 0]] for row in read.top_ids]


def table(
    rows: Iterable[Sequence[str]], right: Sequence[str], other: Sequence[str] | None = None
) -> Iterable[str]:
    """Answers per iteration as lines of text: right ones in brackets, those of another chain in < >."""

    def cell(i: int, answer: str) -> str:
        if answer == right[i]:
            return f"[{answer}]"
        return f"<{answer}>" if other is not None and answer == other[i] else f" {answer} "

    columns = [f"arrow {i + 1}" for i in range(len(right))]
    return table_lines(columns, ([cell(i, answer) for i, answer in enumerate(row)] for row in rows), width=9)


def restless_head(cache: LoopCache, arrows: Sequence[int]) -> tuple[int, int]:
    """Layer and head of the loop whose attention from the arrows moves most over the iterations."""
    patterns = cache.grid("pattern")[:, :, 0][..., list(arrows), :]
    moved = (patterns[1:] - patterns[:-1]).norm(dim=-1).sum((0, -1))  # [layer head]
    return largest(moved)


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
    say = typer.echo
    looped = boot(model, recurrences=recurrences)
    words = prompt.split()
    try:
        right = chain_of(words)
        question = list(words).index(QUERY) + 1
        changed = [*words[:question], other, *words[question + 1 :]]
        other_right = chain_of(changed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    say(f"{model}: {looped.n_params:,} parameters\n{looped.schedule}\n")
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
    start = words[arrows[0] - 1]
    say(f"{' '.join(words[: arrows[0] - 2])}: from {start!r} the chain goes {' '.join(right)}.\n")
    say("1. What the model would answer at each arrow if the loop ended after each iteration")
    say("   (the coda lens; [right])\n")
    for line in table(answers(model, tokens, arrows), right):
        say(line)

    t = hop = 2
    donor = model.run_with_cache(others)[1]
    follows = ["", *other_right[hop - 1 :][:1]]
    follows += chain_after(words, follows[-1], len(right) - hop)
    place: dict[str, Any] = {"source": t, "cache": donor, "positions": [arrows[hop - 1]]}
    say(
        f"\n2. The same, when arrow {hop} gets the state that it has after iteration {t} of the question that starts at"
    )
    say(
        f"   {changed[arrows[0] - 1]!r} ({' '.join(other_right)}); <follows from it>. Once, at iteration {t}:\n"
    )
    with transplant(model, "state_out", to=t, **place):
        for line in table(answers(model, tokens, arrows), right, follows):
            say(line)
    say(f"\n   At every iteration from {t} on:\n")
    with transplant(model, "state_out", to=list(range(t, model.recurrences)), **place):
        for line in table(answers(model, tokens, arrows), right, follows):
            say(line)

    settled = convergence(model, tokens, reference=4 * model.recurrences, progress=False)
    say("\n3. How far each iteration moves the state, relative to its length")
    say("  iteration " + "".join(f"{i:>7}" for i in range(model.recurrences)))
    step = settled.mean("relative_step")[:, -1].tolist()
    say("       step " + "".join(f"{'-' if i == 0 else f'{s:.3f}':>7}" for i, s in enumerate(step)))

    _, cache = model.run_with_cache(tokens)
    layer, head = restless_head(cache, arrows)
    title = f"Layer {layer}, head {head} of the loop, iteration by iteration"
    text = "The head whose attention from the arrows moves most over the iterations."
    page = head_page(cache, layer, head, words, out, title=title, text=text)
    say(
        f"\n4. Where the loop's most restless head (layer {layer}, head {head}) looks at each iteration: {page}"
    )
