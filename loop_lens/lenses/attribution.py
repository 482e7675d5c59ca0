"""Attribution that adds up: a logit, or any site, as a sum over what was written into the stream.

On a loop the stream is not the sum of its components: norms stand between blocks and iterations, and an
injection mixes the state with a matrix. With the scales of those norms held at their values the
way from each component to the end is linear all the same. Each component is cut out as a variable of its
own, and its contribution is its value times the derivative along the stream, so every norm, injection
and projection on the way is the model's own code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.figures.canvas import new_figure
from loop_lens.lenses.components import Component, Cut, dotted
from loop_lens.lenses.frozen_norms import frozen_norms, original
from loop_lens.lenses.logit import is_normed, to_logits
from loop_lens.lenses.positions import Positions
from loop_lens.measuring.gradients import differentiates
from loop_lens.measuring.results import Result, merged
from loop_lens.prompts.reader import read_batch
from loop_lens.prompts.tokens import token_ids

TOLERANCE = 1e-3
"""Largest error of a sum, over the number or its largest term. Measured on every family: up to 1.4e-5 in float32, 0.05
in bfloat16 (0.17 for a difference of 0.008 on HRM-Text) and 0.012 in float16, where 32 roundings are allowed."""
Target = str | int | tuple[str | int, str | int] | Tensor


@dataclass(frozen=True)
class Attribution(Result):
    """A number as a sum over components.

    Attributes:
        components: The components; of a grouped attribution, what each group stands for.
        terms: Contribution of each component [component], or [component prompt] for several prompts.
        total: The sum that they explain.

    Example:
        >>> attribution = loop_lens.attribute(model, prompt, target=("c", "b"))
        >>> attribution.group("kind").labels
        ('initial state', 'injection', 'head', 'mlp')
        >>> attribution.to_dataframe().columns.tolist()
        ['label', 'kind', 'segment', 'iteration', 'layer', 'head', 'term']
    """

    components: tuple[Component | str, ...]
    terms: Float[Tensor, "component *prompt"] = merged("append", dim=-1)
    total: Float[Tensor, "*prompt"] = merged("append", dim=-1)

    def __post_init__(self) -> None:
        # A file holds components as plain tuples.
        components = tuple(c if isinstance(c, str) else Component(*c) for c in self.components)
        object.__setattr__(self, "components", components)

    @property
    def labels(self) -> tuple[str, ...]:
        """The components' names."""
        return tuple(map(str, self.components))

    def merge(self, other: Self) -> Self:
        """The attribution of both results' prompts.

        Raises:
            ValueError: If their components differ.
        """
        if self.terms.ndim == 1:
            return self._by_prompt().merge(other)
        return super().merge(other._by_prompt())

    def _by_prompt(self) -> Self:
        """With an axis of prompts, also for one."""
        return replace(self, terms=self.terms.reshape(len(self.terms), -1), total=self.total.reshape(-1))

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
        return Attribution(tuple(names), terms.index_add(0, index, self.terms), self.total)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per component, and per prompt where there are several."""
        rows: list[dict[str, Any]] = []
        several = self.terms.ndim > 1
        for component, label, term in zip(self.components, self.labels, self.terms.tolist(), strict=True):
            place = {} if isinstance(component, str) else component._asdict()
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
        return f"{component.segment} {dotted(component.iteration)}"
    if by == "layer":
        return component.kind if component.layer is None else f"{component.segment} l{component.layer}"
    if by == "firing":
        bare = Component("", component.segment, component.iteration, component.layer)
        return component.kind if component.segment is None else str(bare).rstrip(".")
    raise ValueError(f"by={by!r} is unknown: group by 'iteration', 'layer', 'kind' or 'firing'")


@differentiates
def attribute(
    model: HookedLoopedTransformer,
    prompts: Any,
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
        prompts: As for `loop_lens.prompts.read_prompts`; lengths may differ.
        target: A token (text or id) for its logit, a pair for the difference of two, or a direction
            [d_model] onto which a ``site`` is projected.
        pos: Position, negative ones from each prompt's own end.
        site: A stream's hook. With a token, what the logit lens reads there; with a direction, its
            projection. By default the model's output.
        heads: Whether to split attention into heads (and its output bias, where it has one).
        through_injection: Whether to follow what is injected back into the prelude, so that its blocks and
            the embedding have terms for it, in place of one term per iteration.

    Returns:
        Terms that sum to ``total``: the logit (before a soft cap, where a model has one), or the
        projection.

    Raises:
        ValueError: If a token is not a single token, a prompt has no such position, a direction comes
            without a site, or if the terms do not sum to the model's own number.
        UnknownNameError: If the site does not exist.

    Example:
        >>> attribution = loop_lens.attribute(model, prompt, target=("c", "b"))
        >>> logits = model(prompt)[0, -1, model.to_tokens(["c", "b"])[:, -1]]
        >>> torch.allclose(attribution.terms.sum(), logits[0] - logits[1], atol=1e-4)
        True
        >>> loop_lens.attribute(model, prompts, target="c", heads=False).terms.shape
        torch.Size([43, 2])
    """
    batch = read_batch(model, prompts)
    chosen = Positions.of(batch.lengths, [pos])
    if not chosen.there.all():
        b = int(chosen.there[:, 0].logical_not().nonzero()[0])
        raise ValueError(f"position {pos} does not exist in prompt {b}: it has 0-{int(batch.lengths[b]) - 1}")
    where = chosen.where(batch.tokens.device)
    read = _Readout.of(model, target, site)
    cut = Cut(model, heads=heads, injections=model.body.injects and not through_injection)
    with frozen_norms(model):
        captured: list[Tensor] = []
        hooks = [*cut.hooks(), (read.name, lambda value, hook: captured.append(value))]
        logits = model.run_with_hooks(batch.tokens, fwd_hooks=hooks)
        value, constant = read.number(captured[0][where], logits[where])
        gradients = torch.autograd.grad(value.sum(), cut.variables(), allow_unused=True)
    components, terms = cut.terms(gradients, where)
    if bool((constant != 0).any()):
        components.append(Component("bias"))
        terms.append(constant.expand(len(batch.tokens)))
    stacked = torch.stack([term.detach().float().cpu() for term in terms])
    _require_sum(model, stacked, (value + constant).detach().float().cpu())
    if len(batch.tokens) == 1:
        stacked = stacked[:, 0]
    return Attribution(tuple(components), stacked, stacked.sum(0))


def _tolerance(model: HookedLoopedTransformer) -> float:
    return max(TOLERANCE, 32 * torch.finfo(next(model.original_model.parameters()).dtype).eps)


def _require_sum(model: HookedLoopedTransformer, terms: Tensor, numbers: Tensor) -> None:
    """Raise ValueError unless terms [component prompt] sum to the numbers [prompt]."""
    off = (terms.sum(0) - numbers).abs() / torch.maximum(numbers.abs(), terms.abs().amax(0)).clamp_min(1e-30)
    if not (off <= _tolerance(model)).all():
        b = int(off.argmax())
        raise ValueError(
            f"the terms of prompt {b} sum to {float(terms[:, b].sum()):.4g}, but the model's number is "
            f"{float(numbers[b]):.4g}: something other than attention and MLPs writes into the stream (an edit or a "
            "hook in force, or a part of this architecture), so it cannot be attributed"
        )


@dataclass(frozen=True)
class _Readout:
    """The number that is explained, from the stream at a site.

    Attributes:
        model: The model.
        name: The stream's hook.
        directions: What the stream is projected on [d_model target].
        constants: What is added to each projection [target].
        weights: What the number is made of [target].
        tokens: The targets where they are tokens.
        norm: Whether the final norm comes before.
        output: Whether the number is the model's output.
    """

    model: HookedLoopedTransformer
    name: str
    directions: Tensor
    constants: Tensor
    weights: Tensor
    tokens: Tensor | None
    norm: bool = False
    output: bool = False

    @classmethod
    def of(cls, model: HookedLoopedTransformer, target: Target, site: str | None) -> _Readout:
        """Check what is asked for."""
        if isinstance(target, Tensor) and target.is_floating_point():
            if site is None:
                raise ValueError(
                    "a direction needs a site to project, site='loop.3.hook_state_out'; for logits give a token"
                )
            if target.shape != (model.cfg.d_model,):
                raise ValueError(
                    f"the direction has shape {tuple(target.shape)}, but a stream has [{model.cfg.d_model}]"
                )
            direction = target.detach().clone()[:, None]
            return cls(model, _stream(model, site), direction, torch.zeros(1), torch.ones(1), None)
        pair = target if isinstance(target, tuple) else (target,)
        tokens = token_ids(model, list(pair))  # type: ignore[arg-type]
        if len(tokens) not in (1, 2):
            raise ValueError("target must be one token or a pair of tokens")
        name = model.registry.canonical("unembed.hook_in") if site is None else _stream(model, site)
        norm = site is not None and not is_normed(model, model.locate(name))
        scale = float(getattr(model.adapter, "logit_scale", 1.0))
        return cls(
            model,
            name,
            model.W_U.detach()[:, tokens],
            model.b_U.detach()[tokens],
            scale * torch.tensor([1.0, -1.0][: len(tokens)]),
            tokens,
            norm,
            site is None,
        )

    def number(self, stream: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The number of each prompt, from the stream [prompt d_model], and the part that is constant.

        Args:
            stream: The stream there.
            logits: The model's own logits there [prompt vocab].

        Raises:
            ValueError: If the number is not the model's own.
        """
        directions, constants = self.directions.float(), self.constants.float()
        normed = self.model.ln_final(stream) if self.norm else stream
        each = normed.float() @ directions + constants
        if self.tokens is not None:
            own = logits if self.output else to_logits(self.model, stream, normed=not self.norm)
            self._require_own(self.model.adapter.apply_output_logits_transform(each), own)
        shift = getattr(original(self.model.ln_final), "bias", None)
        if isinstance(shift, Tensor) and (self.output or self.norm):
            constants = constants + shift.detach().float() @ directions
        weights, constant = self.weights.to(each.device), constants @ self.weights.to(each.device)
        return each @ weights - constant, constant

    def _require_own(self, logits: Tensor, own: Tensor) -> None:
        """Raise ValueError unless logits [prompt target] are those of the model [prompt vocab]."""
        theirs, logits, own = own[:, self.tokens].detach().float(), logits.detach(), own.detach()
        off = (logits - theirs).abs().amax(-1) / own.float().abs().amax(-1).clamp_min(1e-30)
        if not (off <= _tolerance(self.model)).all():
            b = int(off.argmax())
            raise ValueError(
                f"the unembedding's product with the stream of prompt {b} is {float(logits[b, 0]):.4g}, but the "
                f"model's own logit is {float(theirs[b, 0]):.4g}: this model's head does more than that, so logits "
                "cannot be attributed; a direction and a site can"
            )


def _stream(model: HookedLoopedTransformer, site: str) -> str:
    found = model.locate(site)
    if found.layout != "stream":
        raise ValueError(f"{site} is not a stream [prompt pos d_model]: attribution cannot split it")
    return found.flat
