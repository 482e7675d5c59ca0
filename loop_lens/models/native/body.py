"""The native model's loop, unrolled."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from loop_lens.models.native.modeling import LoopedTransformer
from loop_lens.models.native.state import require_initial_state
from loop_lens.models.published.families import family_of
from loop_lens.unrolling.body import LoopBody
from loop_lens.unrolling.schedule import Schedule


class NativeBody(LoopBody):
    """Unrolls a `LoopedTransformer`."""

    block_path = "model.layers"

    def __init__(self, model: LoopedTransformer) -> None:
        trunk, config = model.model, model.config
        self.model, self.config = trunk, config
        blocks = [*trunk.prelude, *trunk.core, *trunk.coda]
        super().__init__(trunk, blocks, config.schedule(), cache_slots=False)
        self.non_additive_because = config.non_additive_because
        if config.block_norm != "pre":
            self.fold_unsound_because = "norms come after the weights that they would be folded into"
        elif config.loop_norm or config.post_loop_norm:
            self.fold_unsound_because = (
                "the final norm also runs inside the loop, where it cannot be folded into the unembedding"
            )

    def install(self) -> None:
        """Put slots over blocks and trunk, and tell the trunk what its forwards run."""
        super().install()
        self.model.site, self.model.times = self.site, self.times

    def times(self) -> int:
        """How many iterations the forward under way runs."""
        plan = self.plan if self.run is None else self.run.plan
        return plan.executed.loops["loop"].times

    @property
    def base(self) -> Schedule:
        """What the config says."""
        if self._base.loops["loop"].times != self.config.recurrences:
            self._base = self._base.with_times(loop=self.config.recurrences)
        return self._base

    @base.setter
    def base(self, schedule: Schedule) -> None:
        self.config.recurrences = schedule.loops["loop"].times

    def require_resumable(self, start: int, prelude_out: Tensor | None) -> dict[str, Any]:
        """An injection still to come needs the prelude's output."""
        firing = self.schedule[start]
        if prelude_out is not None:
            return {"prelude_output": prelude_out}
        last = self.schedule.loops["loop"].times - 1
        inside = firing.segment == "loop" and firing.iteration != last
        if self.config.injection != "none" and inside:
            raise ValueError(
                f"start_at_layer={start} is inside the loop, and later iterations inject the prelude's output "
                "again, which a residual stream does not contain: pass prelude_out=cache['hook_prelude_out']"
            )
        return {}

    def resume_at(self, firing: int) -> int | None:
        """Anywhere, with the prelude's output where it is injected again."""
        return firing

    @property
    def keeps_prefix(self) -> bool:
        """The model is causal, and every firing has keys and values of its own."""
        return True

    @property
    def config_fields(self) -> dict[str, Any]:
        """The number of iterations in force; a tensor as initial state is not saved."""
        if isinstance(self.model.initial_state, Tensor):
            warnings.warn(
                "initial_state is a tensor, which is not saved: give it to boot() again", stacklevel=4
            )
        return {"recurrences": self.schedule.loops["loop"].times}

    @property
    def injects(self) -> bool:
        """Whether iterations are given the prelude's output again."""
        return self.config.injection != "none"

    def injection(self, state: Tensor, injected: Tensor, prelude_out: Tensor) -> Tensor:
        """The prelude's output, at every iteration."""
        if not self.injects:
            return super().injection(state, injected, prelude_out)
        return prelude_out

    def inject(self, state: Tensor, e: Tensor) -> Tensor:
        """The state after the model's own injection."""
        return self.model.injection(state, e)

    @property
    def unregistered(self) -> tuple[nn.Module, ...]:
        """The norm inside the loop, a tied clone of the final one."""
        return (self.model.inner_norm,)

    @property
    def ends_normed(self) -> bool:
        """Whether what leaves an iteration has been through the final norm."""
        return self.config.loop_norm

    @property
    def reads_iterations(self) -> bool:
        """Any number of iterations is one that the model may be asked for."""
        return True

    def enter_coda(self, state: Tensor) -> Tensor:
        """The state through the norm and the projection after the loop, where there are any."""
        if self.config.post_loop_norm:
            state = self.model.inner_norm(state)
        return self.model.state_projection(state) if self.config.state_projection else state

    def to_checkpoint(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights as the published family stores them, where they come from one."""
        family = family_of(self.config)
        return dict(own) if family is None else family.to_published(self.config, own)

    def from_checkpoint(
        self, weights: Mapping[str, Tensor], own: Mapping[str, Tensor], *, strict: bool
    ) -> dict[str, Tensor]:
        """The weights as the native model stores them."""
        family = family_of(self.config)
        if family is None or set(weights) <= set(own):
            return dict(weights)
        return family.to_native(self.config, weights, own, strict=strict, source="the state dict")

    @property
    def initial_state(self) -> Any:
        """A seed, ``"zeros"`` or a state; None where the loop starts from the prelude's output."""
        return None if self.config.initial_state == "prelude" else self.model.initial_state

    def set_initial_state(self, value: Any) -> None:
        """Choose the state before the first iteration."""
        value = require_initial_state(value, self.config.hidden_size)
        if self.config.initial_state == "prelude":
            super().set_initial_state(value)
        else:
            self.model.initial_state = value
