"""Rules by which a looped model could stop, as scores of every iteration."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

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
READS_LOGITS = ("entropy", "kl", "minp_kl", "argmax")


def exit_log_probabilities(
    gate_logits: Float[Tensor, "iteration *rest"],
) -> Float[Tensor, "iteration *rest"]:
    """Logarithm of Ouro's distribution over exits, see `exit_probabilities`; finite at saturated gates."""
    if len(gate_logits) < 1:
        raise ValueError("gate_logits has no iterations")
    stays = torch.cumsum(logsigmoid(-gate_logits[:-1]), dim=0)
    before = torch.cat([torch.zeros_like(gate_logits[:1]), stays])
    leaves = torch.cat([logsigmoid(gate_logits[:-1]), torch.zeros_like(gate_logits[:1])])
    return before + leaves


def exit_probabilities(gate_logits: Float[Tensor, "iteration *rest"]) -> Float[Tensor, "iteration *rest"]:
    """Ouro's distribution over exits: p_t = lambda_t prod_(j<t) (1 - lambda_j), the last takes what is left.

    Args:
        gate_logits: The exit gate's logits.

    Returns:
        Probabilities that sum to 1 over iterations.

    Source:
        arXiv 2510.25741, section on the exit gate.

    Example:
        >>> from loop_lens.lenses import exit_probabilities
        >>> exit_probabilities(torch.zeros(3))
        tensor([0.5000, 0.2500, 0.2500])
    """
    return exit_log_probabilities(gate_logits.double()).exp().to(gate_logits.dtype)


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

    Args:
        rule: One of `EXIT_RULES`.
        states: States after each iteration, for ``"latent"``, ``"cosine"`` and ``"acceleration"``.
        logits: What is said after each iteration, for ``"entropy"``, ``"kl"``, ``"minp_kl"`` and ``"argmax"``.
        gate_logits: The exit gate's logits, for ``"gate"``.

    Raises:
        ValueError: If the rule is unknown, or what it looks at is missing.

    Source:
        Huginn's six: Geiping et al., arXiv 2502.05171, and the code published with it.

    Example:
        >>> from loop_lens.lenses import exit_scores
        >>> _, cache = model.run_with_cache(prompt)
        >>> states = torch.stack([cache[f"loop.{t}.hook_state_out"] for t in range(8)])
        >>> exit_scores("latent", states=states).shape
        torch.Size([8, 1, 11])
    """
    require_rule(rule)
    if rule == "gate":
        return exit_probabilities(_given(gate_logits, rule, "gate_logits")).cumsum(0)
    if rule in READS_LOGITS:
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


def require_rule(rule: str) -> None:
    """Raise ValueError unless the rule exists."""
    if rule not in EXIT_RULES:
        raise ValueError(f"rule {rule!r} is unknown: choose one of {', '.join(EXIT_RULES)}")


def stops(rule: str, scores: Tensor, threshold: float) -> Bool[Tensor, "iteration *rest"]:
    """Where a rule says stop."""
    return scores >= threshold if rule in ("argmax", "gate") else scores < threshold


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
