"""Run a window of an ordinary decoder's layers several times.

The first iteration is the model's own forward: it calls the window's blocks in turn, and each slot
notes how its block was called. The slot of the last block then runs the further iterations with the
same calls, so masks, positions and caches are what the model itself made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.factories.architecture_adapter_factory import (
    SUPPORTED_ARCHITECTURES,
    ArchitectureAdapterFactory,
)
from transformer_lens.model_bridge.generalized_components import AttentionBridge, BlockBridge
from transformer_lens.model_bridge.sources._hf_format import determine_architecture_from_hf_config
from transformer_lens.utilities.attn_implementation import force_eager_attention
from transformers import AutoModelForCausalLM

from loop_lens.models.checkpoint import Checkpoint
from loop_lens.models.files import reading
from loop_lens.models.kind import Kind, Unrolled, bridge_config
from loop_lens.unrolling.body import LoopBody
from loop_lens.unrolling.calls import (
    Bare,
    common_parent,
    hidden_states,
    map_output,
    output_stream,
    with_hidden_states,
)
from loop_lens.unrolling.numbers import whole
from loop_lens.unrolling.runs import Run
from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.tree import Blocks, Loop, Segments
from loop_lens.unrolling.unroller import FiringCountError

LOOP_RULES = ("naive", "residual_scaled", "euler", "ema", "input_anchor")
"""What an iteration makes of the state s, the window's output g(s) and the loop's input x0:
naive: g(s). residual_scaled: x0 + (g^R(x0) - x0)/R, once at the end. euler: s + (g(s) - s)/R.
ema: (1 - alpha) s + alpha g(s). input_anchor: alpha g(s) + (1 - alpha) x0 (arXiv 2605.23872)."""


@dataclass(frozen=True)
class Window:
    """Which layers loop, and how.

    Attributes:
        first: First layer of the window.
        last: Last layer of the window.
        times: Number of iterations.
        rule: One of `LOOP_RULES`.
        alpha: The rule's weight, for ``ema`` and ``input_anchor``.
    """

    first: int
    last: int
    times: int
    rule: str = "naive"
    alpha: float | None = None

    @classmethod
    def of(cls, layers: Sequence[int], times: int, rule: str, alpha: float | None, n_layers: int) -> Window:
        """Check a request against a model.

        Raises:
            ValueError: If the layers are not a run of the model's layers, or the rule is unknown.
        """
        layers = [whole(layer, "a layer") for layer in layers]
        chosen = [layer + n_layers if layer < 0 else layer for layer in layers]
        if not chosen:
            raise ValueError("layers is empty: give the layers to loop, e.g. range(10, 20)")
        outside = [layer for layer in chosen if not 0 <= layer < n_layers]
        if outside:
            raise ValueError(f"layer {outside[0]} does not exist: the model has layers 0-{n_layers - 1}")
        if chosen != list(range(chosen[0], chosen[-1] + 1)):
            raise ValueError(f"layers {layers} are not one run of neighbouring layers in order")
        times = whole(times, "times", 1)
        if rule not in LOOP_RULES:
            raise ValueError(f"rule {rule!r} is unknown: choose one of {', '.join(LOOP_RULES)}")
        weighs = rule in ("ema", "input_anchor")
        if weighs and (alpha is None or not 0 < alpha <= 1):
            raise ValueError(f"the rule {rule!r} needs alpha between 0 and 1, got {alpha}")
        if not weighs and alpha is not None:
            raise ValueError(f"the rule {rule!r} has no alpha")
        return cls(chosen[0], chosen[-1], times, rule, alpha)


class WindowBody(LoopBody):
    """Unrolls an ordinary decoder with a window of layers that loops."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], block_path: str, window: Window
    ) -> None:
        self.span, self.block_path = window, block_path
        size = window.last - window.first + 1
        schedule = Schedule(
            Segments(
                Blocks("prelude", window.first),
                Loop("loop", window.times, Blocks("core", size)),
                Blocks("coda", len(blocks) - window.last - 1),
                sites=("hook_prelude_out", "hook_initial_state"),
            )
        )
        super().__init__(common_parent(model, blocks), blocks, schedule)
        if window.rule != "naive":
            self.non_additive_because = f"the rule {window.rule!r} mixes states of different iterations"

    @property
    def config_fields(self) -> dict[str, Any]:
        """The window, so that the same layers loop again."""
        w, times = self.span, self.schedule.loops["loop"].times
        return {"loop_lens": {"layers": [w.first, w.last], "times": times, "rule": w.rule, "alpha": w.alpha}}

    @property
    def depends_on_times(self) -> bool:
        """Whether the rule divides by the number of iterations."""
        return self.span.rule in ("euler", "residual_scaled")

    def require_resumable(self, start: int, prelude_out: Tensor | None) -> dict[str, Any]:
        """The damped rules need states that a residual inside the loop does not contain."""
        if self.resume_at(start) != start:
            raise ValueError(
                f"start_at_layer={start} is inside the loop, and the rule {self.span.rule!r} needs the state "
                "from which the loop began: start at or before its first firing"
            )
        return {}

    def resume_at(self, firing: int) -> int | None:
        """Damped rules need the state that entered the iteration, or the loop."""
        rule, place = self.span.rule, self.schedule[firing]
        if rule == "naive" or place.segment != "loop" or firing <= self.span.first:
            return firing
        return self.span.first if rule in ("residual_scaled", "input_anchor") else firing - place.layer

    @property
    def keeps_prefix(self) -> bool:
        """The decoders that open are causal, and every firing has keys and values of its own."""
        return True

    def enter_coda(self, state: Tensor) -> Tensor:
        """The state, except under the rule that scales the whole loop's change once at its end."""
        if self.span.rule == "residual_scaled":
            raise ValueError(
                "under the rule 'residual_scaled' a state before the last iteration does not determine what "
                "would enter the coda: run the model with at_recurrences instead"
            )
        return state

    def call(self, slot: int, bare: Bare, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the next firing; from the window's last block, all further iterations."""
        run = self.run
        if run is None or not self.span.first <= slot <= self.span.last:
            return super().call(slot, bare, args, kwargs)
        if run.calls[slot]:
            raise FiringCountError(
                f"the model calls layer {slot} more than once in a forward: it loops already, so open it with "
                "loop_lens.wrap() and a body of its own"
            )
        run.calls[slot] += 1
        if slot == self.span.first:
            x = hidden_states(args, kwargs)
            x = self.site("hook_initial_state", self.site("hook_prelude_out", x))
            run.notes["anchor"] = self._kept(x)
            run.notes["calls"] = []
            args, kwargs = with_hidden_states(self._enter(run, 0, x), args, kwargs)
        run.notes["calls"].append((bare, args, kwargs))
        out = self.fire(run, run.plan.executed[slot], bare, args, kwargs)
        if slot < self.span.last:
            return out
        state = self._leave(run, 0, output_stream(out))
        for t in range(1, run.plan.executed.loops["loop"].times):
            state = self._iterate(run, t, state)
        return map_output(lambda _: state, out)

    def _iterate(self, run: Run, t: int, state: Tensor) -> Tensor:
        stream = self._enter(run, t, state)
        calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = run.notes["calls"]
        for layer, (bare, args, kwargs) in enumerate(calls):
            args, kwargs = with_hidden_states(stream, args, kwargs)
            firing = run.plan.executed[self.span.first + t * len(calls) + layer]
            stream = output_stream(self.fire(run, firing, bare, args, kwargs))
        return self._leave(run, t, stream)

    def _enter(self, run: Run, t: int, state: Tensor) -> Tensor:
        state = self.site(f"loop.{t}.hook_state_in", state)
        first = self.span.first + t * (self.span.last - self.span.first + 1)
        resumed = run.residual is not None and run.start == first
        run.notes["state"] = self._kept(run.residual if resumed else state)  # type: ignore[arg-type]
        if resumed and t == 0:
            run.notes["anchor"] = run.notes["state"]
        return state

    def _kept(self, x: Tensor) -> Tensor:
        """A state that a rule needs later: a copy, since hooks may write in place."""
        return x if self.span.rule == "naive" else x.clone()

    def _leave(self, run: Run, t: int, out: Tensor) -> Tensor:
        rule, alpha = self.span.rule, self.span.alpha or 0.0
        times = run.plan.executed.loops["loop"].times
        state, anchor = run.notes["state"], run.notes["anchor"]
        if rule == "residual_scaled" and t == times - 1:
            out = anchor + (out - anchor) / times
        elif rule == "euler":
            out = state + (out - state) / times
        elif rule == "ema":
            out = (1 - alpha) * state + alpha * out
        elif rule == "input_anchor":
            out = alpha * out + (1 - alpha) * anchor
        return self.site(f"loop.{t}.hook_state_out", out)


class WindowKind(Kind):
    """Saved models that `loop_lens.loopify` made: their config says which layers loop."""

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether config.json names a window."""
        return "loop_lens" in config

    def matches_model(self, model: nn.Module) -> bool:
        """Whether the model's config names a window."""
        return hasattr(getattr(model, "config", None), "loop_lens")

    def load(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype | None, attn_implementation: str | None
    ) -> nn.Module:
        """The ordinary decoder."""
        with reading(checkpoint.config_path):
            _saved(checkpoint.config["loop_lens"])
        return checkpoint.open_with(
            AutoModelForCausalLM, dtype=dtype, attn_implementation=attn_implementation
        )

    def unroll(self, model: Any, *, name: str, tokenizer: Any) -> Unrolled:
        """The decoder with the window that its config names."""
        layers, times, rule, alpha = _saved(model.config.loop_lens)
        return unroll_window(model, layers, times, rule=rule, alpha=alpha, name=name)


WINDOW = WindowKind()
_OWN = "wrap() opens any model with a body= that says what loops and an adapter= that says what is in a block"


def _saved(about: Mapping[str, Any]) -> tuple[range, int, str, float | None]:
    """Layers, times, rule and its weight, as a saved config says them."""
    first, last = about["layers"]
    return range(first, last + 1), about["times"], about["rule"], about["alpha"]


def unroll_window(
    model: Any, layers: Sequence[int], times: int, *, rule: str, alpha: float | None, name: str
) -> Unrolled:
    """An ordinary decoder with a window that loops, and transformer-lens' own adapter.

    Raises:
        ValueError: If the model has no uniform list of blocks, or the layers are not in it.
    """
    architecture = type(model).__name__
    if architecture not in SUPPORTED_ARCHITECTURES:
        with suppress(ValueError):
            architecture = determine_architecture_from_hf_config(model.config)
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"transformer-lens has no adapter for {architecture}, and loopify reads decoders by those: {_OWN}"
        )
    cfg = bridge_config(model, name, architecture)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(cfg)
    components = adapter.component_mapping or {}
    template = components.get("blocks")
    lists = [part for part, bridge in components.items() if getattr(bridge, "is_list_item", False)]
    if not isinstance(template, BlockBridge) or lists != ["blocks"] or template.name is None:
        raise ValueError(
            f"{architecture} has no uniform list of decoder blocks (transformer-lens sees {lists or 'none'}): "
            f"loopify cannot tell which layers to repeat. {_OWN}"
        )
    blocks = list(adapter.get_remote_component(model, template.name))  # type: ignore[arg-type]
    window = Window.of(layers, times, rule, alpha, len(blocks))
    adapter.prepare_model(model)
    body = WindowBody(model, blocks, template.name, window)
    attention = template.submodules.get("attn")
    if attention is not None and type(attention).forward is AttentionBridge.forward:
        # This bridge shows the pattern that the module returns, and only eager attention returns one.
        force_eager_attention(model)
    else:
        # With attentions asked for, transformers would leave SDPA for eager in every block.
        adapter.supports_hf_output_attentions = False
    return Unrolled(model, body, adapter)
