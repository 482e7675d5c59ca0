"""How one iteration stretches and shrinks what is near a state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.dynamics.krylov import largest_eigenvalue, largest_singular_value
from loop_lens.dynamics.linearised import IterationMap
from loop_lens.figures.lines import line_figure
from loop_lens.measuring.results import Result, merged
from loop_lens.measuring.tables import grid_table
from loop_lens.prompts.reader import read_prompts
from loop_lens.unrolling.tree import Iteration

_VALUES = ("radius", "radius_error", "singular_value", "singular_value_error")
_ALL = 2**31  # rows a forward


@dataclass(frozen=True)
class JacobianSpectrum(Result):
    """How strongly iterations act near the states that they were run at.

    Attributes:
        positions: The positions whose diagonal block each value is of; None for the whole sequence.
        radius: Spectral radius [iteration prompt position], one position for the whole sequence, NaN where a
            prompt has no such position; below 1 the iteration contracts in the long run.
        radius_error: Norm of the residual of its eigenvector, of the same shape.
        singular_value: Leading singular value, of the same shape: the most that one iteration stretches a
            difference. Below 1 every difference shrinks at once; above 1 with a radius below 1, some grow first.
        singular_value_error: Bound on its error.

    Example:
        >>> spectrum = loop_lens.dynamics.jacobian_spectrum(model, prompts, iterations=[6, 7], steps=4)
        >>> spectrum.radius.shape  # iteration prompt position
        torch.Size([2, 2, 1])
        >>> bool((spectrum.radius <= spectrum.singular_value + spectrum.singular_value_error).all())
        True
    """

    segment: str
    iterations: tuple[Iteration, ...]
    positions: tuple[int, ...] | None
    radius: Tensor = merged("append", dim=1)
    radius_error: Tensor = merged("append", dim=1)
    singular_value: Tensor = merged("append", dim=1)
    singular_value_error: Tensor = merged("append", dim=1)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per iteration, prompt and position (missing for the whole sequence)."""
        places = self.positions or [None]
        axes = {"iteration": self.iterations, "prompt": range(self.radius.shape[1]), "position": places}
        table = grid_table(axes, {name: getattr(self, name) for name in _VALUES})
        return table.dropna(subset="radius", ignore_index=True).astype({"position": "Int64"})

    def plot(self) -> Any:
        """Both against the iteration: means, and the range over prompts and positions; not shown."""
        there = ~self.radius[0].isnan()
        values = {"spectral radius": self.radius[:, there], "singular value": self.singular_value[:, there]}
        return line_figure(
            {name: each.mean(1) for name, each in values.items()},
            ylabel="leading value of the Jacobian",
            ticks=self.iterations,
            bands={name: (each.amin(1), each.amax(1)) for name, each in values.items()},
            level=(1, None),
            marker="o",
        )


def spectral_radius(
    model: HookedLoopedTransformer,
    prompts: Any,
    *,
    iteration: Iteration,
    steps: int = 40,
    seed: int = 0,
    segment: str | None = None,
    state: Float[Tensor, "prompt pos d_model"] | None = None,
) -> Float[Tensor, " prompt"]:
    """Spectral radius of one iteration's Jacobian over each whole prompt, from its state to the next.

    Below 1 the iteration contracts near this state, in the long run. The largest eigenvalue's modulus is
    that of the largest Ritz value of an Arnoldi process on vector-Jacobian products (a matrix and its
    transpose have the same eigenvalues), which unlike plain power iteration also finds complex pairs.
    Options and errors are those of `jacobian_spectrum`.

    Example:
        >>> radius = loop_lens.dynamics.spectral_radius(model, prompts, iteration=7, steps=4)
        >>> radius.shape, bool((radius < 1).all())  # of each prompt: the last iteration contracts
        (torch.Size([2]), True)

    Source:
        Spectral radius of the loop's Jacobian: arXiv 2605.26733, by power iteration there.
    """
    found = _spectra(
        model, prompts, [iteration], None, steps, seed, segment, state, _ALL, progress=False, stretch=False
    )
    return found.radius[0, :, 0]


def jacobian_spectrum(
    model: HookedLoopedTransformer,
    prompts: Any,
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
    HRM-Text's cycles here, the early ones included. Attention must be ``"eager"`` or ``"sdpa"``.

    Args:
        iterations: Which; all by default.
        positions: Positions to take one by one (negative ones count from each prompt's end), or ``"all"``;
            the whole sequence by default.
        steps: Size of the Krylov spaces; more is more exact.
        seed: Seed of the first vectors.
        state: Where to take the Jacobians; by default each iteration's own state in this run.
        batch_size: Rows a forward; a row is a prompt, or a token where positions are given.

    Raises:
        UnknownNameError: If there is no such iteration.
        ValueError: If steps or batch_size is below 1, a position does not exist, or the state has another shape.

    Example:
        >>> spectrum = loop_lens.dynamics.jacobian_spectrum(
        ...     model, prompts, iterations=[7], positions=[-1], steps=4, progress=False
        ... )
        >>> spectrum.to_dataframe()[["iteration", "prompt", "position"]].values.tolist()
        [[7, 0, 10], [7, 1, 8]]
    """
    return _spectra(
        model, prompts, iterations, positions, steps, seed, segment, state, batch_size, progress, stretch=True
    )


def _spectra(
    model: HookedLoopedTransformer,
    prompts: Any,
    iterations: Sequence[Iteration] | None,
    positions: Sequence[int] | Literal["all"] | None,
    steps: int,
    seed: int,
    segment: str | None,
    state: Tensor | None,
    batch_size: int,
    progress: bool,
    *,
    stretch: bool,
) -> JacobianSpectrum:
    """The spectra, with or without singular values (NaN)."""
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    segment = segment or model.schedule.innermost_loop
    tokens = list(read_prompts(model, prompts))
    chosen = tuple(model.schedule.iterations(segment) if iterations is None else iterations)
    for t in chosen:
        model.name("state_in", iteration=t, segment=segment)
    # Places are positions, or one for the whole sequence.
    asked = [[0] if positions is None else _positions(positions, len(each)) for each in tokens]
    places = list(dict.fromkeys(place for own in asked for place in own))
    values = torch.full((4, len(chosen), len(tokens), len(places)), float("nan"), dtype=torch.float64)
    work = [(i, rows) for i in range(len(chosen)) for rows in _rows(tokens, asked, batch_size)]
    for i, rows in tqdm(work, desc="Jacobians", delay=2, disable=not progress, leave=False):
        step = IterationMap(
            model,
            rows.tokens,
            iteration=chosen[i],
            segment=segment,
            state=_states_of(rows, state, tokens),
            prompts=torch.tensor(rows.prompts),
            position=None if positions is None else torch.tensor(rows.places),
        )
        found = [*largest_eigenvalue(step.vjp, *step.shape, steps=steps, seed=seed)]
        if stretch:
            found += largest_singular_value(step.jvp, step.vjp, *step.shape, steps=steps, seed=seed)
        at = [places.index(place) for place in rows.places]
        values[: len(found), i, rows.prompts, at] = torch.stack(found)
    return JacobianSpectrum(segment, chosen, None if positions is None else tuple(places), *values)


class _Rows(NamedTuple):
    """Rows of a forward: each one's tokens, prompt, and place of that prompt."""

    tokens: Int[Tensor, "row pos"]
    prompts: list[int]
    places: list[int]


def _rows(tokens: Sequence[Tensor], places: Sequence[Sequence[int]], batch_size: int) -> Iterator[_Rows]:
    """Every place of every prompt; rows of a batch are of equal length: padding would be in their Jacobian."""
    for length in dict.fromkeys(len(each) for each in tokens):
        own = [(p, place) for p, each in enumerate(tokens) if len(each) == length for place in places[p]]
        for start in range(0, len(own), batch_size):
            part = own[start : start + batch_size]
            together = torch.stack([tokens[p] for p, _ in part])
            yield _Rows(together, [p for p, _ in part], [place for _, place in part])


def _states_of(
    rows: _Rows, state: Tensor | None, tokens: Sequence[Tensor]
) -> Float[Tensor, "row pos d_model"] | None:
    """The given states of some rows: one per prompt, as long as the prompt."""
    if state is None:
        return None
    lengths = sorted({len(each) for each in tokens})
    if state.ndim != 3 or len(state) != len(tokens) or lengths != [state.shape[1]]:
        raise ValueError(
            f"state has shape {tuple(state.shape)}, but it is [prompt pos d_model] and there are {len(tokens)} "
            f"prompts of {', '.join(map(str, lengths))} tokens"
        )
    return state[rows.prompts]


def _positions(positions: Sequence[int] | Literal["all"], length: int) -> list[int]:
    """Positions of a prompt, counted from its start."""
    asked = range(length) if positions == "all" else positions
    missing = [p for p in asked if not -length <= p < length]
    if missing:
        raise ValueError(f"position {missing[0]} does not exist: there are positions 0-{length - 1}")
    return [p % length for p in asked]
