"""The components that an attribution splits a forward into, each cut out as a variable of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.lenses.frozen_norms import original
from loop_lens.unrolling.sites import Firing
from loop_lens.unrolling.tree import Iteration

Hooks = list[tuple[str, Callable[..., Any]]]


class Component(NamedTuple):
    """One thing that was written into the stream.

    Attributes:
        kind: ``"embedding"``, ``"initial state"``, ``"injection"``, ``"head"``, ``"attn"``, ``"attn bias"``,
            ``"mlp"`` or ``"bias"``.
        segment: Its segment, None outside.
        iteration: Its iteration.
        layer: Its layer.
        head: Its head.

    Example:
        >>> from loop_lens.lenses import Component
        >>> str(Component("head", "loop", iteration=3, layer=1, head=0))
        'loop.3.l1.h0'
    """

    kind: str
    segment: str | None = None
    iteration: Iteration = None
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        parts = [] if self.segment is None or self.iteration is not None else [self.segment]
        if self.iteration is not None:
            parts.append(f"{self.segment}.{dotted(self.iteration)}")
        if self.layer is not None:
            parts.append(f"l{self.layer}")
        return ".".join([*parts, f"h{self.head}" if self.kind == "head" else self.kind])


def dotted(iteration: Iteration) -> str:
    """An iteration as names write it: ``1.2`` for a nested one."""
    return ".".join(map(str, iteration)) if isinstance(iteration, tuple) else str(iteration)


class Cut:
    """The components of one forward, each a variable of its own."""

    def __init__(self, model: HookedLoopedTransformer, *, heads: bool, injections: bool) -> None:
        self.model, self.heads, self.injections = model, heads, injections
        self.cut: list[tuple[Component, Tensor]] = []

    def hooks(self) -> Hooks:
        """Hooks that cut the components out of the graph."""
        model, schedule = self.model, self.model.schedule
        prelude = schedule[0].segment not in schedule.loops
        entry = "blocks.0.hook_resid_pre" if prelude else "hook_prelude_out"
        hooks: Hooks = [(entry, self._leaf(Component("embedding")))]
        if model.initial_state is not None or len(schedule.loops) > 1:
            hooks.append(("hook_initial_state", self._leaf(Component("initial state"))))
        for firing in schedule:
            hooks += self._block(firing)
        if self.injections:
            live: dict[str, Tensor] = {}
            hooks.append(("hook_prelude_out", _keep(live, "e")))
            for t in range(model.recurrences):
                prefix = f"{schedule.main_loop}.{t}"
                hooks.append((f"{prefix}.hook_state_in", _keep(live, "state")))
                hooks.append((f"{prefix}.hook_injected", self._injection(t, live)))
        return hooks

    def _block(self, firing: Firing) -> Hooks:
        attention = Component("attn", firing.segment, firing.iteration, firing.layer)
        hooks: Hooks = [(f"{firing.prefix}.hook_mlp_out", self._leaf(attention._replace(kind="mlp")))]
        if not self.heads:
            return [(f"{firing.prefix}.hook_attn_out", self._leaf(attention)), *hooks]
        hooks.append((f"{firing.prefix}.attn.hook_z", self._leaf(attention._replace(kind="head"))))
        hooks.append((f"{firing.prefix}.hook_attn_out", self._through(attention)))
        return hooks

    def _leaf(self, component: Component) -> Callable[..., Tensor]:
        def hook(value: Tensor, hook: Any) -> Tensor:
            leaf = value.detach().clone().requires_grad_()
            self.cut.append((component, leaf))
            return leaf

        return hook

    def _through(self, component: Component) -> Callable[..., Tensor]:
        """Not cut, only seen: attention as a whole, beside its heads."""

        def hook(value: Tensor, hook: Any) -> Tensor:
            seen = value.clone()
            self.cut.append((component, seen))
            return seen

        return hook

    def _injection(self, t: int, live: dict[str, Tensor]) -> Callable[..., Tensor]:
        body = self.model.body
        component = Component("injection", segment=self.model.schedule.main_loop, iteration=t)

        def hook(value: Tensor, hook: Any) -> Tensor:
            e = body.injection(live["state"], value, live["e"]).detach().clone().requires_grad_()
            self.cut.append((component, e))
            return body.inject(live["state"], e)

        return hook

    def variables(self) -> list[Tensor]:
        """What to differentiate by."""
        return [value for _, value in self.cut]

    def terms(self, gradients: Sequence[Tensor | None], where: Any) -> tuple[list[Component], list[Tensor]]:
        """Components that reach the number, and their terms [prompt] each.

        Args:
            gradients: The number's derivatives by `variables`.
            where: Each prompt and its position, as a pair of indices.
        """
        components: list[Component] = []
        terms: list[Tensor] = []
        of_heads: dict[Component, Tensor] = {}
        for (component, value), gradient in zip(self.cut, gradients, strict=True):
            if gradient is None:
                continue
            product = (value.detach()[where] * gradient[where]).float()
            if component.kind == "head":
                each = product.sum(-1)  # [prompt head]
                of_heads[component._replace(kind="attn")] = each.sum(-1)
                components += [component._replace(head=head) for head in range(each.shape[-1])]
                terms += each.T
                continue
            term = product.sum(-1)
            if self.heads and component.kind == "attn":
                if not self._has_bias(component):
                    continue
                term = term - of_heads[component]
                component = component._replace(kind="attn bias")
            components.append(component)
            terms.append(term)
        return components, terms

    def _has_bias(self, component: Component) -> bool:
        assert component.segment is not None and component.layer is not None
        firing = self.model.schedule.find(component.segment, component.iteration, component.layer)
        block: Any = self.model.blocks[firing.index]
        return getattr(original(block.attn.o), "bias", None) is not None


def _keep(live: dict[str, Tensor], key: str) -> Callable[..., None]:
    def hook(value: Tensor, hook: Any) -> None:
        live[key] = value

    return hook
