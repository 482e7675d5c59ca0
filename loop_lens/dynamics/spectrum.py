"""How one iteration stretches and shrinks what is near a state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.dynamics.krylov import Leading, largest_eigenvalue, largest_singular_value
from loop_lens.dynamics.linearised import IterationMap
from loop_lens.figures.lines import line_figure
from loop_lens.measuring.results import Result
from loop_lens.prompts.reader import read_together
from loop_lens.unrolling.tree import Iteration

Of = Literal["radius", "singular_value"]
_BOTH: tuple[Of, ...] = ("radius", "singular_value")


@dataclass(frozen=True)
class JacobianSpectrum(Result):
    """How strongly iterations act near the states that they were run at.

    Attributes:
        segment: The loop.
        iterations: The iterations, in order.
        positions: The positions whose diagonal block each value is of; None for the whole sequence.
        radius: Spectral radius [iteration prompt position], one position for the whole sequence; below 1
            the iteration contracts in the long run.
        radius_error: Norm of the residual of its eigenvector [iteration prompt position].
        singular_value: Leading singular value: the most that one iteration stretches a difference
            [iteration prompt position]; never below the radius.
        singular_value_error: Bound on its error [iteration prompt position].
    """

    segment: str
    iterations: tuple[Iteration, ...]
    positions: tuple[int, ...] | None
    radius: Tensor
    radius_error: Tensor
    singular_value: Tensor
    singular_value_error: Tensor

    def to_dataframe(self) -> pd.DataFrame:
        """One row per iteration, prompt and position (missing for the whole sequence)."""
        rows = [
            {
                "iteration": t,
                "prompt": p,
                "position": None if self.positions is None else self.positions[k],
                "radius": float(self.radius[i, p, k]),
                "radius_error": float(self.radius_error[i, p, k]),
                "singular_value": float(self.singular_value[i, p, k]),
                "singular_value_error": float(self.singular_value_error[i, p, k]),
            }
            for i, t in enumerate(self.iterations)
            for p in range(self.radius.shape[1])
            for k in range(self.radius.shape[2])
        ]
        return pd.DataFrame(rows).astype({"position": "Int64"})

    def plot(self) -> Any:
        """Both against the iteration: means, and the range over prompts and positions; not shown."""
        flat = {"spectral radius": self.radius.flatten(1), "singular value": self.singular_value.flatten(1)}
        return line_figure(
            {name: values.mean(1) for name, values in flat.items()},
            ylabel="leading value of the Jacobian",
            ticks=self.iterations,
            bands={name: (values.amin(1), values.amax(1)) for name, values in flat.items()},
            level=(1, None),
            marker="o",
        )


def spectral_radius(
    model: HookedLoopedTransformer,
    tokens: Any,
    *,
    iteration: Iteration,
    steps: int = 40,
    seed: int = 0,
    segment: str | None = None,
    state: Float[Tensor, "prompt pos d_model"] | None = None,
) -> float:
    """Spectral radius of one iteration's Jacobian, from its state to the next, over the whole sequence.

    Below 1 the iteration contracts near this state, in the long run. The largest eigenvalue's modulus is
    that of the largest Ritz value of an Arnoldi process on vector-Jacobian products (a matrix and its
    transpose have the same eigenvalues), which unlike plain power iteration also finds complex pairs.

    Args:
        model: The model.
        tokens: Text, or tokens [prompt pos]; prompts do not interact, so the radius is the largest of all.
        iteration: The iteration.
        steps: Size of the Krylov space; more is more exact.
        seed: Seed of the first vector.
        segment: The loop; the innermost by default.
        state: Where to take the Jacobian; by default the state that enters the iteration in this run.

    Raises:
        UnknownNameError: If there is no such iteration.
        ValueError: If steps is below 1, or the state of another shape.
        DivergedError: If the state is NaN or infinite; names the first iteration.

    Source:
        Spectral radius of the loop's Jacobian: arXiv 2605.26733, by power iteration there.
    """
    return _largest("radius", model, tokens, iteration, steps, seed, segment, state)


def leading_singular_value(
    model: HookedLoopedTransformer,
    tokens: Any,
    *,
    iteration: Iteration,
    steps: int = 20,
    seed: int = 0,
    segment: str | None = None,
    state: Float[Tensor, "prompt pos d_model"] | None = None,
) -> float:
    """Leading singular value of one iteration's Jacobian over the whole sequence.

    It is the most that one iteration stretches a small difference. Below 1 every difference shrinks at
    once; above 1 with a spectral radius below 1, some grow before they shrink.

    Args:
        model: The model; attention must be ``"eager"`` or ``"sdpa"``.
        tokens: Text, or tokens [prompt pos]; the largest value of all prompts.
        iteration: The iteration.
        steps: Size of the Krylov spaces; more is more exact.
        seed: Seed of the first vector.
        segment: The loop; the innermost by default.
        state: Where to take the Jacobian; by default the state that enters the iteration in this run.

    Raises:
        UnknownNameError: If there is no such iteration.
        ValueError: If steps is below 1, or the state of another shape.
        DivergedError: If the state is NaN or infinite; names the first iteration.
    """
    return _largest("singular_value", model, tokens, iteration, steps, seed, segment, state)


def jacobian_spectrum(
    model: HookedLoopedTransformer,
    tokens: Any,
    *,
    iterations: Sequence[Iteration] | None = None,
    positions: Sequence[int] | Literal["all"] | None = None,
    steps: int = 40,
    seed: int = 0,
    segment: str | None = None,
    state: Float[Tensor, "prompt pos d_model"] | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> JacobianSpectrum:
    """Spectral radius and leading singular value of several iterations, per prompt or per token.

    Per token it is the diagonal block: the derivative of the state that leaves at a position with
    respect to the one that enters at the same position, all other positions held. In a causal model the
    whole sequence's Jacobian is block-triangular in positions, so its spectral radius is the largest of
    its tokens'; its singular value is not, since attention moves differences between positions.

    In nested loops a map is of one loop's own state, with the other's held: of ``"L"`` one low-level
    cycle, of ``"H"`` a whole high-level one with the low-level cycles inside. Gradients reach all of
    HRM-Text's cycles here, the early ones included.

    Args:
        model: The model; attention must be ``"eager"`` or ``"sdpa"``.
        tokens: Text, or tokens [prompt pos].
        iterations: Which; all by default.
        positions: Positions to take one by one, or ``"all"``; the whole sequence by default.
        steps: Size of the Krylov spaces; more is more exact.
        seed: Seed of the first vectors.
        segment: The loop; the innermost by default.
        state: Where to take the Jacobians; by default each iteration's own state in this run.
        batch_size: Rows a forward; a row is a prompt, or a token where positions are given.
        progress: Whether to show a progress bar, for work beyond two seconds.

    Raises:
        UnknownNameError: If there is no such iteration.
        ValueError: If steps or batch_size is below 1, a position does not exist, or the state has
            another shape.
        DivergedError: If a state is NaN or infinite; names the first iteration.
    """
    _require_positive(steps=steps, batch_size=batch_size)
    segment = segment or model.schedule.innermost_loop
    ids = read_together(model, tokens, "tokens")
    n_pos = ids.shape[1]
    chosen = tuple(model.schedule.iterations(segment) if iterations is None else iterations)
    for t in chosen:
        model.name("state_in", iteration=t, segment=segment)
    if positions is not None:
        asked = range(n_pos) if positions == "all" else positions
        missing = [p for p in asked if not -n_pos <= p < n_pos]
        if missing:
            raise ValueError(f"position {missing[0]} does not exist: there are positions 0-{n_pos - 1}")
        places = tuple(p % n_pos for p in asked)
    else:
        places = None
    n_places = 1 if places is None else len(places)
    rows = torch.arange(len(ids)).repeat_interleave(n_places)
    position = None if places is None else torch.tensor(places).repeat(len(ids))
    found = torch.zeros(4, len(chosen), len(rows), dtype=torch.float64)
    work = [(i, start) for i in range(len(chosen)) for start in range(0, len(rows), batch_size)]
    for i, start in tqdm(work, desc="Jacobians", delay=2, disable=not progress, leave=False):
        part = slice(start, start + batch_size)
        step = IterationMap(
            model,
            ids,
            iteration=chosen[i],
            segment=segment,
            state=state,
            rows=rows[part],
            position=None if position is None else position[part],
        )
        for k, of in enumerate(_BOTH):
            leading = _leading(of, step, steps, seed)
            found[2 * k, i, part], found[2 * k + 1, i, part] = leading.value, leading.error
    grid = found.reshape(4, len(chosen), len(ids), n_places)
    return JacobianSpectrum(segment, chosen, places, *grid)


def _leading(of: Of, step: IterationMap, steps: int, seed: int) -> Leading:
    if of == "radius":
        return largest_eigenvalue(step.vjp, step.rows, step.size, steps=steps, seed=seed)
    return largest_singular_value(step.jvp, step.vjp, step.rows, step.size, steps=steps, seed=seed)


def _largest(
    of: Of,
    model: HookedLoopedTransformer,
    tokens: Any,
    iteration: Iteration,
    steps: int,
    seed: int,
    segment: str | None,
    state: Tensor | None,
) -> float:
    _require_positive(steps=steps)
    step = IterationMap(
        model,
        read_together(model, tokens, "tokens"),
        iteration=iteration,
        segment=segment or model.schedule.innermost_loop,
        state=state,
    )
    return float(_leading(of, step, steps, seed).value.max())


def _require_positive(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
