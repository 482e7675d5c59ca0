"""Fitting of the Jacobian lens: mean derivatives of the end by each block's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.lenses.coda import coda_start
from loop_lens.lenses.jacobian import LoopJacobianLens
from loop_lens.lenses.tuned import fingerprint
from loop_lens.measuring.gradients import differentiates
from loop_lens.prompts.reader import device_of, read_prompts
from loop_lens.unrolling.numbers import whole


@differentiates
def fit_jacobian_lens(
    model: HookedLoopedTransformer,
    prompts: Any,
    *,
    factorised: bool = False,
    skip_first: int = 0,
    dim_batch: int = 16,
    progress: bool = True,
) -> LoopJacobianLens:
    """Fit a Jacobian lens.

    Unfactorised it is transformer-lens' own, on the unrolled model: one matrix per firing. Factorised,
    the derivative is taken within iterations only and multiplied together: a matrix for each layer of
    the core to the end of its iteration, one for a whole iteration (means over iterations, too), one
    for the coda. That is exact for linear loops, needs no more matrices at more iterations, and
    serves numbers of iterations that it was not fitted at.

    Args:
        model: The model.
        prompts: As for `loop_lens.prompts.read_prompts`; lengths may differ.
        factorised: Whether to factorise at loop ends.
        skip_first: Leading positions left out of the mean; the last position is always left out.
        dim_batch: Output dimensions per backward pass.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If no prompt is long enough, or the model has nested loops and ``factorised``.

    Source:
        As for `LoopJacobianLens`.

    Example:
        >>> from loop_lens.lenses import fit_jacobian_lens
        >>> lens = fit_jacobian_lens(model, prompts, factorised=True, dim_batch=64, progress=False)
        >>> with model.at_recurrences(12):
        ...     loop_lens.lens(model, prompt, kind=lens, positions=[-1]).kl.shape
        torch.Size([26, 1, 1])
    """
    skip_first, dim_batch = whole(skip_first, "skip_first", 0), whole(dim_batch, "dim_batch", 1)
    wanted = _factors(model) if factorised else _whole(model)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    n_prompts = 0
    for tokens in tqdm(read_prompts(model, prompts), desc="Jacobian lens", delay=2, disable=not progress):
        if len(tokens) < skip_first + 2:
            continue
        n_prompts += 1
        tokens = tokens.to(device_of(model))
        for target, sources in wanted:
            for key, matrix in _derivatives(model, tokens, sources, target, skip_first, dim_batch).items():
                sums[key] = sums.get(key, torch.zeros_like(matrix)) + matrix
                counts[key] = counts.get(key, 0) + 1
    if not sums:
        raise ValueError(f"every prompt is shorter than {skip_first + 2} tokens: nothing to fit on")
    matrices = {key: total / counts[key] for key, total in sums.items()}
    normed = False
    if factorised:
        for key in ("coda", "iteration"):
            matrices.setdefault(key, torch.eye(model.cfg.d_model))
        normed = coda_start(model) is None and model.body.ends_normed
    return LoopJacobianLens(matrices, factorised, n_prompts, fingerprint(model), normed)


def _whole(model: HookedLoopedTransformer) -> list[tuple[str, dict[str, str]]]:
    """The end, and the blocks' outputs by firing."""
    *before, last = (f.prefix for f in model.schedule)
    return [(f"{last}.hook_resid_post", {prefix: f"{prefix}.hook_resid_post" for prefix in before})]


def _factors(model: HookedLoopedTransformer) -> list[tuple[str, dict[str, str]]]:
    """Each iteration's end with its blocks and its beginning, and the model's end with what is outside."""
    schedule, loop = model.schedule, model.schedule.main_loop
    if len(schedule.loops) > 1:
        raise ValueError("factorised=True is for one loop, this model has loops in loops: leave it out")
    wanted: list[tuple[str, dict[str, str]]] = []
    for t in range(model.recurrences):
        blocks = range(schedule.segments[loop])
        sources = {f"core.{layer}": f"{loop}.{t}.blocks.{layer}.hook_resid_post" for layer in blocks}
        if t:
            sources["iteration"] = f"{loop}.{t}.hook_state_in"
        wanted.append((f"{loop}.{t}.hook_state_out", sources))
    end = wanted[-1][0]
    outside = {f.prefix: f"{f.prefix}.hook_resid_post" for f in list(schedule)[:-1] if f.segment != loop}
    if coda_start(model) is not None:
        outside["coda"], end = end, f"{schedule[-1].prefix}.hook_resid_post"
    return [*wanted, (end, outside)] if outside else wanted


def _derivatives(
    model: HookedLoopedTransformer,
    tokens: Int[Tensor, " pos"],
    sources: Mapping[str, str],
    target: str,
    skip_first: int,
    dim_batch: int,
) -> dict[str, Float[Tensor, "d_model d_model"]]:
    """Mean derivatives of a target with respect to each source.

    Effects are summed over the target's positions and averaged over the source's, as in the lens.
    """
    seen: dict[str, Tensor] = {}

    def see(name: str) -> Any:
        def hook(value: Tensor, hook: Any) -> Tensor:
            seen[name] = value if value.requires_grad else value.requires_grad_()
            return seen[name]

        return hook

    d_model, n = model.cfg.d_model, len(tokens)
    valid = torch.arange(skip_first, n - 1)
    names = [*dict.fromkeys([*sources.values(), target])]
    means = {key: torch.zeros(d_model, d_model) for key in sources}
    hooks = [(name, see(name)) for name in names]
    model.run_with_hooks(tokens.expand(dim_batch, -1), fwd_hooks=hooks, return_type=None)
    for start in range(0, d_model, dim_batch):
        size = min(dim_batch, d_model - start)
        cotangent = torch.zeros_like(seen[target])
        rows = torch.arange(size)
        cotangent[rows[:, None], valid[None], start + rows[:, None]] = 1.0
        gradients = torch.autograd.grad(
            seen[target],
            [seen[name] for name in sources.values()],
            cotangent,
            retain_graph=start + size < d_model,
            allow_unused=True,
        )
        for key, gradient in zip(sources, gradients, strict=True):
            if gradient is not None:
                means[key][start : start + size] = gradient[:size, valid].float().mean(1).cpu()
    return means
