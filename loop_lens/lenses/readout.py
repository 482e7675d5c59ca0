"""One call, any lens, any sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.figures.canvas import new_figure
from loop_lens.lenses.readers import Kind, Transport, final_logits, reader, sites_of
from loop_lens.prompts.reader import read_together
from loop_lens.prompts.tokens import Tokens, token_ids, words_of
from loop_lens.unrolling.sites import Firing, Site
from loop_lens.unrolling.tree import Iteration

CHUNK = 1 << 26
"""Bytes of logits that are looked at together: with 50,000 tokens about 300 rows."""


@dataclass(frozen=True)
class LensResult:
    """What a lens reads at some sites.

    Attributes:
        kind: The kind of lens.
        sites: Names of the sites, in firing order.
        iterations: The iteration of each site.
        layers: The layer of each site, None between blocks.
        segments: The segment of each site.
        positions: The positions read.
        words: The prompts' tokens at these positions [prompt][pos].
        top_ids: The most likely tokens [site prompt pos k].
        top_probs: Their probabilities [site prompt pos k].
        top_words: The same as text, by id.
        targets: Ids of the targets [target].
        target_ranks: How many tokens are more likely than a target [site prompt pos target].
        target_probs: Probabilities of the targets [site prompt pos target].
        entropy: Entropy in nats [site prompt pos].
        kl: KL divergence in nats of the lens from the model's output, KL(output || lens) [site prompt pos].
        logits: All logits [site prompt pos vocab] if asked for.
    """

    kind: str
    sites: tuple[str, ...]
    iterations: tuple[Iteration, ...]
    layers: tuple[int | None, ...]
    segments: tuple[str | None, ...]
    positions: tuple[int, ...]
    words: tuple[tuple[str, ...], ...]
    top_ids: Int[Tensor, "site prompt pos k"]
    top_probs: Float[Tensor, "site prompt pos k"]
    top_words: dict[int, str]
    targets: Int[Tensor, " target"]
    target_ranks: Int[Tensor, "site prompt pos target"]
    target_probs: Float[Tensor, "site prompt pos target"]
    entropy: Float[Tensor, "site prompt pos"]
    kl: Float[Tensor, "site prompt pos"]
    logits: Float[Tensor, "site prompt pos vocab"] | None = None

    def to_dataframe(self) -> pd.DataFrame:
        """One row per site, prompt, position and (where there are any) target."""
        rows: list[dict[str, Any]] = []
        for s, name in enumerate(self.sites):
            for b, words in enumerate(self.words):
                for p, (position, word) in enumerate(zip(self.positions, words, strict=True)):
                    best = int(self.top_ids[s, b, p, 0])
                    row = {
                        "site": name,
                        "segment": self.segments[s],
                        "iteration": self.iterations[s],
                        "layer": self.layers[s],
                        "prompt": b,
                        "position": position,
                        "token": word,
                        "top": self.top_words[best],
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

    def first_on_top(self, target: int = 0, *, prompt: int = 0, position: int = -1) -> str | None:
        """The first site that reads a target as the most likely token, None if none does."""
        found = (self.target_ranks[:, prompt, position, target] == 0).nonzero()
        return self.sites[int(found[0])] if len(found) else None

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
        n_sites, n_positions = len(self.sites), len(self.positions)
        figure, axes = new_figure(1.8 + 0.85 * n_positions, 1.2 + 0.26 * n_sites)
        probs = self.top_probs[:, prompt, :, 0].float().cpu()
        image = axes.imshow(probs, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
        for s in range(n_sites):
            for p in range(n_positions):
                word = self.top_words[int(self.top_ids[s, prompt, p, 0])]
                colour = "white" if probs[s, p] > 0.6 else "black"
                axes.text(p, s, _shown(word), ha="center", va="center", fontsize=7, color=colour)
        axes.set_yticks(range(n_sites), [_short(name) for name in self.sites], fontsize=7)
        axes.set_xticks(range(n_positions), [_shown(word) for word in self.words[prompt]])
        axes.set(xlabel="position", title=f"{self.kind} lens")
        figure.colorbar(image, ax=axes, label="probability")
        return figure

    def _plot_ranks(self, prompt: int) -> Any:
        if not len(self.targets):
            raise ValueError("there are no ranks to draw: call lens(..., targets=[...])")
        figure, axes = new_figure(8, 3.2)
        for k, target in enumerate(self.targets.tolist()):
            ranks = self.target_ranks[:, prompt, -1, k].cpu() + 1
            axes.plot(ranks, "o-", markersize=3, label=repr(self.top_words[target]))
        step = -(-len(self.sites) // 24)
        ticks = list(range(0, len(self.sites), step))
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


@torch.no_grad()
def lens(
    model: HookedLoopedTransformer,
    tokens: Any,
    *,
    kind: Kind = "logit",
    sites: str | Sequence[str] | None = None,
    positions: Sequence[int] | None = None,
    top_k: int = 5,
    targets: Tokens | None = None,
    keep_logits: bool = False,
    lens: Transport | None = None,
    progress: bool = True,
) -> LensResult:
    """Read the model's stream at any iteration and layer.

    One plain forward gives the model's own output, a second is read site by site while it runs, so memory
    does not grow with the number of sites.

    Args:
        model: The model.
        tokens: Text, texts, or tokens [prompt pos].
        kind: ``"logit"``: final norm and unembedding. ``"native"``: what the model itself would say if
            the loop ended there (Ouro's and HRM-Text's normed state through the unembedding; Huginn's and
            the retrofits' coda). ``"coda"``: the blocks after the loop, run from this state, which for every
            family is the model at that many iterations. ``"tuned"`` and ``"jacobian"``: with ``lens=``.
        sites: A kind of site (``"resid_post"``, ``"state_out"``, ...) or hooks' names; by default every
            block's output, for native and coda the state after each iteration.
        positions: Positions to read, negative ones from the end; all by default.
        top_k: How many of the most likely tokens to keep.
        targets: Tokens whose rank and probability to give.
        keep_logits: Whether to keep all logits.
        lens: A `TunedLens` or `LoopJacobianLens`, for the kinds that need one.
        progress: Whether to show a progress bar, for work beyond two seconds.

    Raises:
        ValueError: If the kind has no meaning for the model or cannot read a site; if targets are not
            single tokens; if positions do not exist; if the lens was made for another model.
        UnknownNameError: If a site does not exist.

    Source:
        Logit lens: nostalgebraist (2020). Coda lens: Lu et al., arXiv 2507.02199.
    """
    found = sites_of(model, kind, sites)
    ids = read_together(model, tokens, "tokens")
    where = _positions(positions, ids.shape[1])
    read = reader(model, kind, where, lens)
    if lens is not None:
        lens.require(model, found)
    wanted = torch.tensor([], dtype=torch.long) if targets is None else token_ids(model, targets)
    if not 1 <= top_k <= model.cfg.d_vocab:
        raise ValueError(f"top_k must be 1 to {model.cfg.d_vocab}, got {top_k}")
    final = final_logits(model, ids, where)
    output = _Output.of(final)
    kept = final.dtype if keep_logits else None
    table = _Table.empty(len(found), output, len(wanted), top_k, kept)
    with tqdm(total=len(found), desc=f"{kind} lens", delay=2, disable=not progress, leave=False) as bar:

        def look(site: int) -> Callable[[Tensor, Any], None]:
            def hook(value: Tensor, hook: Any) -> None:
                _summarise(table, site, read(value, found[site]), output, wanted)
                bar.update()

            return hook

        hooks = [(at.flat, look(site)) for site, at in enumerate(found)]
        model.run_with_hooks(ids, fwd_hooks=hooks, return_type=None)
    if not all(table.filled):
        missing = found[table.filled.index(False)].name
        raise ValueError(f"{missing} did not fire in this forward: the lens has nothing to read there")
    return _result(model, kind, found, where, ids, wanted, table)


def _positions(positions: Sequence[int] | None, n: int) -> list[int]:
    chosen = list(range(n)) if positions is None else list(positions)
    outside = [p for p in chosen if not -n <= p < n]
    if outside or not chosen:
        raise ValueError(
            f"position {outside[0] if outside else '(none)'} does not exist: there are 0-{n - 1}"
        )
    return [p % n for p in chosen]


@dataclass
class _Table:
    """What is kept of all sites' logits.

    Allocated at once: small results that come between large short-lived logits would keep the heap from
    ever shrinking, and memory would grow with the number of sites after all.
    """

    top_ids: Tensor
    top_probs: Tensor
    ranks: Tensor
    probs: Tensor
    entropy: Tensor
    kl: Tensor
    logits: Tensor | None
    filled: list[bool]

    @classmethod
    def empty(
        cls, n_sites: int, output: _Output, n_targets: int, top_k: int, dtype: torch.dtype | None
    ) -> _Table:
        """A table to fill; with all logits if they have a dtype."""
        *lead, vocab = output.probs.shape
        shape = (n_sites, *lead)
        return cls(
            top_ids=torch.zeros(*shape, top_k, dtype=torch.long),
            top_probs=torch.zeros(*shape, top_k),
            ranks=torch.zeros(*shape, n_targets, dtype=torch.long),
            probs=torch.zeros(*shape, n_targets),
            entropy=torch.zeros(shape),
            kl=torch.zeros(shape),
            logits=None if dtype is None else torch.zeros(*shape, vocab, dtype=dtype),
            filled=[False] * n_sites,
        )


@dataclass(frozen=True)
class _Output:
    """The model's own distribution [prompt pos vocab], and its negative entropy [prompt pos]."""

    probs: Tensor
    negative: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> _Output:
        logprobs = logits.float().log_softmax(-1)
        probs = logprobs.exp()
        return cls(probs, (probs * logprobs).nan_to_num().sum(-1))


def _summarise(table: _Table, site: int, logits: Tensor, output: _Output, targets: Tensor) -> None:
    """Summarise one site's logits [prompt pos vocab], a few rows at a time.

    With Z = log sum exp: entropy = Z - p . logits, and KL(q || p) = q . log q + Z - q . logits.
    """
    flat, probs, negative = logits.flatten(0, 1), output.probs.flatten(0, 1), output.negative.flatten()
    size = max(1, CHUNK // (4 * flat.shape[-1]))
    targets = targets.to(flat.device)
    top_k = table.top_ids.shape[-1]
    for start in range(0, len(flat), size):
        rows = slice(start, start + size)
        raw = flat[rows].float()
        z = raw.logsumexp(-1)
        top = raw.topk(top_k, dim=-1)
        at_targets = raw[:, targets]
        table.top_ids[site].flatten(0, 1)[rows] = top.indices.cpu()
        table.top_probs[site].flatten(0, 1)[rows] = (top.values - z[:, None]).exp().cpu()
        table.probs[site].flatten(0, 1)[rows] = (at_targets - z[:, None]).exp().cpu()
        for k, column in enumerate(at_targets.T):
            table.ranks[site].flatten(0, 1)[rows, k] = (raw > column[:, None]).sum(-1).cpu()
        entropy = z - torch.linalg.vecdot(raw.softmax(-1), raw)
        kl = negative[rows] + z - torch.linalg.vecdot(probs[rows], raw)
        table.entropy[site].flatten()[rows] = entropy.cpu()
        table.kl[site].flatten()[rows] = kl.clamp_min(0).cpu()
    if table.logits is not None:
        table.logits[site] = logits.cpu()
    table.filled[site] = True


def _result(
    model: HookedLoopedTransformer,
    kind: str,
    found: Sequence[Site],
    where: Sequence[int],
    ids: Tensor,
    targets: Tensor,
    table: _Table,
) -> LensResult:
    known = {*table.top_ids.unique().tolist(), *targets.tolist()}
    words = {int(i): words_of(model, torch.tensor([i]))[0] for i in known}
    places = [at.place for at in found]
    firings = [place if isinstance(place, Firing) else None for place in places]
    return LensResult(
        kind=kind,
        sites=tuple(
            f"{f.prefix}.{model.locate(at.flat).hook}" if f else at.flat
            for f, at in zip(firings, found, strict=True)
        ),
        iterations=tuple(place.iteration for place in places),
        layers=tuple(f.layer if f else None for f in firings),
        segments=tuple(place.segment for place in places),
        positions=tuple(where),
        words=tuple(words_of(model, prompt[list(where)]) for prompt in ids),
        top_ids=table.top_ids,
        top_probs=table.top_probs,
        top_words=words,
        targets=targets,
        target_ranks=table.ranks,
        target_probs=table.probs,
        entropy=table.entropy,
        kl=table.kl,
        logits=table.logits,
    )
