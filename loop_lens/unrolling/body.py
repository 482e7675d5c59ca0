"""What a model's loop means: `LoopBody`."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from loop_lens.unrolling.runs import Order, Plan
from loop_lens.unrolling.unroller import Unroller


class LoopBody(Unroller):
    """An unroller that also knows what its model's loop means.

    Attributes:
        block_path: Where transformer-lens finds the blocks, from the model's root.
        non_additive_because: Why the stream is not the sum of its components, None where it is.
        fold_unsound_because: Why norms cannot be folded into weights, None where they can.

    Example:
        >>> model.body.injects, model.body.non_additive_because
        (True, "...")
    """

    block_path: str
    non_additive_because: str | None = None
    fold_unsound_because: str | None = None

    @contextmanager
    def reordered(self, order: tuple[int, ...]) -> Generator[None, None, None]:
        """Run the outermost loop's iterations in another order; see `Order`."""
        if self.order is not None:
            raise RuntimeError("the iterations run in another order already: leave that context first")
        names = self.schedule
        executed = names.with_times(**{names.main_loop: len(order)})
        with self.within(Plan(names, Order.of(names, executed, order))):
            yield

    def require_resumable(self, start: int, prelude_out: Tensor | None) -> dict[str, Any]:
        """What the model's forward needs besides the residual to begin at the firing ``start``.

        Raises:
            ValueError: If the residual alone does not determine the rest.
        """
        if self.resume_at(start) != start:
            raise ValueError(
                f"start_at_layer={start} asks to resume from one residual, and {type(self).__name__} does not say that "
                "this model can: run it whole, or override resume_at()"
            )
        return {}

    def resume_at(self, firing: int) -> int | None:
        """The last firing up to ``firing`` from which a forward can be resumed; None, nowhere, unless a body says more.

        Sweeps try what a body says by a small forward, see `loop_lens.interventions.claims`.
        """
        return None

    @property
    def keeps_prefix(self) -> bool:
        """Whether keys and values of earlier positions serve for any later ones; no, unless a body says so."""
        return False

    @property
    def injects(self) -> bool:
        """Whether iterations are given the prelude's output again."""
        return False

    def injection(self, state: Tensor, injected: Tensor, prelude_out: Tensor) -> Tensor:
        """What was injected into ``state``, given what came of it; all [batch pos d_model].

        Raises:
            ValueError: If the model has no injection.
        """
        raise ValueError("this model's loop has no injection: the state is all that enters an iteration")

    def inject(self, state: Tensor, e: Tensor) -> Tensor:
        """The state [batch pos d_model] after the injection of e [batch pos d_model]."""
        return state + e

    @property
    def unregistered(self) -> tuple[nn.Module, ...]:
        """Modules that run in the loop and stand in no module tree."""
        return ()

    @property
    def ends_normed(self) -> bool:
        """Whether what leaves an iteration of the outermost loop has been through the final norm."""
        return False

    @property
    def reads_iterations(self) -> bool:
        """Whether the model was made to be read out after any iteration."""
        return False

    def enter_coda(self, state: Tensor) -> Tensor:
        """What enters the coda, or the final norm, when the loop ends with a state [batch pos d_model].

        Raises:
            ValueError: If that takes more than the state.
        """
        return state

    @property
    def depends_on_times(self) -> bool:
        """Whether what an iteration computes depends on the number of iterations."""
        return False

    @property
    def config_fields(self) -> dict[str, Any]:
        """What a saved config.json holds beside the model's own config, so that the loop opens again."""
        return {}

    def to_checkpoint(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All weights, given under the model's own names, under those of its checkpoint."""
        return dict(own)

    def from_checkpoint(
        self, weights: Mapping[str, Tensor], own: Mapping[str, Tensor], *, strict: bool
    ) -> dict[str, Tensor]:
        """Weights under the checkpoint's names, or the model's own, under the model's own.

        Args:
            weights: The weights to rename.
            own: The model's present weights under its own names, for their shapes.
            strict: Whether the weights must be all of the checkpoint's.

        Raises:
            WeightsError: If ``strict`` and weights are missing or unknown, or if one is misshapen.
        """
        return dict(weights)

    @property
    def initial_state(self) -> Any:
        """What the state before the first iteration is made from, None where there is no choice."""
        return None

    def set_initial_state(self, value: Any) -> None:
        """Choose the state before the first iteration."""
        warnings.warn("initial_state is ignored: this model's loop starts from its own input", stacklevel=3)
