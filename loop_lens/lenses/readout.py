"""One call, any lens, any sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.lenses.base import Lens, require_output, sites_of
from loop_lens.lenses.coda import CodaLens
from loop_lens.lenses.logit import LogitLens
from loop_lens.lenses.native import NativeLens
from loop_lens.lenses.positions import Positions
from loop_lens.lenses.result import NAN, LensResult
from loop_lens.prompts.reader import read_batch
from loop_lens.prompts.tokens import Tokens, token_ids, words_of
from loop_lens.unrolling.numbers import whole
from loop_lens.unrolling.sites import Site

CHUNK = 1 << 26
"""Bytes of logits that are looked at together: with 50,000 tokens about 300 rows."""

Kind = Literal["logit", "native", "coda"]
LENS_KINDS: dict[str, type[Lens]] = {"logit": LogitLens, "native": NativeLens, "coda": CodaLens}
"""Lenses that need nothing but the model."""
_FITTED = {"tuned": "fit_tuned_lens", "jacobian": "fit_jacobian_lens"}


def lens_of(kind: str | Lens) -> Lens:
    """A lens by its name, or as it is.

    Raises:
        ValueError: If there is no such lens, or it must be fitted first.
    """
    if isinstance(kind, Lens):
        return kind
    if kind in _FITTED:
        raise ValueError(
            f"a {kind} lens must be fitted: pass kind= what loop_lens.lenses.{_FITTED[kind]} returns"
        )
    if kind not in LENS_KINDS:
        raise ValueError(f"kind {kind!r} is unknown: choose one of {', '.join(LENS_KINDS)}, or give a lens")
    return LENS_KINDS[kind]()


@torch.no_grad()
def lens(
    model: HookedLoopedTransformer,
    prompts: Any,
    *,
    kind: Kind | Lens = "logit",
    sites: str | Sequence[str] | None = None,
    positions: Sequence[int] | None = None,
    top_k: int = 5,
    targets: Tokens | None = None,
    keep_logits: bool = False,
    progress: bool = True,
) -> LensResult:
    """Read the model's stream at any iteration and layer.

    One plain forward gives the model's own output, a second is read site by site while it runs, so memory
    does not grow with the number of sites.

    Args:
        model: The model.
        prompts: As for `loop_lens.prompts.read_prompts`; lengths may differ.
        kind: ``"logit"``: final norm and unembedding (`LogitLens`). ``"coda"``: the blocks after the loop, run
            from the state after an iteration, which for every family is the model at that many iterations
            (`CodaLens`). ``"native"``: the same, for models that were made to be read there (`NativeLens`).
            Or a lens: a `TunedLens`, a `LoopJacobianLens`, one of your own.
        sites: A kind of site (``"resid_post"``, ``"state_out"``, ...) or hooks' names; by default every
            block's output, for native and coda the state after each iteration.
        positions: Positions to read, negative ones from each prompt's own end; all by default.
        top_k: How many of the most likely tokens to keep.
        targets: Tokens whose rank and probability to give.
        keep_logits: Whether to keep all logits.
        progress: Whether to show a progress bar, for work beyond two seconds.

    Raises:
        ValueError: If the lens has no meaning for the model, cannot read a site, or was made for another
            model; if targets are not single tokens; if no prompt has a position.
        UnknownNameError: If a site does not exist.

    Example:
        >>> result = loop_lens.lens(model, prompt, kind="coda", targets="b")
        >>> [result.top_words[int(i)] for i in result.top_ids[-1, 0, -3:, 0]]
        ['c', 'b', 'a']
        >>> result.first_on_top(position=-2)
        'loop.1.hook_state_out'
    """
    reads = lens_of(kind)
    found = sites_of(model, reads, sites)
    batch = read_batch(model, prompts)
    chosen = Positions.of(batch.lengths, positions)
    wanted = torch.tensor([], dtype=torch.long) if targets is None else token_ids(model, targets)
    top_k = whole(top_k, "top_k")
    if not 1 <= top_k <= model.cfg.d_vocab:
        raise ValueError(f"top_k must be 1 to {model.cfg.d_vocab}, got {top_k}")
    where = chosen.where(batch.tokens.device)
    final: Any = model(batch.tokens)
    final = final[where]
    output = _Output.of(final)
    table = _Table.empty(len(found), output, len(wanted), top_k, final.dtype if keep_logits else None)
    with tqdm(total=len(found), desc=f"{reads.kind} lens", delay=2, disable=not progress, leave=False) as bar:

        def look(i: int, site: Site) -> Callable[[Tensor, Any], None]:
            def hook(value: Tensor, hook: Any) -> None:
                logits = reads.read_at(value, where, site, model)
                if reads.says_output(site, model):
                    require_output(logits, final, site, reads.kind)
                _summarise(table, i, logits, output, wanted)
                bar.update()

            return hook

        hooks = [(site.flat, look(i, site)) for i, site in enumerate(found)]
        model.run_with_hooks(batch.tokens, fwd_hooks=hooks, return_type=None)
    if not all(table.filled):
        missing = found[table.filled.index(False)].name
        raise ValueError(f"{missing} did not fire in this forward: the lens has nothing to read there")
    known = sorted({*table.top_ids.unique().tolist(), *wanted.tolist()})
    return LensResult(
        kind=reads.kind,
        sites=tuple(site.name for site in found),
        iterations=tuple(site.iteration for site in found),
        layers=tuple(site.layer for site in found),
        segments=tuple(site.segment for site in found),
        positions=chosen.numbers,
        words=tuple(
            tuple(words_of(model, tokens[[p]])[0] if p >= 0 else "" for p in numbers.tolist())
            for tokens, numbers in zip(batch.tokens.cpu(), chosen.numbers, strict=True)
        ),
        top_ids=chosen.spread(table.top_ids, -1),
        top_probs=chosen.spread(table.top_probs, NAN),
        vocabulary=tuple(zip(known, words_of(model, torch.tensor(known)), strict=True)),
        targets=wanted,
        target_ranks=chosen.spread(table.ranks, -1),
        target_probs=chosen.spread(table.probs, NAN),
        entropy=chosen.spread(table.entropy, NAN),
        kl=chosen.spread(table.kl, NAN),
        logits=None if table.logits is None else chosen.spread(table.logits, NAN),
    )


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
        n_tokens, vocab = output.probs.shape
        shape = (n_sites, n_tokens)
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
    """The model's own distribution [token vocab], and its negative entropy [token]."""

    probs: Tensor
    negative: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> _Output:
        logprobs = logits.float().log_softmax(-1)
        probs = logprobs.exp()
        return cls(probs, (probs * logprobs).nan_to_num().sum(-1))


def _summarise(table: _Table, site: int, logits: Tensor, output: _Output, targets: Tensor) -> None:
    """Summarise one site's logits [token vocab], a few rows at a time.

    With Z = log sum exp: entropy = Z - p . logits, and KL(q || p) = q . log q + Z - q . logits.
    """
    size = max(1, CHUNK // (4 * logits.shape[-1]))
    targets = targets.to(logits.device)
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        raw = logits[rows].float()
        z = raw.logsumexp(-1)
        top = raw.topk(table.top_ids.shape[-1], dim=-1)
        at_targets = raw[:, targets]
        table.top_ids[site, rows] = top.indices.cpu()
        table.top_probs[site, rows] = (top.values - z[:, None]).exp().cpu()
        table.probs[site, rows] = (at_targets - z[:, None]).exp().cpu()
        for k, column in enumerate(at_targets.T):
            table.ranks[site, rows, k] = (raw > column[:, None]).sum(-1).cpu()
        entropy = z - torch.linalg.vecdot(raw.softmax(-1), raw)
        kl = output.negative[rows] + z - torch.linalg.vecdot(output.probs[rows], raw)
        table.entropy[site, rows] = entropy.cpu()
        table.kl[site, rows] = kl.clamp_min(0).cpu()
    if table.logits is not None:
        table.logits[site] = logits.cpu()
    table.filled[site] = True
