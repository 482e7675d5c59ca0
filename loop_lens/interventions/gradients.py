"""Patching estimated from gradients: attribution patching and integrated gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.interventions.engine import Abilities, Engine
from loop_lens.interventions.metrics import MetricLike, bind, per_prompt
from loop_lens.interventions.plan import Batch, Cell
from loop_lens.interventions.sweep import Direction, Grid, Prompts, SweepResult
from loop_lens.unrolling.sites import Layout, Site

Method = Literal["attribution", "integrated"]


def attribution_sweep(
    model: HookedLoopedTransformer,
    clean: Any,
    corrupted: Any,
    metric: MetricLike,
    *,
    site: str,
    over: str | Sequence[str] = ("iteration", "layer", "position"),
    method: Method = "attribution",
    steps: int = 16,
    direction: Direction = "denoising",
    iterations: Any = None,
    layers: Any = None,
    positions: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    segment: str | None = None,
    progress: bool = True,
) -> SweepResult:
    """Estimate a patching sweep from gradients, all cells at once.

    ``"attribution"`` is first order: (donor - base) times the gradient at the base run, one forward and
    one backward. ``"integrated"`` averages the gradient along the straight line from the base's value
    to the donor's at the same site, all its positions and heads moving together: per firing one
    forward and backward of ``steps`` copies. Its cells of one site therefore add up to the effect
    of patching that whole site, which first order does not.

    Args:
        model: The model, with gradients through every iteration.
        clean: As in `loop_lens.patch_sweep`.
        corrupted: As there.
        metric: As there, but differentiable.
        site: As there, but sites within blocks or states.
        over: As there.
        method: ``"attribution"`` or ``"integrated"``.
        steps: Points on the line, for ``"integrated"``.
        direction: As there.
        iterations: As there.
        layers: As there.
        positions: As there.
        heads: As there.
        segment: As there.
        progress: Whether to show a progress bar, for work beyond two seconds.

    Returns:
        The base run's metric plus the estimated effect of each cell.

    Raises:
        ValueError: As there; or the metric has no gradient; or the site is one whose gradient is not
            that of the stream (``resid_mid``, ``injection``).

    Source:
        Attribution patching: Nanda (2023), Syed et al., arXiv 2310.10348. Integrated gradients:
        Sundararajan et al., arXiv 1703.01365, applied to a site's value.
    """
    if method not in ("attribution", "integrated"):
        raise ValueError(f"method {method!r} is unknown: choose 'attribution' or 'integrated'")
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
    measure = bind(metric, model)
    prompts = Prompts.of(model, clean, corrupted, direction)
    grid = Grid.of(
        model,
        site,
        over,
        prompts.words,
        iterations=iterations,
        layers=layers,
        positions=positions,
        heads=heads,
        segment=segment,
    )
    names = [spot.flat for spot in grid.spots]
    with torch.no_grad():
        donor_logits, donor = model.run_with_cache(prompts.donor, names_filter=names)
        donor_value, _ = per_prompt(measure(donor_logits), len(prompts.donor))
    with torch.enable_grad():
        base_value, scores = (_first_order if method == "attribution" else _integrated)(
            model, prompts, measure, grid.spots, donor, steps, progress
        )
    effects = torch.stack([_sum(scores, *place[1:], grid.layout) for place in grid.places])
    several = base_value.ndim == 1
    each = effects + base_value if several else None
    mean = base_value.mean() if several else base_value
    effect = effects.mean(-1) if several else effects.sum(-1)
    clean_value, corrupted_value = prompts.by_role(float(mean), float(donor_value.float().mean()))
    return SweepResult(
        values=(effect + mean).reshape(grid.shape),
        axes=grid.axes,
        labels=grid.labels,
        clean=clean_value,
        corrupted=corrupted_value,
        site=site,
        direction=direction,
        per_prompt=None if each is None else each.reshape(*grid.shape, -1),
        method=method,
    )


def _scalar(measure: MetricLike, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The metric, and its sum over prompts to differentiate."""
    value, _ = per_prompt(measure(logits), len(logits))
    if not value.requires_grad:
        raise ValueError("the metric has no gradient (ranks and top tokens have none): give a smooth one")
    return value, value.sum()


def _first_order(
    model: HookedLoopedTransformer,
    prompts: Prompts,
    measure: MetricLike,
    spots: Sequence[Site],
    donor: Any,
    steps: int,
    progress: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    found: list[Tensor] = []

    def metric(logits: Tensor) -> Tensor:
        value, total = _scalar(measure, logits)
        found.append(value.detach().float())
        return total

    # Hooks report under the one name of their hook point, whatever it was asked for by.
    names = {spot: model.registry.canonical(spot.flat) for spot in spots}
    # The backward stops at the first tensor that it is asked for, before that one's hook has fired.
    wanted = [model.registry.canonical("embed.hook_out"), *dict.fromkeys(names.values())]
    run: Any = cache_activation_and_gradient(model, prompts.base, metric, wanted)
    scores: dict[str, Tensor] = {}
    for spot in spots:
        gradient, value = run.gradients[names[spot]], run.activations[names[spot]]
        if gradient is None:
            gradient = torch.zeros_like(value)  # nothing after it reaches the metric
        scores[spot.flat] = _by_place((donor[spot.flat] - value) * gradient, spot.layout)
    return found[0], scores


def _integrated(
    model: HookedLoopedTransformer,
    prompts: Prompts,
    measure: MetricLike,
    spots: Sequence[Site],
    donor: Any,
    steps: int,
    progress: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    abilities = Abilities.of(model)
    engine = Engine(model, prompts.base, Abilities(abilities.batched, False, abilities.resumed))
    starts = {spot: engine.start_of([spot]) for spot in spots}
    with torch.no_grad():
        base = engine.run_base(starts.values(), [spot.flat for spot in spots])
        value, _ = per_prompt(measure(engine.logits), engine.n_prompts)
    scores: dict[str, Tensor] = {}
    # The midpoints of equal parts of the line.
    points = [(k + 0.5) / steps for k in range(steps)]
    per_run = steps if abilities.batched else 1
    for spot in tqdm(spots, desc="integrating", delay=2, disable=not progress, leave=False):
        line = donor[spot.flat] - base[spot.flat]
        total = torch.zeros_like(line)
        for first in range(0, steps, per_run):
            now = points[first : first + per_run]
            leaf = torch.cat([base[spot.flat] + a * line for a in now]).requires_grad_()
            cell = Cell((), (spot,), None, None, starts[spot], 0)
            batch = Batch((cell,) * len(now), starts[spot], 0)
            logits = engine.run(batch, [(spot.flat, _replace(leaf))])
            n = engine.n_prompts
            metrics = [_scalar(measure, logits[k * n : (k + 1) * n])[1] for k in range(len(now))]
            (gradient,) = torch.autograd.grad(torch.stack(metrics).sum(), leaf)
            total += gradient.reshape(len(now), *line.shape).sum(0)
        scores[spot.flat] = _by_place(line * total / steps, spot.layout)
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
    scores: dict[str, Tensor],
    spots: Sequence[Site],
    position: int | None,
    head: int | None,
    layout: Layout,
) -> Tensor:
    """A cell's score of each prompt [prompt]."""
    total = 0
    for spot in spots:
        part = scores[spot.flat]
        part = part if position is None else part[:, position : position + 1]
        part = part if head is None else part[..., head : head + 1]
        total = total + part.sum((1, 2))
    assert isinstance(total, Tensor)
    return total
