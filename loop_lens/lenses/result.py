"""What a lens read, as tables and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loop_lens.figures.canvas import new_figure, spaced
from loop_lens.measuring.results import Result, merged
from loop_lens.unrolling.tree import Iteration

NAN = float("nan")


@dataclass(frozen=True)
class LensResult(Result):
    """What a lens reads at some sites.

    Where a prompt lacks a position that another one has, ids and ranks are -1 and other numbers NaN.

    Attributes:
        kind: The kind of lens.
        sites: Names of the sites, in firing order.
        iterations: The iteration of each site.
        layers: The layer of each site, None between blocks.
        segments: The segment of each site.
        targets: Ids of the targets [target].
        positions: The positions read, -1 where the prompt has none such [prompt pos].
        words: The prompts' tokens at these positions, empty where there is none [prompt][pos].
        top_ids: The most likely tokens [site prompt pos k].
        top_probs: Their probabilities [site prompt pos k].
        vocabulary: Id and text of every token in ``top_ids`` and ``targets``.
        target_ranks: How many tokens are more likely than a target [site prompt pos target].
        target_probs: Probabilities of the targets [site prompt pos target].
        entropy: Entropy in nats [site prompt pos].
        kl: KL divergence in nats of the lens from the model's output, KL(output || lens) [site prompt pos].
        logits: All logits [site prompt pos vocab] if asked for.

    Example:
        >>> result = loop_lens.lens(model, prompts, kind="coda", positions=[-1], targets=["c", "d"])
        >>> result.target_ranks.shape
        torch.Size([8, 2, 1, 2])
        >>> result.to_dataframe()[["prompt", "position", "token", "top"]].astype(str).iloc[-1].tolist()
        ['1', '8', '->', 'f']
    """

    kind: str
    sites: tuple[str, ...]
    iterations: tuple[Iteration, ...]
    layers: tuple[int | None, ...]
    segments: tuple[str | None, ...]
    targets: Int[Tensor, " target"]
    positions: Int[Tensor, "prompt pos"] = merged("append", fill=-1)
    words: tuple[tuple[str, ...], ...] = merged("append")
    top_ids: Int[Tensor, "site prompt pos k"] = merged("append", dim=1, fill=-1)
    top_probs: Float[Tensor, "site prompt pos k"] = merged("append", dim=1, fill=NAN)
    vocabulary: tuple[tuple[int, str], ...] = merged("append")
    target_ranks: Int[Tensor, "site prompt pos target"] = merged("append", dim=1, fill=-1)
    target_probs: Float[Tensor, "site prompt pos target"] = merged("append", dim=1, fill=NAN)
    entropy: Float[Tensor, "site prompt pos"] = merged("append", dim=1, fill=NAN)
    kl: Float[Tensor, "site prompt pos"] = merged("append", dim=1, fill=NAN)
    logits: Float[Tensor, "site prompt pos vocab"] | None = merged("append", dim=1, fill=NAN, default=None)

    @cached_property
    def top_words(self) -> dict[int, str]:
        """The text of the tokens in ``top_ids`` and ``targets``, by id."""
        return dict(self.vocabulary)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per site, prompt, position and (where there are any) target."""
        rows: list[dict[str, Any]] = []
        there = [(b, p, int(self.positions[b, p])) for b, p in (self.positions >= 0).nonzero().tolist()]
        for s, name in enumerate(self.sites):
            for b, p, position in there:
                row = {
                    "site": name,
                    "segment": self.segments[s],
                    "iteration": self.iterations[s],
                    "layer": self.layers[s],
                    "prompt": b,
                    "position": position,
                    "token": self.words[b][p],
                    "top": self.top_words[int(self.top_ids[s, b, p, 0])],
                    "top_prob": float(self.top_probs[s, b, p, 0]),
                    "entropy": float(self.entropy[s, b, p]),
                    "kl": float(self.kl[s, b, p]),
                }
                rows += [{**row, **target} for target in self._targets(s, b, p)] or [row]
        return pd.DataFrame(rows)

    def _targets(self, s: int, b: int, p: int) -> Iterator[dict[str, Any]]:
        for k, target in enumerate(self.targets.tolist()):
            yield {
                "target": self.top_words[target],
                "rank": int(self.target_ranks[s, b, p, k]),
                "prob": float(self.target_probs[s, b, p, k]),
            }

    def _columns(self, prompt: int) -> list[int]:
        """Which positions read are the prompt's own."""
        return (self.positions[prompt] >= 0).nonzero().flatten().tolist()

    def first_on_top(self, target: int = 0, *, prompt: int = 0, position: int = -1) -> str | None:
        """The first site that reads a target as the most likely token, None if none does.

        Args:
            target: Which target.
            prompt: Which prompt.
            position: Which of the positions read of this prompt.
        """
        ranks = self.target_ranks[:, prompt, self._columns(prompt)[position], target]
        on_top = (ranks == 0).nonzero()
        return self.sites[int(on_top[0])] if len(on_top) else None

    def plot(self, what: Literal["tokens", "ranks"] = "tokens", *, prompt: int = 0) -> Any:
        """Draw the lens.

        Args:
            what: ``"tokens"``: sites by positions, the most likely token in each cell, its probability as
                colour. ``"ranks"``: each target's rank over the sites, at the last position read.
            prompt: Which prompt.

        Returns:
            A matplotlib figure, not shown.
        """
        return self._plot_tokens(prompt) if what == "tokens" else self._plot_ranks(prompt)

    def _plot_tokens(self, prompt: int) -> Any:
        columns = self._columns(prompt)
        n_sites, n_positions = len(self.sites), len(columns)
        figure, axes = new_figure(1.8 + 0.85 * n_positions, 1.2 + 0.26 * n_sites)
        ids, probs = (values[:, prompt, columns, 0] for values in (self.top_ids, self.top_probs))
        image = axes.imshow(probs, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
        for s, p in torch.cartesian_prod(torch.arange(n_sites), torch.arange(n_positions)).tolist():
            colour = "white" if probs[s, p] > 0.6 else "black"
            word = _shown(self.top_words[int(ids[s, p])])
            axes.text(p, s, word, ha="center", va="center", fontsize=7, color=colour)
        axes.set_yticks(range(n_sites), [_short(name) for name in self.sites], fontsize=7)
        axes.set_xticks(range(n_positions), [_shown(self.words[prompt][p]) for p in columns])
        axes.set(xlabel="position", title=f"{self.kind} lens")
        figure.colorbar(image, ax=axes, label="probability")
        return figure

    def _plot_ranks(self, prompt: int) -> Any:
        if not len(self.targets):
            raise ValueError("there are no ranks to draw: call lens(..., targets=[...])")
        figure, axes = new_figure(8, 3.2)
        ranks = self.target_ranks[:, prompt, self._columns(prompt)[-1]] + 1
        for k, target in enumerate(self.targets.tolist()):
            axes.plot(ranks[:, k], "o-", markersize=3, label=repr(self.top_words[target]))
        ticks = spaced(len(self.sites), 24)
        axes.set_xticks(ticks, [_short(self.sites[i]) for i in ticks], rotation=60, fontsize=7, ha="right")
        axes.set(yscale="log", ylabel="rank (1 is the top)", title=f"{self.kind} lens")
        axes.invert_yaxis()
        axes.legend()
        return figure


def _short(name: str) -> str:
    return name.replace("blocks.", "").replace(".hook_resid_post", "").replace(".hook_state_out", "")


def _shown(word: str) -> str:
    """A token that a picture can show: dollar signs would be taken for formulas."""
    return "\N{OPEN BOX}" * len(word) if word.isspace() else repr(word)[1:-1].replace("$", r"\$")
