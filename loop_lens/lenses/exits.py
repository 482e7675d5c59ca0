"""When a looped model could stop: exit rules, what it would say, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.bridge.names import find_sites
from loop_lens.figures.canvas import new_figure
from loop_lens.lenses.readers import reader
from loop_lens.prompts.reader import read_together

EXIT_RULES: dict[str, float] = {
    "entropy": 1e-3,
    "latent": 0.03,
    "cosine": 1e-3,
    "kl": 1e-3,
    "minp_kl": 1e-5,
    "argmax": 5,
    "acceleration": 0.05,
    "gate": 0.5,
}
"""Exit rules with their default thresholds.

Huginn's six, with the defaults that were published with it, each comparing an iteration with the one before:
entropy: |H_t - H_(t-1)|. latent: |x_t - x_(t-1)| / |x_t|. cosine: 1 - cos(x_t, x_(t-1)). kl: KL(p_(t-1) || p_t).
minp_kl: the same after tokens below a tenth of the most likely one were set to 1/vocab. argmax: for how many
iterations the top token stayed (exits at or above the threshold; all others exit below it).
acceleration (arXiv 2509.23314): |D_t - D_(t-1)| / |D_t| of steps D_t = x_t - x_(t-1), below the threshold
twice in a row; the relative form and its threshold are ours. gate (Ouro, arXiv 2510.25741): the first
iteration at which the cumulated exit probability reaches the threshold.
"""
_READS_LOGITS = ("entropy", "kl", "minp_kl", "argmax")


def exit_probabilities(gate_logits: Float[Tensor, "iteration *rest"]) -> Float[Tensor, "iteration *rest"]:
    """Ouro's distribution over exits: p_t = lambda_t prod_(j<t) (1 - lambda_j), the last takes what is left.

    Args:
        gate_logits: The exit gate's logits.

    Returns:
        Probabilities that sum to 1 over iterations.

    Source:
        arXiv 2510.25741, section on the exit gate.
    """
    if len(gate_logits) < 1:
        raise ValueError("gate_logits has no iterations")
    wide = gate_logits.double()
    stay = torch.nn.functional.logsigmoid(-wide).cumsum(0)
    before = torch.cat([torch.zeros_like(stay[:1]), stay[:-1]])
    leave = torch.nn.functional.logsigmoid(wide) + before
    leave[-1] = before[-1]
    return leave.exp().to(gate_logits.dtype)


def exit_scores(
    rule: str,
    *,
    states: Float[Tensor, "iteration *rest d_model"] | None = None,
    logits: Float[Tensor, "iteration *rest vocab"] | None = None,
    gate_logits: Float[Tensor, "iteration *rest"] | None = None,
) -> Float[Tensor, "iteration *rest"]:
    """What a rule compares with its threshold, at every iteration; see `EXIT_RULES`.

    The first iteration (the first three for acceleration) has nothing before it: its score is infinite,
    where Huginn's own code compares with a uniform guess.

    Raises:
        ValueError: If the rule is unknown, or what it looks at is missing.
    """
    _require_rule(rule)
    if rule == "gate":
        return exit_probabilities(_given(gate_logits, rule, "gate_logits")).cumsum(0)
    if rule in _READS_LOGITS:
        return _of_logits(rule, _given(logits, rule, "logits").float())
    x = _given(states, rule, "states").float()
    if rule == "cosine":
        return _first(1 - torch.cosine_similarity(x[1:], x[:-1], dim=-1), x)
    step = x[1:] - x[:-1]
    if rule == "latent":
        return _first(step.norm(dim=-1) / x[1:].norm(dim=-1), x)
    turn = (step[1:] - step[:-1]).norm(dim=-1) / step[1:].norm(dim=-1)
    # Twice in a row: the larger of two successive values.
    return _first(torch.maximum(turn[1:], turn[:-1]), x)


def _require_rule(rule: str) -> None:
    if rule not in EXIT_RULES:
        raise ValueError(f"rule {rule!r} is unknown: choose one of {', '.join(EXIT_RULES)}")


def _given(value: Tensor | None, rule: str, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"the rule {rule!r} looks at {name}: give them")
    return value


def _first(scores: Tensor, like: Tensor) -> Tensor:
    """Scores with infinity in front, for as many iterations as ``like`` has."""
    missing = len(like) - len(scores)
    return torch.cat(
        [torch.full((missing, *like.shape[1:-1]), float("inf"), dtype=scores.dtype), scores.cpu()]
    )


def _of_logits(rule: str, logits: Tensor) -> Tensor:
    if rule == "argmax":
        top = logits.argmax(-1).cpu()
        run = torch.zeros_like(top)
        for t in range(1, len(top)):
            run[t] = torch.where(top[t] == top[t - 1], run[t - 1] + 1, 0)
        return run.float()
    logprobs = logits.log_softmax(-1)
    if rule == "entropy":
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return _first((entropy[1:] - entropy[:-1]).abs(), logits)
    if rule == "minp_kl":
        probs = logprobs.exp()
        low = probs < 0.1 * probs.amax(-1, keepdim=True)
        probs = torch.where(low, torch.full_like(probs, 1 / probs.shape[-1]), probs)
        logprobs = (probs / probs.sum(-1, keepdim=True)).log()
    before, now = logprobs[:-1], logprobs[1:]
    return _first((before.exp() * (before - now)).sum(-1), logits)


def stops(rule: str, scores: Tensor, threshold: float) -> Bool[Tensor, "iteration *rest"]:
    """Where a rule says stop."""
    return scores >= threshold if rule in ("argmax", "gate") else scores < threshold


@dataclass(frozen=True)
class ExitResult:
    """When each token would stop, and what it would say.

    Attributes:
        rule: The rule.
        threshold: Its threshold.
        iterations: Iterations run until the exit, 1 to R [prompt pos].
        exited: Whether the rule stopped it, or the iterations ran out [prompt pos].
        tokens: The token said at the exit [prompt pos].
        full: The token said at full depth [prompt pos].
        scores: What the rule compared [iteration prompt pos].
    """

    rule: str
    threshold: float
    iterations: Int[Tensor, "prompt pos"]
    exited: Bool[Tensor, "prompt pos"]
    tokens: Int[Tensor, "prompt pos"]
    full: Int[Tensor, "prompt pos"]
    scores: Float[Tensor, "iteration prompt pos"]

    @property
    def agreement(self) -> float:
        """Share of tokens that the exit does not change."""
        return float((self.tokens == self.full).float().mean())

    @property
    def mean_iterations(self) -> float:
        """Mean number of iterations."""
        return float(self.iterations.float().mean())

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt and position."""
        rows = [
            {
                "prompt": b,
                "position": p,
                "iterations": int(self.iterations[b, p]),
                "exited": bool(self.exited[b, p]),
                "token": int(self.tokens[b, p]),
                "full": int(self.full[b, p]),
            }
            for b in range(self.tokens.shape[0])
            for p in range(self.tokens.shape[1])
        ]
        return pd.DataFrame(rows)


@torch.no_grad()
def find_exits(
    model: HookedLoopedTransformer, tokens: Any, *, rule: str, threshold: float | None = None
) -> ExitResult:
    """Where a rule would leave the loop, per token, and what the model would say there.

    The model runs all its iterations once; every state is read out as the model itself would (its coda,
    or norm and unembedding).

    Args:
        model: The model.
        tokens: Text, texts, or tokens [prompt pos].
        rule: One of `EXIT_RULES`.
        threshold: Its threshold; the default of `EXIT_RULES`.

    Raises:
        ValueError: If the rule is unknown, or the model has no gate for it.
    """
    said, scores = _watch(model, tokens, rule)
    return _leave(rule, EXIT_RULES[rule] if threshold is None else threshold, said, scores)


def _watch(model: HookedLoopedTransformer, tokens: Any, rule: str) -> tuple[Tensor, Tensor]:
    """What is said after each iteration, and the rule's scores, both [iteration prompt pos]."""
    _require_rule(rule)
    ids = read_together(model, tokens, "tokens")
    loop, times = model.schedule.main_loop, model.recurrences
    found = find_sites(model, "state_out", segment=loop)
    gates = [f"{loop}.{t}.hook_exit_gate" for t in range(times)]
    if rule == "gate" and gates[0] not in model.schedule.sites:
        raise ValueError("the rule 'gate' needs a model with an exit gate (Ouro, or exit_gate=True)")
    read = reader(model, "coda", range(ids.shape[1]), None)
    kept: list[Tensor] = []
    said: list[Tensor] = []
    scores: list[Tensor] = []

    def look(at: Any) -> Any:
        def hook(state: Tensor, hook: Any) -> None:
            logits = read(state, at)
            said.append(logits.argmax(-1).cpu())
            if rule == "gate":
                return
            # Only as many iterations are kept as the rule looks back.
            kept.append((logits if rule in _READS_LOGITS else state).float().clone())
            back = 2 if rule in _READS_LOGITS or rule in ("latent", "cosine") else 4
            del kept[:-back]
            if rule == "argmax":
                same = said[-1] == said[-2] if len(said) > 1 else torch.zeros_like(said[-1], dtype=torch.bool)
                scores.append(torch.where(same, scores[-1] + 1, 0.0) if len(said) > 1 else same.float())
                return
            window = torch.stack(kept)
            kind = "logits" if rule in _READS_LOGITS else "states"
            full = exit_scores(rule, **{kind: window}) if len(kept) == back else None  # type: ignore[arg-type]
            scores.append(torch.full(said[-1].shape, float("inf")) if full is None else full[-1].cpu())

        return hook

    hooks: list[Any] = [(at.flat, look(at)) for at in found]
    seen: dict[str, Tensor] = {}
    if rule == "gate":
        hooks += [(name, lambda value, hook: seen.__setitem__(hook.name, value.clone())) for name in gates]
    model.run_with_hooks(ids, fwd_hooks=hooks, return_type=None)
    if rule == "gate":
        return torch.stack(said), exit_scores("gate", gate_logits=torch.stack([seen[n] for n in gates])).cpu()
    return torch.stack(said), torch.stack(scores)


def _leave(rule: str, threshold: float, said: Tensor, scores: Tensor) -> ExitResult:
    stop = stops(rule, scores, threshold)
    exited = stop.any(0)
    last = len(said) - 1
    at = torch.where(exited, stop.float().argmax(0), last)
    tokens = said.gather(0, at.unsqueeze(0)).squeeze(0)
    return ExitResult(rule, threshold, at + 1, exited, tokens, said[-1], scores)


@torch.no_grad()
def exit_curve(
    model: HookedLoopedTransformer,
    tokens: Any,
    *,
    rule: str,
    thresholds: Sequence[float],
    labels: Int[Tensor, "prompt pos"] | None = None,
) -> pd.DataFrame:
    """Agreement and accuracy against compute, over thresholds of a rule; the model runs once.

    Args:
        model: The model.
        tokens: Text, texts, or tokens [prompt pos].
        rule: One of `EXIT_RULES`.
        thresholds: The thresholds.
        labels: Right tokens, for the accuracy; the next token by default (no label at the last position).

    Returns:
        A row per threshold: mean number of iterations, agreement with full depth, accuracy.
    """
    ids = read_together(model, tokens, "tokens")
    said, scores = _watch(model, ids, rule)
    right = ids[:, 1:].cpu() if labels is None else labels.cpu()
    rows: list[dict[str, float]] = []
    for threshold in thresholds:
        result = _leave(rule, threshold, said, scores)
        rows.append(
            {
                "threshold": threshold,
                "mean_iterations": result.mean_iterations,
                "agreement": result.agreement,
                "accuracy": float((result.tokens[:, : right.shape[1]] == right).float().mean()),
            }
        )
    return pd.DataFrame(rows)


def plot_exit_curve(curve: pd.DataFrame) -> Any:
    """Agreement and accuracy against mean iterations; a matplotlib figure, not shown."""
    figure, axes = new_figure(5, 3.2)
    ordered = curve.sort_values("mean_iterations")
    for column in ("agreement", "accuracy"):
        axes.plot(ordered["mean_iterations"], ordered[column], "o-", label=column)
    axes.set(xlabel="mean iterations", ylabel="share of tokens", ylim=(0, 1.02))
    axes.legend()
    return figure
