"""Surgery that alters values where they are: edit, ablate, steer, add noise.

Each function returns a context manager, as those of `loop_lens.interventions.moving`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.interventions.changes import Change, cached, edits_at, given_value
from loop_lens.interventions.edits import Surgery, View
from loop_lens.interventions.where import Iterations, Layers, Where
from loop_lens.unrolling.numbers import whole
from loop_lens.unrolling.sites import Site


def edit(
    model: HookedLoopedTransformer,
    site: str,
    change: Change,
    *,
    iterations: Iterations = None,
    layers: Layers = None,
    positions: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    segment: str | None = None,
) -> Surgery:
    """Change a kind of site by a function: what the other surgeries are made of.

    Args:
        model: The model.
        site: As in `loop_lens.patch_sweep`.
        change: From the value at the site and its `View` to the value that goes on.
        iterations: Iterations at which to change it; all by default.
        layers: Layers at which to change it; all by default.
        positions: Positions to change, from 0; all by default.
        heads: Heads to change, in sites that have heads; all by default.
        segment: Segment; the innermost loop by default.

    Raises:
        UnknownNameError: If the model has no such site, iteration or layer.

    Example:
        >>> from loop_lens.interventions import edit
        >>> with edit(model, "mlp_out", lambda value, view: 0 * value, iterations=3):
        ...     without = model(prompt)
        >>> torch.equal(without, model(prompt))
        False
    """
    where = Where(iterations, layers, positions, heads, segment)
    return Surgery(model, edits_at(model, site, where, lambda at: change))


def ablate(
    model: HookedLoopedTransformer,
    site: str,
    how: Literal["zero", "mean", "resample"] = "zero",
    *,
    reference: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    iterations: Iterations = None,
    layers: Layers = None,
    positions: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    segment: str | None = None,
) -> Surgery:
    """Take a site's information away, at one, some or all iterations.

    Args:
        model: The model.
        site: As in `loop_lens.patch_sweep`.
        how: ``"zero"``; ``"mean"``, the reference's mean over prompts and positions (for patterns
            over prompts), padding left out; or ``"resample"``, the value that a random prompt of the
            reference has at the same position.
        reference: Cache of a run on reference prompts, for mean and resample; for resample of equal length.
        seed: For resample: which prompt each prompt gets.
        iterations: As in `edit`.
        layers: As in `edit`.
        positions: As in `edit`.
        heads: As in `edit`.
        segment: As in `edit`.

    Raises:
        ValueError: If there is no reference for an ablation that needs one, or if a padded one is to be
            resampled from.

    Example:
        >>> from loop_lens.interventions import ablate
        >>> with ablate(model, "z", "zero", iterations=2, layers=1, heads=[3]):
        ...     _, cache = model.run_with_cache(prompt)
        >>> cache["loop.2.blocks.1.attn.hook_z"][:, :, 3].abs().max().item()
        0.0
    """
    if how not in ("zero", "mean", "resample"):
        raise ValueError(f"how={how!r} is unknown: choose 'zero', 'mean' or 'resample'")
    if how != "zero" and reference is None:
        raise ValueError(f"an ablation by {how} needs reference=, the cache of a run on reference prompts")
    mask = getattr(reference, "mask", None)
    if how == "resample" and mask is not None and not mask.all():
        raise ValueError(
            "the reference's prompts differ in length, so a prompt drawn at random may have padding where another has "
            "a token: resample from the cache of a run on prompts of equal length"
        )

    def change(at: Site) -> Change:
        if reference is None or how == "zero":
            return _zero
        if how == "mean":
            return _mean(cached(reference, at), mask, at.layout == "pattern")
        return _resample(cached(reference, at), seed)

    where, seed = Where(iterations, layers, positions, heads, segment), whole(seed, "seed")
    return Surgery(model, edits_at(model, site, where, change))


def _zero(value: Tensor, view: View) -> Tensor:
    return torch.zeros_like(value)


def _mean(reference: Tensor, mask: Tensor | None, is_pattern: bool) -> Change:
    if mask is None:
        mean = reference.mean(0 if is_pattern else (0, 1), keepdim=True)
    elif is_pattern:
        there = mask[:, None, :, None].to(reference.device)
        mean = reference.masked_fill(~there, 0).sum(0, keepdim=True) / there.sum(0, keepdim=True).clamp_min(1)
    else:
        mean = reference[mask.to(reference.device)].mean(0).expand(1, 1, *reference.shape[2:])
    if is_pattern:
        return given_value(mean)
    return lambda value, view: mean.to(value.device, value.dtype).expand_as(value)


def _resample(reference: Tensor, seed: int) -> Change:
    def change(value: Tensor, view: View) -> Tensor:
        rows = torch.arange(len(value)) if view.rows is None else view.rows.cpu()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(reference), (int(rows.max()) + 1,), generator=generator)
        whole = View(view.layout, view.offset, None, view.live)
        return whole.take(reference[drawn[rows].to(reference.device)], value)

    return change


def steer(
    model: HookedLoopedTransformer,
    vector: Float[Tensor, "*batch d_model"],
    site: str = "resid_post",
    *,
    scale: float = 1.0,
    iterations: Iterations = None,
    layers: Layers = None,
    positions: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    segment: str | None = None,
) -> Surgery:
    """Add a vector to a site.

    Args:
        model: The model.
        vector: What to add, of the size of the site's last dimension.
        site: As in `loop_lens.patch_sweep`.
        scale: Factor of the vector.
        iterations: As in `edit`.
        layers: As in `edit`.
        positions: As in `edit`.
        heads: As in `edit`.
        segment: As in `edit`.

    Raises:
        ValueError: If the vector does not fit.

    Example:
        >>> from loop_lens.interventions import steer
        >>> with steer(model, torch.ones(64), "state_out", iterations=0):
        ...     steered = model(prompt)
        >>> torch.equal(steered, model(prompt))
        False
    """

    def change(value: Tensor, view: View) -> Tensor:
        if vector.ndim != 1 or vector.shape[0] != value.shape[-1]:
            raise ValueError(
                f"the vector has shape {tuple(vector.shape)}, but {site} has {value.shape[-1]} dimensions"
            )
        return value + scale * vector.to(value.device, value.dtype)

    where = Where(iterations, layers, positions, heads, segment)
    return Surgery(model, edits_at(model, site, where, lambda at: change))


def add_noise(
    model: HookedLoopedTransformer,
    std: float,
    *,
    iterations: Iterations = 0,
    seed: int = 0,
    site: str = "state",
    positions: Sequence[int] | None = None,
    segment: str | None = None,
) -> Surgery:
    """Add Gaussian noise to the state that enters an iteration.

    The noise belongs to (seed, site, prompt, position): the same run twice is the same, and so are a
    sweep's many copies of a prompt, and generation with and without a key-value cache.

    Args:
        model: The model.
        std: Standard deviation, in the units of the state.
        iterations: Iterations at whose start to add it; the first by default.
        seed: Seed.
        site: As in `loop_lens.patch_sweep`, one without heads.
        positions: Positions to change, from 0; all by default.
        segment: Segment; the innermost loop by default.

    Example:
        >>> from loop_lens.interventions import add_noise
        >>> with add_noise(model, 0.1, seed=1):
        ...     once, again = model(prompt), model(prompt)
        >>> torch.equal(once, again), torch.equal(once, model(prompt))
        (True, False)
    """
    where, seed = Where(iterations, positions=positions, segment=segment), whole(seed, "seed")
    sites = where.sites(model, site)
    if sites[0].layout != "stream":
        raise ValueError(f"noise goes to sites of the stream, not to {site!r}")
    seeds = {at.flat: seed + 7919 * index for index, at in enumerate(sites)}
    return Surgery(model, edits_at(model, site, where, lambda at: _noisy(std, seeds[at.flat])))


def _noisy(std: float, seed: int) -> Change:
    def change(value: Tensor, view: View) -> Tensor:
        rows = list(range(len(value))) if view.rows is None else view.rows.tolist()
        stop = view.offset + value.shape[1]
        drawn: dict[int, Tensor] = {}
        for row in dict.fromkeys(rows):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + row)
            # Uniform numbers come one after the other, so a longer prompt only adds to them.
            uniform = torch.rand(stop, value.shape[-1], generator=generator, dtype=torch.float64)
            drawn[row] = torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))[view.offset :]
        return value + std * torch.stack([drawn[row] for row in rows]).to(value.device, value.dtype)

    return change
