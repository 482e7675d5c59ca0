"""Patching estimated from gradients: attribution patching and integrated gradients.

``"attribution"`` is first order: (donor - base) times the gradient at the base run, one forward and
one backward. ``"integrated"`` averages the gradient along the straight line from the base's value
to the donor's at the same site, all its positions and heads moving together: per firing one
forward and backward of ``steps`` copies. Its cells of one site therefore add up to the effect
of patching that whole site, which first order does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.interventions.claims import abilities_of
from loop_lens.interventions.engine import Abilities, Engine
from loop_lens.interventions.grid import Grid, Pair
from loop_lens.interventions.metrics import MetricLike, per_prompt
from loop_lens.interventions.plan import Batch, Cell
from loop_lens.interventions.results import SweepResult
from loop_lens.measuring.gradients import differentiates
from loop_lens.unrolling.sites import Layout, Site

Estimate = Literal["attribution", "integrated"]


def require_gradient(site: str, method: str, steps: int) -> None:
    """Raise `ValueError` unless a site's patches can be estimated by a method."""
    if method not in get_args(Estimate):
        raise ValueError(f"method {method!r} is unknown: choose 'patch', 'attribution' or 'integrated'")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if site in ("injection", "resid_mid", "hook_resid_mid"):
        why = (
            "its hook point sees the branch that enters the MLP, not the stream beside it: use attn_out, "
            "mlp_out or resid_post"
            if site != "injection"
            else "it is not a tensor of its own: use injected, the state after the injection"
        )
        raise ValueError(f"the site {site!r} has no gradient of its own: {why}")


@differentiates
def estimate(
    model: HookedLoopedTransformer,
    pair: Pair,
    measure: MetricLike,
    grid: Grid,
    site: str,
    method: Estimate,
    steps: int,
    progress: bool,
) -> SweepResult:
    """The base run's metric plus the estimated effect of each cell of a grid."""
    names = [each.flat for each in grid.sites]
    pair = replace(
        pair, clean=pair.clean.clone(), corrupted=pair.corrupted.clone()
    )  # perhaps inference tensors
    with torch.no_grad():
        donor_logits, donor = model.run_with_cache(pair.donor, names_filter=names)
        donor_value, _ = per_prompt(measure(donor_logits), len(pair.donor))
    if method == "attribution":
        base_value, scores = _first_order(model, pair, measure, grid.sites, donor)
    else:
        base_value, scores = _integrated(model, pair, measure, grid.sites, donor, steps, progress)
    effects = torch.stack([_sum(scores, *place[1:], grid.layout) for place in grid.places])
    several = base_value.ndim == 1
    mean = base_value.mean() if several else base_value
    effect = effects.mean(-1) if several else effects.sum(-1)
    clean, corrupted = pair.by_role(float(mean), float(donor_value.float().mean()))
    return SweepResult(
        values=(effect + mean).reshape(grid.shape),
        axes=grid.axes,
        labels=grid.labels,
        clean=clean,
        corrupted=corrupted,
        site=site,
        direction=pair.direction,
        per_prompt=(effects + base_value).reshape(*grid.shape, -1) if several else None,
        method=method,
        n_prompts=len(pair.base),
    )


def _scalar(measure: MetricLike, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The metric, and its sum over prompts to differentiate."""
    value, _ = per_prompt(measure(logits), len(logits))
    if not value.requires_grad:
        raise ValueError("the metric has no gradient (ranks and top tokens have none): give a smooth one")
    return value, value.sum()


def _first_order(
    model: HookedLoopedTransformer,
    pair: Pair,
    measure: MetricLike,
    sites: Sequence[Site],
    donor: Any,
) -> tuple[Tensor, dict[Site, Tensor]]:
    values: list[Tensor] = []

    def metric(logits: Tensor) -> Tensor:
        value, total = _scalar(measure, logits)
        values.append(value.detach().float())
        return total

    # Hooks report under the one name of their hook point, whatever it was asked for by.
    names = {site: model.registry.canonical(site.flat) for site in sites}
    # The backward stops at the first tensor that it is asked for, before that one's hook has fired.
    wanted = [model.registry.canonical("embed.hook_out"), *dict.fromkeys(names.values())]
    with model.hooks(fwd_hooks=[("embed.hook_out", _recorded)]):
        run: Any = cache_activation_and_gradient(model, pair.base, metric, wanted)
    scores: dict[Site, Tensor] = {}
    for site in sites:
        gradient, value = run.gradients[names[site]], run.activations[names[site]]
        if gradient is None:
            gradient = torch.zeros_like(value)  # nothing after it reaches the metric
        scores[site] = _by_place((donor[site.flat] - value) * gradient, site.layout)
    return values[0], scores


def _recorded(value: Tensor, hook: Any) -> Tensor:
    """The embedding, recorded by autograd where its weights are frozen, too."""
    return value if value.requires_grad else value.requires_grad_()


def _integrated(
    model: HookedLoopedTransformer,
    pair: Pair,
    measure: MetricLike,
    sites: Sequence[Site],
    donor: Any,
    steps: int,
    progress: bool,
) -> tuple[Tensor, dict[Site, Tensor]]:
    abilities = abilities_of(model, pair.base)
    engine = Engine(model, pair.base, Abilities(abilities.batched, False, abilities.resumed))
    starts = {site: engine.start_of([site]) for site in sites}
    with torch.no_grad():
        base = engine.run_base(starts.values(), [site.flat for site in sites])
        value, _ = per_prompt(measure(engine.logits), engine.n_prompts)
    scores: dict[Site, Tensor] = {}
    # The midpoints of equal parts of the line.
    points = [(k + 0.5) / steps for k in range(steps)]
    per_run = steps if abilities.batched else 1
    for site in tqdm(sites, desc="integrating", delay=2, disable=not progress, leave=False):
        line = donor[site.flat] - base[site.flat]
        total = torch.zeros_like(line)
        for first in range(0, steps, per_run):
            now = points[first : first + per_run]
            leaf = torch.cat([base[site.flat] + a * line for a in now]).requires_grad_()
            cell = Cell((), (site,), None, None, starts[site], 0)
            batch = Batch((cell,) * len(now), starts[site], 0)
            logits = engine.run(batch, [(site.flat, _replace(leaf))])
            n = engine.n_prompts
            metrics = [_scalar(measure, logits[k * n : (k + 1) * n])[1] for k in range(len(now))]
            (gradient,) = torch.autograd.grad(torch.stack(metrics).sum(), leaf)
            total += gradient.reshape(len(now), *line.shape).sum(0)
        scores[site] = _by_place(line * total / steps, site.layout)
    return value.float(), scores


def _replace(leaf: Tensor) -> Any:
    return lambda value, hook: leaf


def _by_place(product: Tensor, layout: Layout) -> Tensor:
    """Scores [prompt pos head], or [prompt pos 1] where there are no heads."""
    product = product.detach().float()
    if layout == "pattern":
        return product.sum(-1).transpose(1, 2)
    if layout == "heads":
        return product.sum(-1)
    return product.flatten(2).sum(-1, keepdim=True)


def _sum(
    scores: dict[Site, Tensor],
    sites: Sequence[Site],
    position: int | None,
    head: int | None,
    layout: Layout,
) -> Tensor:
    """A cell's score of each prompt [prompt]."""
    total = 0
    for site in sites:
        part = scores[site]
        part = part if position is None else part[:, position : position + 1]
        part = part if head is None else part[..., head : head + 1]
        total = total + part.sum((1, 2))
    assert isinstance(total, Tensor)
    return total
