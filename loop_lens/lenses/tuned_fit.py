"""Training of the tuned lens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.tools.analysis import logit_readout

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.lenses.base import sites_of
from loop_lens.lenses.logit import LogitLens, is_normed
from loop_lens.lenses.tuned import TunedLens, fingerprint, translator_key
from loop_lens.measuring.gradients import differentiates
from loop_lens.prompts.reader import device_of, read_batch, read_prompts
from loop_lens.unrolling.numbers import whole
from loop_lens.unrolling.sites import Site


@differentiates
def fit_tuned_lens(
    model: HookedLoopedTransformer,
    prompts: Any,
    *,
    sites: str | Sequence[str] = "resid_post",
    rank: int | None = None,
    shared: bool = False,
    steps: int = 250,
    batch_size: int = 4,
    seq_len: int = 64,
    learning_rate: float = 1e-3,
    held_out: float = 0.2,
    seed: int = 0,
    progress: bool = True,
) -> TunedLens:
    """Train translators so that the logit lens after them says what the model says in the end.

    The loss is KL(model || lens) at every position. A translator that does not lower it on held-out
    rows is put back to the identity, so the lens is never worse there than the logit lens.

    Args:
        model: The model; its weights are not changed.
        prompts: As for `loop_lens.prompts.read_prompts`. Longer ones are cut into rows.
        sites: A kind of site or hooks' names, of streams.
        rank: Rank of the translators' matrix: None for a full one, 0 for a bias alone.
        shared: Whether iterations share their layer's translator.
        steps: Steps of Adam.
        batch_size: Rows a step.
        seq_len: Tokens a row has at most.
        learning_rate: Step size, decaying linearly to zero.
        held_out: Share of the rows kept for measuring.
        seed: Seed of the rows' order.
        progress: Whether to show a progress bar.

    Returns:
        The lens; ``report`` has each site's held-out KL with the logit lens and with this one.

    Raises:
        ValueError: If there are too few data, or a number of something is none.

    Source:
        Belrose et al., arXiv 2303.08112; here per iteration, with rows where theirs are documents.

    Example:
        >>> from loop_lens.lenses import fit_tuned_lens
        >>> sites = ["loop.0.blocks.0.hook_resid_post"]
        >>> lens = fit_tuned_lens(model, prompts, sites=sites, rank=0, steps=5, progress=False)
        >>> list(lens.report.columns)
        ['site', 'logit_kl', 'tuned_kl']
        >>> loop_lens.lens(model, prompts, kind=lens, sites=sites).kl.shape
        torch.Size([1, 2, 11])
    """
    steps, batch_size, seq_len = (
        whole(value, name, 1)
        for name, value in (("steps", steps), ("batch_size", batch_size), ("seq_len", seq_len))
    )
    seed, rank = whole(seed, "seed"), None if rank is None else whole(rank, "rank", 0)
    found = sites_of(model, LogitLens(), sites)
    rows = [row for tokens in read_prompts(model, prompts) for row in tokens.split(seq_len)]
    if len(rows) < 2:
        raise ValueError(
            f"the prompts make {len(rows)} rows of {seq_len} tokens: give more of them, or a smaller seq_len"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    n_held = min(len(rows) - 1, max(1, round(held_out * len(rows))))
    kept, training = rows[:n_held], rows[n_held:]
    keys = dict.fromkeys(translator_key(site, shared=shared) for site in found)
    torch.manual_seed(seed)
    lens = TunedLens(list(keys), model.cfg.d_model, rank=rank, shared=shared, model_id=fingerprint(model))
    lens = lens.to(device_of(model))
    optimizer = torch.optim.Adam(lens.parameters(), lr=learning_rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in tqdm(range(steps), desc="tuned lens", disable=not progress):
        picked = torch.randint(len(training), (batch_size,), generator=generator).tolist()
        streams, wanted = _run(model, [training[i] for i in picked], found)
        optimizer.zero_grad()
        for site in found:
            loss = _kl(model, lens.translate(streams[site.flat], site), wanted, site)
            (loss / len(found)).backward(inputs=list(lens.parameters()))
        optimizer.step()
        decay.step()
    lens.requires_grad_(False)
    lens.report = _keep_what_helps(model, lens, found, kept, batch_size)
    return lens


@torch.no_grad()
def _run(
    model: HookedLoopedTransformer, rows: Sequence[Tensor], sites: Sequence[Site]
) -> tuple[dict[str, Float[Tensor, "1 token d_model"]], Float[Tensor, "1 token vocab"]]:
    """The sites' streams and the model's log-probabilities, of all tokens but padding."""
    batch = read_batch(model, rows)
    logits, cache = model.run_with_cache(batch.tokens, names_filter=[site.flat for site in sites])
    streams = {site.flat: cache[site.flat][batch.mask][None] for site in sites}
    return streams, logits[batch.mask][None].float().log_softmax(-1)


def _kl(model: HookedLoopedTransformer, stream: Tensor, wanted: Tensor, site: Site) -> Tensor:
    read = logit_readout(
        model,
        stream,
        apply_ln=not is_normed(model, site),
        return_type="log_probs",
        chunk_size=max(1, stream[..., 0].numel()),
        enable_grad=torch.is_grad_enabled(),
    )
    return (wanted.exp() * (wanted - read.values)).sum(-1).mean()


@torch.no_grad()
def _keep_what_helps(
    model: HookedLoopedTransformer,
    lens: TunedLens,
    sites: Sequence[Site],
    rows: Sequence[Tensor],
    batch_size: int,
) -> pd.DataFrame:
    """Measure on held-out rows; put translators back that do not help at every site they serve."""
    plain, tuned = torch.zeros(len(sites)), torch.zeros(len(sites))
    n_tokens = sum(map(len, rows))
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        streams, wanted = _run(model, part, sites)
        share = sum(map(len, part)) / n_tokens
        for i, site in enumerate(sites):
            stream = streams[site.flat]
            plain[i] += share * _kl(model, stream, wanted, site).cpu()
            tuned[i] += share * _kl(model, lens.translate(stream, site), wanted, site).cpu()
    for key in lens.sites:
        served = [i for i, site in enumerate(sites) if lens.key(site) == key]
        if (tuned[served] > plain[served]).any():
            lens.reset(key)
            tuned[served] = plain[served]
    return pd.DataFrame(
        {"site": [site.flat for site in sites], "logit_kl": plain.tolist(), "tuned_kl": tuned.tolist()}
    )
