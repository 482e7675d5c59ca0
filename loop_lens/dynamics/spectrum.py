"""How one iteration stretches and shrinks what is near a state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loop_lens.bridge import HookedLoopedTransformer
from loop_lens.prompts import tokens_of
from loop_lens.schedule import Iteration


def spectral_radius(
    model: HookedLoopedTransformer,
    tokens: Any,
    *,
    iteration: Iteration,
    steps: int = 40,
    seed: int = 0,
    segment: str | None = None,
) -> float:
    """Spectral radius of one iteration's Jacobian, from its state to the next, over the whole sequence.

    Below 1 the iteration contracts near this state, in the long run. The largest eigenvalue's modulus is
    that of the largest Ritz value of an Arnoldi process on vector-Jacobian products (a matrix and its
    transpose have the same eigenvalues), which unlike plain power iteration also finds complex pairs.

    Args:
        model: The model.
        tokens: Text, or tokens [prompt pos]; prompts do not interact, so the radius is the largest of all.
        iteration: The iteration.
        steps: Size of the Krylov space; more is more exact.
        seed: Seed of the first vector.
        segment: The loop; the innermost by default.

    Raises:
        UnknownNameError: If there is no such iteration.
        ValueError: If steps is below 1.

    Source:
        Spectral radius of the loop's Jacobian: arXiv 2605.26733, by power iteration there.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    start = model.name("state_in", iteration=iteration, segment=segment)
    end = model.name("state_out", iteration=iteration, segment=segment)
    ids = tokens_of(model, tokens, "tokens")
    seen: dict[str, Tensor] = {}

    def enter(value: Tensor, hook: Any) -> Tensor:
        seen[start] = value.detach().clone().requires_grad_()
        return seen[start]

    with torch.enable_grad():
        hooks = [(start, enter), (end, lambda value, hook: seen.__setitem__(end, value))]
        model.run_with_hooks(ids, fwd_hooks=hooks, return_type=None)

    def product(vector: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(
            seen[end], seen[start], vector.view_as(seen[end]).to(seen[end].dtype), retain_graph=True
        )
        return gradient.flatten().double()

    size = seen[start].numel()
    steps = min(steps, size)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(size, generator=generator, dtype=torch.float64).to(ids.device)
    basis = [first / first.norm()]
    hessenberg = torch.zeros(steps, steps, dtype=torch.float64)
    for k in range(steps):
        vector = product(basis[k])
        for _ in range(2):  # once more against rounding
            for j, other in enumerate(basis):
                along = float(vector @ other)
                hessenberg[j, k] += along
                vector = vector - along * other
        left = float(vector.norm())
        if k + 1 == steps or left < 1e-10:
            return float(torch.linalg.eigvals(hessenberg[: k + 1, : k + 1]).abs().max())
        hessenberg[k + 1, k] = left
        basis.append(vector / left)
    raise AssertionError("unreachable: the last step returns")
