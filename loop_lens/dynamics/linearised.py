"""One iteration of a loop as a differentiable map from the state that enters to the one that leaves."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.bridge.names import find_sites
from loop_lens.dynamics.states import starting_from
from loop_lens.measuring.collecting import diverged, first_diverged
from loop_lens.measuring.moments import DivergedError
from loop_lens.unrolling.tree import Iteration


class IterationMap:
    """The derivative of one iteration at a state, by products with vectors.

    The model runs up to the end of the iteration once, and only the iteration is recorded for autograd.
    What else enters it (the prelude's output, the other stack's state in nested loops) is held.

    Args:
        tokens: A prompt per row; each row is a map of its own.
        state: Where to take the derivative; the run's own state by default.
        prompts: Whose of the model's initial states, where there is one per prompt, each row starts from; by
            default the first row from the first.
        position: The position that each row is the map of, all others held; all positions by default.
    """

    shape: tuple[int, int]
    """Number of rows, and of the numbers of a row that enter, and that leave."""

    def __init__(
        self,
        model: HookedLoopedTransformer,
        tokens: Int[Tensor, "row pos"],
        *,
        iteration: Iteration,
        segment: str,
        state: Float[Tensor, "row pos d_model"] | None = None,
        prompts: Int[Tensor, " row"] | None = None,
        position: Int[Tensor, " row"] | None = None,
    ) -> None:
        start = model.name("state_in", iteration=iteration, segment=segment)
        end = model.name("state_out", iteration=iteration, segment=segment)
        shape = (*tokens.shape, model.cfg.d_model)
        if state is not None and state.shape != shape:
            raise ValueError(
                f"state has shape {tuple(state.shape)}, but here it is [row pos d_model] {shape}"
            )
        device = next(model.original_model.parameters()).device
        tokens, each = tokens.to(device), torch.arange(len(tokens), device=device)
        position = None if position is None else position.to(device)
        seen: dict[str, Tensor] = {}

        def enter(value: Tensor, hook: Any) -> Tensor:
            base = value.detach() if state is None else state.to(value)
            torch.set_grad_enabled(True)
            if position is None:
                seen["in"] = base.clone().requires_grad_()
                return seen["in"]
            seen["in"] = base[each, position].clone().requires_grad_()
            return base.index_put((each, position), seen["in"])

        def leave(value: Tensor, hook: Any) -> None:
            seen["out"] = value if position is None else value[each, position]
            torch.set_grad_enabled(False)

        initial = model.initial_state
        if isinstance(initial, Tensor) and len(initial) > 1:
            initial = initial[torch.arange(len(tokens)) if prompts is None else prompts]
        last = next(
            b.last for b in model.schedule.boundaries if b.segment == segment and b.iteration == iteration
        )
        # Flash attention has no second derivative, and products with the Jacobian itself take one.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), starting_from(model, initial):
            model.run_with_hooks(
                tokens,
                fwd_hooks=[(start, enter), (end, leave)],
                return_type=None,
                stop_at_layer=last + 1 if last + 1 < len(model.schedule) else None,
            )
        self._in, self._out = seen["in"], seen["out"]
        if not bool(self._in.isfinite().all() and self._out.isfinite().all()):
            with starting_from(model, initial):
                _raise_diverged(model, tokens, iteration, segment, given=state is not None)
        self.shape = len(tokens), self._in[0].numel()
        self._transposed: tuple[Tensor, Tensor] | None = None

    def vjp(self, vector: Float[Tensor, "row size"]) -> Float[Tensor, "row size"]:
        """The transposed Jacobian times a vector, in float64."""
        (product,) = torch.autograd.grad(self._out, self._in, self._like(vector), retain_graph=True)
        return product.reshape(self.shape).cpu().double()

    def jvp(self, vector: Float[Tensor, "row size"]) -> Float[Tensor, "row size"]:
        """The Jacobian times a vector, in float64."""
        # It is the derivative of the transposed product, which is linear in its vector: unlike forward-mode
        # differentiation that needs no second run of the model.
        if self._transposed is None:
            with torch.enable_grad():
                dummy = torch.zeros_like(self._out, requires_grad=True)
                (product,) = torch.autograd.grad(self._out, self._in, dummy, create_graph=True)
            self._transposed = dummy, product
        dummy, product = self._transposed
        (moved,) = torch.autograd.grad(product, dummy, self._like(vector), retain_graph=True)
        return moved.reshape(self.shape).cpu().double()

    def _like(self, vector: Tensor) -> Tensor:
        return vector.reshape(self._out.shape).to(self._out)


def _raise_diverged(
    model: HookedLoopedTransformer, tokens: Tensor, iteration: Iteration, segment: str, *, given: bool
) -> None:
    """Raise `DivergedError` for a state that is NaN or infinite; names the first iteration that is."""
    if given:
        raise DivergedError(
            f"iteration {iteration} at the given state is NaN or infinite: give a finite state"
        )
    sites = [site for hook in ("state_in", "state_out") for site in find_sites(model, hook, segment=segment)]
    first = first_diverged(model, tokens, torch.ones_like(tokens, dtype=torch.bool), sites)
    raise DivergedError(diverged(f"in iteration {first.iteration if first else iteration}"))
