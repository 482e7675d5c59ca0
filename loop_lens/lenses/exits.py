"""Where each token could leave the loop, what the model would say there, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.figures.lines import line_figure
from loop_lens.lenses.base import require_output, sites_of
from loop_lens.lenses.coda import CodaLens
from loop_lens.lenses.exit_rules import EXIT_RULES, READS_LOGITS, exit_scores, require_rule, stops
from loop_lens.lenses.positions import Positions
from loop_lens.lenses.result import NAN
from loop_lens.measuring.results import Result, merged
from loop_lens.prompts.reader import Batch, read_batch
from loop_lens.unrolling.sites import Site


@dataclass(frozen=True)
class ExitResult(Result):
    """When each token would stop, and what it would say.

    Where a prompt has no position that a longer one has, iterations are 0, tokens -1 and scores NaN.

    Attributes:
        rule: The rule.
        threshold: Its threshold.
        iterations: Iterations run until the exit, 1 to R [prompt pos].
        exited: Whether the rule stopped it, or the iterations ran out [prompt pos].
        tokens: The token said at the exit [prompt pos].
        full: The token said at full depth [prompt pos].
        scores: What the rule compared [iteration prompt pos].

    Example:
        >>> from loop_lens.lenses import find_exits
        >>> exits = find_exits(model, prompts, rule="latent", threshold=0.3)
        >>> exits.iterations.shape, len(exits.to_dataframe())
        (torch.Size([2, 11]), 20)
    """

    rule: str
    threshold: float
    iterations: Int[Tensor, "prompt pos"] = merged("append", fill=0)
    exited: Bool[Tensor, "prompt pos"] = merged("append", fill=0)
    tokens: Int[Tensor, "prompt pos"] = merged("append", fill=-1)
    full: Int[Tensor, "prompt pos"] = merged("append", fill=-1)
    scores: Float[Tensor, "iteration prompt pos"] = merged("append", dim=1, fill=NAN)

    @property
    def mask(self) -> Bool[Tensor, "prompt pos"]:
        """Whether a prompt has a position."""
        return self.iterations > 0

    @property
    def agreement(self) -> float:
        """Share of tokens that the exit does not change."""
        return float((self.tokens == self.full)[self.mask].float().mean())

    @property
    def mean_iterations(self) -> float:
        """Mean number of iterations."""
        return float(self.iterations[self.mask].float().mean())

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt and position."""
        prompt, position = self.mask.nonzero().T.tolist()
        return pd.DataFrame(
            {
                "prompt": prompt,
                "position": position,
                "iterations": self.iterations[self.mask],
                "exited": self.exited[self.mask],
                "token": self.tokens[self.mask],
                "full": self.full[self.mask],
            }
        )


@dataclass(frozen=True)
class ExitCurve(Result):
    """What a rule costs and keeps, over its thresholds.

    Attributes:
        rule: The rule.
        thresholds: Its thresholds.
        n_tokens: Number of tokens that the means are over.
        n_labels: Number of those that have a label.
        iterations: Iterations run, summed over tokens [threshold].
        agreeing: How many tokens the exit does not change [threshold].
        right: How many say their label at the exit [threshold].

    Example:
        >>> from loop_lens.lenses import exit_curve
        >>> curve = exit_curve(model, prompts, rule="latent", thresholds=[0.0, 1e9])
        >>> curve.mean_iterations, curve.agreement[0]
        (tensor([8., 2.], dtype=torch.float64), tensor(1., dtype=torch.float64))
    """

    rule: str
    thresholds: tuple[float, ...]
    n_tokens: int = merged("add")
    n_labels: int = merged("add")
    iterations: Int[Tensor, " threshold"] = merged("add")
    agreeing: Int[Tensor, " threshold"] = merged("add")
    right: Int[Tensor, " threshold"] = merged("add")

    @property
    def mean_iterations(self) -> Float[Tensor, " threshold"]:
        """Mean number of iterations."""
        return self.iterations.double() / self.n_tokens

    @property
    def agreement(self) -> Float[Tensor, " threshold"]:
        """Share of tokens that the exit does not change."""
        return self.agreeing.double() / self.n_tokens

    @property
    def accuracy(self) -> Float[Tensor, " threshold"]:
        """Share of labelled tokens that say their label; NaN without labels."""
        return self.right.double() / self.n_labels

    def to_dataframe(self) -> pd.DataFrame:
        """One row per threshold."""
        columns = {name: getattr(self, name) for name in ("mean_iterations", "agreement", "accuracy")}
        return pd.DataFrame({"threshold": self.thresholds, **columns})

    def plot(self) -> Any:
        """Agreement and accuracy against mean iterations; a matplotlib figure, not shown."""
        table = self.to_dataframe().sort_values("mean_iterations")
        figure = line_figure(
            {name: table[name].tolist() for name in ("agreement", "accuracy")},
            at=table["mean_iterations"].tolist(),
            xlabel="mean iterations",
            ylabel="share of tokens",
            marker="o",
        )
        figure.axes[0].set_ylim(0, 1.02)
        return figure


@torch.no_grad()
def find_exits(
    model: HookedLoopedTransformer, prompts: Any, *, rule: str, threshold: float | None = None
) -> ExitResult:
    """Find where a rule would leave the loop, per token, and what the model would say there.

    The model runs all its iterations once; every state is read out as the model itself would (its coda,
    or norm and unembedding).

    Args:
        model: The model.
        prompts: As for `loop_lens.prompts.read_prompts`; lengths may differ.
        rule: One of `EXIT_RULES`.
        threshold: Its threshold; the default of `EXIT_RULES`.

    Raises:
        ValueError: If the rule is unknown, or the model has no gate for it.

    Example:
        >>> from loop_lens.lenses import find_exits
        >>> exits = find_exits(model, prompt, rule="kl", threshold=0.1)
        >>> exits.iterations[0, -4:].tolist(), exits.agreement
        ([7, 2, 3, 5], 1.0)
    """
    batch = read_batch(model, prompts)
    run = _Watched.of(model, batch, rule)
    threshold = EXIT_RULES[rule] if threshold is None else float(threshold)
    iterations, exited, tokens = run.leave(threshold)
    spread = Positions.of(batch.lengths, None).spread
    return ExitResult(
        rule,
        threshold,
        iterations=spread(iterations, 0, dim=0),
        exited=spread(exited, 0, dim=0),
        tokens=spread(tokens, -1, dim=0),
        full=spread(run.tokens[-1], -1, dim=0),
        scores=spread(run.scores, NAN),
    )


@torch.no_grad()
def exit_curve(
    model: HookedLoopedTransformer,
    prompts: Any,
    *,
    rule: str,
    thresholds: Sequence[float],
    labels: Int[Tensor, "prompt pos"] | None = None,
) -> ExitCurve:
    """Measure agreement and accuracy against compute, over thresholds of a rule; the model runs once.

    Args:
        model: The model.
        prompts: As for `loop_lens.prompts.read_prompts`; lengths may differ.
        rule: One of `EXIT_RULES`.
        thresholds: The thresholds.
        labels: Right tokens, for the accuracy, negative where there is none; by default each prompt's next
            token (none at its last position).

    Raises:
        ValueError: As `find_exits`.

    Example:
        >>> from loop_lens.lenses import exit_curve
        >>> curve = exit_curve(model, prompts, rule="kl", thresholds=[0.01, 0.1, 1.0])
        >>> curve.agreement.tolist()
        [1.0, 0.95, 0.8]
    """
    batch = read_batch(model, prompts)
    run = _Watched.of(model, batch, rule)
    given = batch.tokens[:, 1:].masked_fill(~batch.mask[:, 1:], -1) if labels is None else labels
    right = batch.tokens.new_full(batch.tokens.shape, -1)
    right[:, : given.shape[1]] = given.to(right.device)
    wanted = right[batch.mask].cpu()
    thresholds = [float(threshold) for threshold in thresholds]
    if not thresholds:
        raise ValueError("thresholds is empty: give at least one")
    left = [run.leave(threshold) for threshold in thresholds]
    return ExitCurve(
        rule=rule,
        thresholds=tuple(thresholds),
        n_tokens=len(wanted),
        n_labels=int((wanted >= 0).sum()),
        iterations=torch.stack([iterations.sum() for iterations, _, _ in left]),
        agreeing=torch.stack([(tokens == run.tokens[-1]).sum() for _, _, tokens in left]),
        right=torch.stack([(tokens == wanted).sum() for _, _, tokens in left]),
    )


@dataclass(frozen=True)
class _Watched:
    """What is said after each iteration, and a rule's scores, of all tokens but padding.

    Attributes:
        rule: The rule.
        tokens: The most likely token [iteration token].
        scores: What the rule compares [iteration token].
    """

    rule: str
    tokens: Tensor
    scores: Tensor

    @classmethod
    def of(cls, model: HookedLoopedTransformer, batch: Batch, rule: str) -> _Watched:
        """Run the model once, and keep only as many iterations as the rule looks back."""
        require_rule(rule)
        coda = CodaLens()
        found = sites_of(model, coda, None)
        gates = [site.sibling("exit_gate") for site in found]
        if rule == "gate" and gates[0].name not in model.schedule.sites:
            raise ValueError("the rule 'gate' needs a model with an exit gate (Ouro, or exit_gate=True)")
        looks_at = "logits" if rule in READS_LOGITS else "states"
        back = 4 if rule == "acceleration" else 2
        recent: list[Tensor] = []
        tokens: list[Tensor] = []
        scores: list[Tensor] = []
        gate_logits: list[Tensor] = []
        ends: list[tuple[Site, Tensor]] = []

        def score() -> Tensor:
            now = tokens[-1]
            if rule == "argmax":
                same = now == tokens[-2] if len(tokens) > 1 else torch.zeros_like(now, dtype=torch.bool)
                return torch.where(same, scores[-1] + 1 if scores else 1.0, 0.0)
            if len(recent) < back:
                return torch.full(now.shape, float("inf"))
            return exit_scores(rule, **{looks_at: torch.stack(recent)})[-1].cpu()  # type: ignore[arg-type]

        def look(site: Site) -> Any:
            def hook(state: Tensor, hook: Any) -> None:
                logits = coda.read_at(state, batch.mask, site, model)
                tokens.append(logits.argmax(-1).cpu())
                if coda.says_output(site, model):
                    ends.append((site, logits))
                if rule == "gate":
                    return
                recent.append((logits if looks_at == "logits" else state[batch.mask]).float().clone())
                del recent[:-back]
                scores.append(score())

            return hook

        hooks: list[Any] = [(site.flat, look(site)) for site in found]
        if rule == "gate":
            hooks += [
                (site.flat, lambda value, hook: gate_logits.append(value[batch.mask])) for site in gates
            ]
        output = model.run_with_hooks(batch.tokens, fwd_hooks=hooks)
        for site, logits in ends:
            require_output(logits, output[batch.mask], site, coda.kind)
        if rule == "gate":
            return cls(
                rule, torch.stack(tokens), exit_scores(rule, gate_logits=torch.stack(gate_logits)).cpu()
            )
        return cls(rule, torch.stack(tokens), torch.stack(scores))

    def leave(self, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """Iterations until the exit, whether the rule stopped there, and the token said there, all [token]."""
        stop = stops(self.rule, self.scores, threshold)
        exited = stop.any(0)
        at = torch.where(exited, stop.float().argmax(0), len(self.tokens) - 1)
        return at + 1, exited, self.tokens.gather(0, at[None])[0]
