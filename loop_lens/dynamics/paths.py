"""Path independence: whether a loop ends in the same place wherever it starts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.bridge.names import find_sites
from loop_lens.dynamics.states import LoopProbe, starting_from
from loop_lens.figures.lines import line_figure
from loop_lens.measuring.collecting import measured
from loop_lens.measuring.moments import Collector, Moments
from loop_lens.measuring.results import Result
from loop_lens.measuring.run import Hook, values_at
from loop_lens.measuring.vectors import cosines, distances, lengths, ratios
from loop_lens.prompts.reader import Batch, device_of, read_prompts
from loop_lens.unrolling.sites import Site
from loop_lens.unrolling.tree import Iteration

PAIR = ("cosine", "distance", "relative_distance")
PLACE = ("cosine", "worst_cosine", "distance", "worst_distance")


@dataclass(frozen=True)
class PathIndependence(Result):
    """How alike the states are that the same prompt reaches from several initial states.

    Attributes:
        starts: The initial states: ``"own"``, ``"seed 1"``, ``"given 0"``, ``"prompt 0"`` (where another
            prompt ended).
        pairs: ``cosine``, ``distance`` and ``relative_distance`` (to the pair's mean norm) of the states that
            leave an iteration, over tokens [iteration pair].
        positions: ``cosine`` and ``distance``, means over pairs, with ``worst_cosine`` and ``worst_distance``,
            over the prompts' tokens at a position [iteration position].

    Example:
        >>> found = loop_lens.dynamics.path_independence(model, prompts, starts=2, progress=False)
        >>> found.starts, round(found.worst, 3)
        (('own', 'seed 1', 'seed 2'), 1.0)
        >>> found.pairs.axes["pair"]
        ('own / seed 1', 'own / seed 2', 'seed 1 / seed 2')
    """

    segment: str
    starts: tuple[str, ...]
    pairs: Moments
    positions: Moments

    @property
    def iterations(self) -> tuple[Iteration, ...]:
        """The loop's iterations, in order."""
        return self.pairs.axes["iteration"]

    @property
    def alignment(self) -> float:
        """Asymptotic alignment: the mean cosine, over pairs and tokens, after the last iteration."""
        return float(self.pairs.mean("cosine")[-1].mean())

    @property
    def worst(self) -> float:
        """The mean over tokens of the least cosine among pairs, after the last iteration."""
        i = self.positions.metrics.index("worst_cosine")
        return float(self.positions.total[i, -1].sum() / self.positions.count[i, -1].sum())

    def merge(self, other: Self) -> Self:
        """The result on both results' prompts."""
        positions = _together(self.positions, other.positions)
        return replace(super().merge(replace(other, positions=self.positions)), positions=positions)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per iteration and pair, with means and spreads over tokens; see also ``positions``."""
        return self.pairs.to_dataframe()

    def plot(self, metric: str = "cosine") -> Any:
        """One line per pair against the iteration; a figure, not shown."""
        values = self.pairs.mean(metric)
        lines = dict(zip(self.pairs.axes["pair"], values.T, strict=True))
        return line_figure(lines, ylabel=metric, log=metric != "cosine", legend=len(lines) <= 12)


def path_independence(
    model: HookedLoopedTransformer,
    prompts: Any,
    *,
    starts: int | Sequence[int] | Float[Tensor, "start pos d_model"] | None = None,
    others: Any = None,
    segment: str | None = None,
    batch_size: int = 4,
    progress: bool = True,
) -> PathIndependence:
    """Run the same prompts from several initial states, and compare the states after each iteration.

    The model's own initial state is always one of them. Only the states of one iteration are held, so memory
    does not grow with R. A loop into which the prompt is injected (Huginn, the retrofits, HRM-Text's low-level
    stack) can be path-independent. Where the prompt enters by the initial state alone (Ouro, `loopify`),
    another start is another prompt, and the measure says how much of it is forgotten.

    Args:
        starts: Further initial states: a number of seeds, or the seeds, of the model's own noise; or the
            states themselves, at least as long as the prompts. Without ``others`` 3 seeds by default.
        others: Prompts whose states after all iterations are further initial states; at least as long as
            the prompts.
        segment: The loop, at whose first iteration the states are put in.
        batch_size: Prompts a forward; each has one row per initial state.

    Raises:
        ValueError: If there are no further initial states, the model has no noise to seed, or a start is
            shorter than a prompt.

    Source:
        Asymptotic alignment: arXiv 2211.09961, the cosine between the states reached from the usual initial
        state and from another input's fixed point; seeds, distances and earlier iterations are additions.

    Example:
        >>> from loop_lens.dynamics import path_independence
        >>> found = path_independence(model, prompts, progress=False)  # the model's own noise and three more
        >>> cosine = found.pairs.mean("cosine").mean(1)
        >>> round(float(cosine[0]), 3), round(float(cosine[3]), 3), round(found.alignment, 3)
        (0.964, 0.999, 1.0)
    """
    probe = PathIndependenceProbe(model, starts=starts, others=others, segment=segment)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "what": "path independence"}
    with starting_from(model, 0):  # what it draws is replaced, but a given state would not fit the rows
        return measured(model, prompts, probe, rows=probe.rows, **options)


class PathIndependenceProbe(LoopProbe[PathIndependence]):
    """Measures `PathIndependence` in a run of `loop_lens.measuring.measure` with the probe's own ``rows``.

    Options are those of `path_independence`.

    Example:
        >>> probe = loop_lens.dynamics.PathIndependenceProbe(model, others="e d d e d ? e ->")
        >>> loop_lens.measuring.measure(model, ["a b b c a ? a ->"], [probe], rows=probe.rows, progress=False)
        >>> probe.result().starts
        ('own', 'prompt 0')
    """

    hooks = ("state_out",)

    def __init__(
        self,
        model: HookedLoopedTransformer,
        *,
        starts: int | Sequence[int] | Tensor | None = None,
        others: Any = None,
        segment: str | None = None,
    ) -> None:
        super().__init__(model, segment=segment, least=1, what="path independence")
        self._entry = find_sites(model, "state_in", segment=self.segment)[0]
        exit_ = find_sites(model, "state_out", segment=self.segment)[-1]
        seeds, given = _requested(model, 3 if starts is None and others is None else starts)
        reached = [
            values_at(model, tokens[None].to(device_of(model)), [exit_])[exit_][0]
            for tokens in ([] if others is None else read_prompts(model, others))
        ]
        self._drawn = (model.initial_state, *seeds)
        self._given = {f"given {k}": state for k, state in enumerate(given)}
        self._given |= {f"prompt {k}": state for k, state in enumerate(reached)}
        self.starts = ("own", *(f"seed {seed}" for seed in seeds), *self._given)
        if len(self.starts) < 2:
            raise ValueError(
                "there is nothing to compare the model's own initial state with: give starts or others"
            )
        self._pairs = list(itertools.combinations(range(len(self.starts)), 2))
        names = [f"{self.starts[a]} / {self.starts[b]}" for a, b in self._pairs]
        self.collectors = (Collector(PAIR, {"iteration": self.iterations, "pair": names}),)
        self._positions = self._by_position(0).moments()

    def _by_position(self, length: int) -> Collector:
        return Collector(PLACE, {"iteration": self.iterations, "position": range(length)})

    def rows(self, batch: Batch) -> tuple[Tensor, list[Hook]]:
        """Each prompt once per initial state [start * prompt pos], and the hook that puts the states in."""
        states: list[Tensor] = []
        for drawn in self._drawn:
            with starting_from(self._model, drawn):
                states.append(values_at(self._model, batch.tokens, [self._entry])[self._entry])
        states += [_fitted(state, batch, label) for label, state in self._given.items()]
        entering = torch.cat(states)
        rows = batch.tokens.repeat(len(states), 1)
        return rows, [(self._entry.flat, lambda value, hook: entering.to(value))]

    def begin(self, batch: Batch, reference: Mapping[Site, Tensor]) -> None:
        super().begin(batch, reference)
        self._places = self._by_position(batch.tokens.shape[1])
        self._places.begin(len(batch.tokens), batch.tokens.device)

    def take(self, site: Site, value: Tensor) -> None:
        """Compare the states of all pairs of starts."""
        i = (self._row[site.iteration],)
        states = value.unflatten(0, (len(self.starts), -1))
        norms = lengths(states)
        cosine = torch.stack([cosines(states[a], states[b]) for a, b in self._pairs])  # pair prompt pos
        apart = torch.stack([distances(states[a], states[b]) for a, b in self._pairs])
        mean_norm = torch.stack([(norms[a] + norms[b]) / 2 for a, b in self._pairs])
        pairs = (cosine, apart, ratios(apart, mean_norm))
        self.put(i, dict(zip(PAIR, pairs, strict=True)), self.mask)
        places = (cosine.mean(0), cosine.amin(0), apart.mean(0), apart.amax(0))
        here = {name: each.T for name, each in zip(PLACE, places, strict=True)}  # pos prompt
        self.put(i, here, self.mask.T, to=self._places)

    def end(self) -> None:
        super().end()
        self._places.end()
        self._positions = _together(self._positions, self._places.moments())

    def result(self) -> PathIndependence:
        return PathIndependence(self.segment, self.starts, self.collectors[0].moments(), self._positions)


def _together(a: Moments, b: Moments) -> Moments:
    """Moments by position merged, of prompts of which some may be longer than all others."""
    length = max(len(each.axes["position"]) for each in (a, b))
    padded: list[Moments] = []
    for each in (a, b):
        axes = {**each.axes, "position": tuple(range(length))}
        more = (0, length - len(each.axes["position"]))
        padded.append(replace(each, axes=axes, sums=torch.nn.functional.pad(each.sums, more)))
    return padded[0].merge(padded[1])


def _requested(
    model: HookedLoopedTransformer, starts: int | Sequence[int] | Tensor | None
) -> tuple[list[int], list[Tensor]]:
    if isinstance(starts, Tensor):
        if starts.ndim != 3 or starts.shape[-1] != model.cfg.d_model:
            raise ValueError(
                f"starts has shape {tuple(starts.shape)}, but states are [start pos d_model={model.cfg.d_model}]"
            )
        return [], list(starts)
    own = model.initial_state if isinstance(model.initial_state, int) else 0
    seeds = list(range(own + 1, own + 1 + starts)) if isinstance(starts, int) else list(starts or ())
    if seeds and model.initial_state is None:
        raise ValueError(
            "this model's loop starts from its own input and has no noise to seed: give starts as a tensor "
            "[start pos d_model], or others=prompts"
        )
    return seeds, []


def _fitted(state: Tensor, batch: Batch, label: str) -> Float[Tensor, "prompt pos d_model"]:
    """A state [pos d_model] cut to a batch's length, for each of its prompts."""
    n = batch.tokens.shape[1]
    if len(state) < n:
        raise ValueError(
            f"the start {label!r} has {len(state)} positions, and prompt {batch.index[-1]} has {n} tokens: give "
            "starts at least as long as the prompts"
        )
    return state[:n].to(batch.tokens.device).expand(len(batch.tokens), -1, -1)
