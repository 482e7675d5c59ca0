"""Attribution that adds up: a logit, or any site, as a sum over what was written into the stream.

On a loop the stream is not the sum of its components: norms stand between blocks and iterations, and an
injection mixes the state with a matrix. With the scales of those norms held at their values the
way from each component to the end is linear all the same. Each component is cut out as a variable of its
own, and its contribution is its value times the derivative along the stream, so every norm, injection
and projection on the way is the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.figures.canvas import new_figure
from loop_lens.lenses.readers import is_normed
from loop_lens.prompts.reader import read_together
from loop_lens.prompts.tokens import token_ids
from loop_lens.unrolling.sites import Firing
from loop_lens.unrolling.tree import Iteration

Target = str | int | tuple[str | int, str | int] | Tensor


@dataclass(frozen=True)
class Component:
    """One thing that was written into the stream.

    Attributes:
        kind: ``"embedding"``, ``"initial state"``, ``"injection"``, ``"head"``, ``"attn"``, ``"attn bias"``,
            ``"mlp"`` or ``"bias"``.
        segment: Its segment, None outside.
        iteration: Its iteration.
        layer: Its layer.
        head: Its head.
    """

    kind: str
    segment: str | None = None
    iteration: Iteration = None
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        parts = [] if self.segment is None or self.iteration is not None else [self.segment]
        if self.iteration is not None:
            parts.append(f"{self.segment}.{_dotted(self.iteration)}")
        if self.layer is not None:
            parts.append(f"l{self.layer}")
        return ".".join([*parts, f"h{self.head}" if self.kind == "head" else self.kind])


def _dotted(iteration: Iteration) -> str:
    return ".".join(map(str, iteration)) if isinstance(iteration, tuple) else str(iteration)


@dataclass(frozen=True)
class Attribution:
    """A number as a sum over components.

    Attributes:
        terms: Contribution of each component [component], or [component prompt] for several prompts.
        components: The components; of a grouped attribution, what each group stands for.
        labels: Their names.
        total: The sum that they explain.
    """

    terms: Float[Tensor, "component *prompt"]
    components: tuple[Component | str, ...]
    labels: tuple[str, ...]
    total: Float[Tensor, "*prompt"]

    def group(self, by: Literal["iteration", "layer", "kind", "firing"]) -> Attribution:
        """Sum over components that share an iteration, a layer, a kind, or a firing.

        Raises:
            ValueError: If this attribution is grouped already.
        """
        keys: list[str] = []
        for component in self.components:
            if isinstance(component, str):
                raise ValueError("this attribution is grouped already: group the original")
            keys.append(_group(component, by))
        names = list(dict.fromkeys(keys))
        index = torch.tensor([names.index(key) for key in keys])
        terms = torch.zeros(len(names), *self.terms.shape[1:], dtype=self.terms.dtype)
        return Attribution(terms.index_add(0, index, self.terms), tuple(names), tuple(names), self.total)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per component, and per prompt where there are several."""
        rows: list[dict[str, Any]] = []
        several = self.terms.ndim > 1
        for component, label, term in zip(self.components, self.labels, self.terms.tolist(), strict=True):
            place = {} if isinstance(component, str) else vars(component)
            for prompt, value in enumerate(term if several else [term]):
                rows.append(
                    {"label": label, **place, **({"prompt": prompt} if several else {}), "term": value}
                )
        return pd.DataFrame(rows)

    def plot(self, *, top: int = 30, prompt: int = 0) -> Any:
        """Bars of the largest terms; a matplotlib figure, not shown."""
        terms = self.terms[:, prompt] if self.terms.ndim > 1 else self.terms
        order = terms.abs().topk(min(top, len(terms))).indices.sort().values.tolist()
        figure, axes = new_figure(max(4.0, 0.3 * len(order)), 3.2)
        colours = ["tab:blue" if terms[i] > 0 else "tab:red" for i in order]
        axes.bar(range(len(order)), terms[order].cpu(), color=colours)
        axes.set_xticks(
            range(len(order)), [self.labels[i] for i in order], rotation=70, ha="right", fontsize=7
        )
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set(ylabel="contribution")
        return figure


def _group(component: Component, by: str) -> str:
    if by == "kind":
        return component.kind
    if by == "iteration":
        if component.iteration is None:
            return component.segment or component.kind
        return f"{component.segment} {_dotted(component.iteration)}"
    if by == "layer":
        return component.kind if component.layer is None else f"{component.segment} l{component.layer}"
    if by == "firing":
        bare = Component("", component.segment, component.iteration, component.layer)
        return component.kind if component.segment is None else str(bare).rstrip(".")
    raise ValueError(f"by={by!r} is unknown: group by 'iteration', 'layer', 'kind' or 'firing'")


def attribute(
    model: HookedLoopedTransformer,
    tokens: Any,
    *,
    target: Target,
    pos: int = -1,
    site: str | None = None,
    heads: bool = True,
    through_injection: bool = False,
) -> Attribution:
    """Split a logit, or a site's value, into what each component wrote.

    Components are the embedding, the initial state, what is injected at each iteration, and every
    head (or attention) and MLP of every firing. Norm scales are held at their values.

    Args:
        model: The model.
        tokens: Text, texts, or tokens [prompt pos].
        target: A token (text or id) for its logit, a pair for the difference of two, or a direction
            [d_model] onto which a ``site`` is projected.
        pos: Position, negative ones from the end.
        site: A stream's hook. With a token, what the logit lens reads there; with a direction, its
            projection. By default the model's output.
        heads: Whether to split attention into heads (and its output bias, where it has one).
        through_injection: Whether to follow what is injected back into the prelude, so that its blocks and
            the embedding have terms for it, in place of one term per iteration.

    Returns:
        Terms that sum to ``total``: the logit (before a soft cap, where a model has one), or the
        projection.

    Raises:
        ValueError: If a token is not a single token, a position does not exist, or a direction comes
            without a site.
        UnknownNameError: If the site does not exist.
    """
    ids = read_together(model, tokens, "tokens")
    if not -ids.shape[1] <= pos < ids.shape[1]:
        raise ValueError(f"position {pos} does not exist: there are 0-{ids.shape[1] - 1}")
    read = _Readout.of(model, target, site)
    cut = _Cut(model, heads=heads, injections=model.body.injects and not through_injection)
    with torch.enable_grad(), _frozen_norms(model):
        captured: list[Tensor] = []
        hooks = [*cut.hooks(), (read.name, lambda value, hook: captured.append(value))]
        model.run_with_hooks(ids, fwd_hooks=hooks, return_type=None)
        value, constant = read.number(captured[0][:, pos])
        gradients = torch.autograd.grad(value.sum(), cut.variables(), allow_unused=True)
    components, terms = cut.terms(gradients, pos)
    if bool((constant != 0).any()):
        components.append(Component("bias"))
        terms.append(constant.expand(len(ids)))
    stacked = torch.stack([term.detach().float().cpu() for term in terms])
    single = len(ids) == 1
    return Attribution(
        terms=stacked[:, 0] if single else stacked,
        components=tuple(components),
        labels=tuple(str(component) for component in components),
        total=stacked.sum(0)[0] if single else stacked.sum(0),
    )


@dataclass(frozen=True)
class _Readout:
    """The number that is explained, from the stream at a site."""

    model: HookedLoopedTransformer
    name: str
    direction: Tensor
    norm: bool
    constant: Tensor

    @classmethod
    def of(cls, model: HookedLoopedTransformer, target: Target, site: str | None) -> _Readout:
        """Check what is asked for."""
        zero = torch.zeros(())
        if isinstance(target, Tensor) and target.is_floating_point():
            if site is None:
                raise ValueError(
                    "a direction needs a site to project, site='loop.3.hook_state_out'; for logits give a token"
                )
            if target.shape != (model.cfg.d_model,):
                raise ValueError(
                    f"the direction has shape {tuple(target.shape)}, but a stream has [{model.cfg.d_model}]"
                )
            return cls(model, _stream(model, site), target, False, zero)
        pair = target if isinstance(target, tuple) else (target,)
        tokens = token_ids(model, list(pair))  # type: ignore[arg-type]
        signs = [1.0, -1.0][: len(tokens)]
        if len(tokens) > 2:
            raise ValueError("target must be one token or a pair of tokens")
        weight, bias = model.W_U.detach(), model.b_U.detach()
        scale = float(getattr(model.adapter, "logit_scale", 1.0))
        direction = scale * sum(sign * weight[:, t] for sign, t in zip(signs, tokens.tolist(), strict=True))
        constant = scale * sum(sign * bias[t] for sign, t in zip(signs, tokens.tolist(), strict=True))
        assert isinstance(direction, Tensor) and isinstance(constant, Tensor)
        name = model.registry.canonical("unembed.hook_in") if site is None else _stream(model, site)
        norm = site is not None and not is_normed(model, model.locate(name))
        shift = getattr(_original(model.ln_final), "bias", None)
        if isinstance(shift, Tensor) and (site is None or norm):
            constant = constant + shift.detach() @ direction
        return cls(model, name, direction, norm, constant)

    def number(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The number of each prompt, from the stream [prompt d_model], and the part that is constant."""
        if self.norm:
            stream = self.model.ln_final(stream)
        return (stream.float() @ self.direction.float()), self.constant.float()


def _stream(model: HookedLoopedTransformer, site: str) -> str:
    found = model.locate(site)
    if found.layout != "stream":
        raise ValueError(f"{site} is not a stream [prompt pos d_model]: attribution cannot split it")
    return found.flat


class _Cut:
    """The components of one forward, each a variable of its own."""

    def __init__(self, model: HookedLoopedTransformer, *, heads: bool, injections: bool) -> None:
        self.model, self.heads, self.injections = model, heads, injections
        self.cut: list[tuple[Component, Tensor]] = []

    def hooks(self) -> list[tuple[str, Callable[..., Any]]]:
        """Hooks that cut the components out of the graph."""
        model, schedule = self.model, self.model.schedule
        prelude = schedule[0].segment not in schedule.loops
        entry = "blocks.0.hook_resid_pre" if prelude else "hook_prelude_out"
        hooks: list[tuple[str, Callable[..., Any]]] = [(entry, self._leaf(Component("embedding")))]
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

    def _block(self, firing: Firing) -> list[tuple[str, Callable[..., Any]]]:
        place: dict[str, Any] = {
            "segment": firing.segment,
            "iteration": firing.iteration,
            "layer": firing.layer,
        }
        attention = Component("attn", **place)
        hooks: list[tuple[str, Callable[..., Any]]] = [
            (f"{firing.prefix}.hook_mlp_out", self._leaf(Component("mlp", **place)))
        ]
        if not self.heads:
            return [(f"{firing.prefix}.hook_attn_out", self._leaf(attention)), *hooks]
        hooks.append((f"{firing.prefix}.attn.hook_z", self._leaf(Component("head", **place))))
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

    def terms(self, gradients: Sequence[Tensor | None], pos: int) -> tuple[list[Component], list[Tensor]]:
        """Components that reach the number, and their terms [prompt] each."""
        components: list[Component] = []
        terms: list[Tensor] = []
        of_heads: dict[str, Tensor] = {}
        for (component, value), gradient in zip(self.cut, gradients, strict=True):
            if gradient is None:
                continue
            product = (value.detach()[:, pos] * gradient[:, pos]).float()
            if component.kind == "head":
                each = product.sum(-1)  # [prompt head]
                of_heads[str(_attention_of(component))] = each.sum(-1)
                for head, term in enumerate(each.T):
                    components.append(
                        Component("head", component.segment, component.iteration, component.layer, head)
                    )
                    terms.append(term)
                continue
            term = product.sum(-1)
            if self.heads and component.kind == "attn":
                if not self._has_bias(component):
                    continue
                term = term - of_heads[str(component)]
                component = Component("attn bias", component.segment, component.iteration, component.layer)
            components.append(component)
            terms.append(term)
        return components, terms

    def _has_bias(self, component: Component) -> bool:
        assert component.segment is not None and component.layer is not None
        firing = self.model.schedule.find(component.segment, component.iteration, component.layer)
        block: Any = self.model.blocks[firing.index]
        return getattr(_original(block.attn.o), "bias", None) is not None


def _attention_of(head: Component) -> Component:
    return Component("attn", head.segment, head.iteration, head.layer)


def _keep(live: dict[str, Tensor], key: str) -> Callable[..., None]:
    def hook(value: Tensor, hook: Any) -> None:
        live[key] = value

    return hook


def _original(module: Any) -> Any:
    """The model's own module under a bridge."""
    return getattr(module, "original_component", None) or module


@contextmanager
def _frozen_norms(model: HookedLoopedTransformer) -> Generator[None, None, None]:
    """Let every norm have its value, and the derivative that it has at a constant scale."""
    # The final norm's bridge, too: for layer norms it computes by itself.
    modules: dict[int, nn.Module] = {id(model.ln_final): model.ln_final}
    trees: list[nn.Module] = [model.original_model, *(model.blocks[f.index] for f in model.schedule)]
    for tree in trees:
        for module in tree.modules():
            held = (value for value in vars(module).values() if isinstance(value, nn.Module))
            for one in (module, *held):
                # A bridge runs the model's own norm below its hook points, which must stay outside.
                if type(one).__name__.endswith("Norm"):
                    modules[id(one)] = one
    handles = [module.register_forward_hook(_freeze) for module in modules.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _freeze(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    x = inputs[0]
    if not (isinstance(output, Tensor) and x.requires_grad):
        return None
    original = _original(module)
    centred = isinstance(original, nn.LayerNorm)
    wide = x.float()
    linear = wide - wide.mean(-1, keepdim=True) if centred else wide
    shift = getattr(original, "bias", None)
    with torch.no_grad():
        value = output.float() - (shift.float() if isinstance(shift, Tensor) else 0.0)
        ratio = torch.where(linear == 0, torch.zeros_like(value), value / linear)
    moved = linear * ratio
    return output.detach() + (moved - moved.detach()).to(output.dtype)
