"""Trajectories of states in the few directions in which they vary most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.dynamics.states import STATE, Column, StateProbe, named, tidy
from loop_lens.figures.canvas import new_figure
from loop_lens.measuring.processes import shared
from loop_lens.measuring.results import Result, merged
from loop_lens.measuring.run import measure
from loop_lens.measuring.tables import grid_table
from loop_lens.prompts.reader import Batch, device_of
from loop_lens.unrolling.sites import Site
from loop_lens.unrolling.tree import Iteration

Fit = Literal["joint", "layer"]
Over = Literal["position", "tokens"]


@dataclass(frozen=True)
class Trajectories(Result):
    """One position's states of each prompt, by principal components.

    Attributes:
        fit: ``"joint"`` where all layers share components (one group), ``"layer"`` where each has its own.
        prompt: Each prompt's place among those given [prompt].
        position: The position that is shown of it [prompt].
        coordinates: [prompt iteration layer component].
        mean: What is subtracted first [group d_model].
        components: Directions of unit length, the largest entry positive [group component d_model].
        variance: Of the states along each [group component].
        explained: The same as a share of the whole variance [group component].

    Example:
        >>> found = loop_lens.dynamics.trajectories(model, prompt, layers=[1, "state"], progress=False)
        >>> found.quartile
        (1, 1, 2, 2, 3, 3, 4, 4)
        >>> figure = found.plot(projection="3d")
    """

    segment: str
    iterations: tuple[Iteration, ...]
    layers: tuple[Column, ...]
    fit: Fit
    prompt: Tensor
    position: Tensor
    coordinates: Tensor
    mean: Tensor
    components: Tensor
    variance: Tensor
    explained: Tensor

    @property
    def quartile(self) -> tuple[int, ...]:
        """The quarter of the run that each iteration is in, 1 to 4."""
        n = len(self.iterations)
        return tuple(4 * i // n + 1 for i in range(n))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt, iteration and layer (missing at the state), with coordinates ``pc1``, ..."""
        axes = {"prompt": self.prompt.tolist(), "iteration": self.iterations, "layer": self.layers}
        coordinates = {f"pc{c + 1}": each for c, each in enumerate(self.coordinates.unbind(-1))}
        table = grid_table(axes, {"position": self.position[:, None, None], **coordinates})
        table.insert(1, "position", table.pop("position"))
        quarters = dict(zip(self.iterations, self.quartile, strict=True))
        table.insert(3, "quartile", table["iteration"].map(quarters.__getitem__))
        return tidy(table)

    def plot(self, *, prompt: int = 0, projection: Literal["2d", "3d"] = "2d") -> Any:
        """One panel per quartile of iterations, one line per layer, of one prompt; a figure, not shown."""
        dims = 3 if projection == "3d" else 2
        if self.coordinates.shape[-1] < dims:
            raise ValueError(
                f"a {projection} plot needs {dims} components, and {self.coordinates.shape[-1]} were kept"
            )
        if not 0 <= prompt < len(self.prompt):
            raise ValueError(f"prompt {prompt} does not exist: there are prompts 0-{len(self.prompt) - 1}")
        quarters = sorted(set(self.quartile))
        options: dict[str, Any] = {"subplot_kw": {"projection": "3d"}} if dims == 3 else {}
        size = (3.4 if dims == 3 else 3) * len(quarters)
        figure, panels = new_figure(size, 3.4, 1, len(quarters), squeeze=False, **options)
        shown = self.coordinates[prompt].flatten(0, 1)
        reach = zip(shown.amin(0).tolist(), shown.amax(0).tolist(), strict=True)
        limits = [(low - 0.05 * (high - low), high + 0.05 * (high - low)) for low, high in reach]
        for axes, quarter in zip(panels[0], quarters, strict=True):
            at = [i for i, q in enumerate(self.quartile) if q == quarter]
            for k, layer in enumerate(self.layers):
                points = self.coordinates[prompt, at, k, :dims].T.tolist()
                axes.plot(*points, "o-", markersize=2.5, linewidth=0.7, label=named(layer))
            axes.set(title=f"iterations {self.iterations[at[0]]} to {self.iterations[at[-1]]}")
            names = [
                f"pc{c + 1}" + ("" if self.fit == "layer" else f" ({100 * self.explained[0, c]:.0f}%)")
                for c in range(dims)
            ]
            axes.set(xlabel=names[0], ylabel=names[1], xlim=limits[0], ylim=limits[1])
            if dims == 3:
                axes.set(zlabel=names[2], zlim=limits[2])
        panels[0][0].legend(fontsize=7)
        return figure


@dataclass(frozen=True)
class Scatter(Result):
    """Number [*group] of vectors, their mean [*group d_model], and the sum of the outer products of differences from it
    [*group d_model d_model], in float64; those of parts merge exactly.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, x: Float[Tensor, "vector d_model"]) -> Scatter:
        """Of some vectors."""
        wide = x.double()
        mean = wide.mean(0)
        return cls(torch.tensor(len(x), device=x.device), mean, (wide - mean).T @ (wide - mean))

    def merge(self, other: Self) -> Self:
        """Of both parts' vectors."""
        count, one, two = self.count + other.count, self.count.double(), other.count.double()
        apart = other.mean - self.mean
        mean = self.mean + apart * (two / count.clamp_min(1))[..., None]
        outer = apart[..., :, None] * apart[..., None, :]
        between = outer * (one * two / count.clamp_min(1))[..., None, None]
        return replace(self, count=count, mean=mean, scatter=self.scatter + other.scatter + between)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per group: how many vectors, and their variance summed over directions."""
        variance = self.scatter.diagonal(dim1=-2, dim2=-1).sum(-1) / (self.count - 1)
        return pd.DataFrame({"count": self.count.reshape(-1), "variance": variance.reshape(-1)})


@dataclass(frozen=True)
class KeptStates(Result):
    """The chosen states of some prompts [prompt iteration layer d_model], and perhaps the scatter of all states."""

    segment: str
    iterations: tuple[Iteration, ...]
    layers: tuple[Column, ...]
    fit: Fit
    scatter: Scatter | None
    prompt: Tensor = merged("append")
    position: Tensor = merged("append")
    states: Tensor = merged("append")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt."""
        return pd.DataFrame({"prompt": self.prompt.tolist(), "position": self.position.tolist()})

    def project(self, components: int) -> Trajectories:
        """The states in the directions in which they (or the states at all positions) vary most.

        Raises:
            ValueError: If there are fewer directions than components.
        """
        order = self.prompt.argsort()
        states = self.states[order].double()
        if self.scatter is None:
            groups = states.transpose(0, 2)  # layer iteration prompt d_model
            groups = groups.reshape(len(self.layers) if self.fit == "layer" else 1, -1, groups.shape[-1])
            fitted = [_fit(cloud, components) for cloud in groups]
        else:
            every = (self.scatter.count.tolist(), self.scatter.mean, self.scatter.scatter)
            fitted = [_fit_scatter(*one, components) for one in zip(*every, strict=True)]
        mean, axes, variance, explained = (torch.stack(each) for each in zip(*fitted, strict=True))
        per_layer = axes.expand(len(self.layers), -1, -1)
        coordinates = torch.einsum("pild,lcd->pilc", states - mean[None, None], per_layer)
        places = (self.prompt[order], self.position[order])
        of = (self.segment, self.iterations, self.layers, self.fit)
        return Trajectories(*of, *places, coordinates, mean, axes, variance, explained)


class TrajectoriesProbe(StateProbe[Trajectories]):
    """Keeps one position's states in a run of `loop_lens.measuring.measure`; options as in `trajectories`.

    Example:
        >>> probe = loop_lens.dynamics.TrajectoriesProbe(model, position=0)
        >>> loop_lens.measuring.measure(model, prompts, [probe], progress=False)
        >>> probe.result(components=2).coordinates.shape  # prompt iteration layer component
        torch.Size([2, 8, 2, 2])
    """

    def __init__(
        self,
        model: HookedLoopedTransformer,
        *,
        position: int = -1,
        layers: Sequence[Column] | None = None,
        segment: str | None = None,
        fit: Fit = "joint",
        over: Over = "position",
    ) -> None:
        super().__init__(model, segment=segment, least=2, what="a trajectory")
        self.layers: tuple[Column, ...] = tuple(self.columns[:-1] if layers is None else layers)
        missing = [layer for layer in self.layers if layer not in self.columns]
        if missing or not self.layers:
            which = f"layer {missing[0]!r} does not exist" if missing else "layers is empty"
            raise ValueError(f"{which}: {self.segment!r} has layers 0-{self.n_layers - 1} and {STATE!r}")
        self._place = {self.columns.index(layer): k for k, layer in enumerate(self.layers)}
        self._position = position
        self._fit: Fit = fit
        self._shape = (len(self.iterations), len(self.layers), int(model.cfg.d_model))
        self._dtype = torch.promote_types(next(model.original_model.parameters()).dtype, torch.float32)
        none = torch.zeros(0, dtype=torch.int64)
        self._kept = [(none, none, torch.zeros(0, *self._shape))]  # prompt, position, states of each batch
        self._scatter: list[Scatter] = []
        if over == "tokens":
            zero = torch.zeros((), dtype=torch.float64, device=device_of(model))
            d = self._shape[-1]
            empty = Scatter(zero.long(), zero.expand(d), zero.expand(d, d))
            self._scatter = [empty] * (1 if fit == "joint" else len(self.layers))

    def begin(self, batch: Batch, reference: Mapping[Site, Tensor]) -> None:
        """Find the position in each prompt."""
        lengths = batch.lengths
        where = lengths + self._position if self._position < 0 else torch.full_like(lengths, self._position)
        bad = (where < 0) | (where >= lengths)
        if bool(bad.any()):
            k = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"position {self._position} does not exist in prompt {batch.index[k]}, which has "
                f"{int(lengths[k])} tokens"
            )
        super().begin(batch, reference)
        self._index, self._where = batch.index, where
        self._states = torch.zeros(len(batch.tokens), *self._shape, dtype=self._dtype)

    def wants(self, site: Site) -> bool:
        """The layers that were chosen."""
        return super().wants(site) and self.column(site) in self._place

    def take(self, site: Site, value: Tensor) -> None:
        """Keep the position's state; add all to the scatter."""
        i, column = self.cell(site)
        k = self._place[column]
        self._states[:, i, k] = value[torch.arange(len(value), device=value.device), self._where].cpu()
        if self._scatter:
            group = 0 if self._fit == "joint" else k
            self._scatter[group] = self._scatter[group].merge(Scatter.of(value[self.mask]))

    def end(self) -> None:
        super().end()
        self._kept.append((torch.tensor(self._index), self._where.cpu(), self._states))

    def kept(self) -> KeptStates:
        """What was kept so far, by this process."""
        scatter = None
        if self._scatter:
            fields = zip(*((each.count, each.mean, each.scatter) for each in self._scatter), strict=True)
            scatter = Scatter(*(torch.stack(each).cpu() for each in fields))
        about = (self.segment, self.iterations, self.layers, self._fit)
        return KeptStates(*about, scatter, *map(torch.cat, zip(*self._kept, strict=True)))

    def result(self, components: int = 3) -> Trajectories:
        """What was kept so far, by this process, in its first components."""
        return self.kept().project(components)


def trajectories(
    model: HookedLoopedTransformer,
    prompts: Any,
    *,
    components: int = 3,
    position: int = -1,
    layers: Sequence[Column] | None = None,
    fit: Fit = "joint",
    over: Over = "position",
    segment: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Trajectories:
    """Principal components of a token's states at every layer and iteration.

    The paper shows one prompt; of several, the states are one cloud.

    Args:
        components: How many to keep.
        position: The position whose trajectory is shown; below 0 from each prompt's end.
        layers: The layers, among them perhaps ``"state"`` (what leaves an iteration, behind a loop's norm);
            all layers by default.
        fit: ``"joint"`` fits one set of components to the states of all these layers, ``"layer"`` one to
            each layer's.
        over: What components are fitted to: the states at ``position`` alone, which are kept, or those of all
            ``"tokens"``, of which only mean and covariance [d_model d_model] are, in float64 (1 GB of
            them at a d_model of 11,000).

    Raises:
        ValueError: If the loop runs once only, a position or layer does not exist, or there are fewer
            directions than components.

    Source:
        arXiv 2604.11791, the PCA of all latent states of the last token of one prompt, by quartiles of
        recurrence; fits per layer and to all tokens are additions.

    Example:
        >>> found = loop_lens.dynamics.trajectories(model, prompt, progress=False)
        >>> [round(share, 2) for share in found.explained[0].tolist()]
        [0.56, 0.24, 0.11]
    """
    if fit not in ("joint", "layer") or over not in ("position", "tokens"):
        raise ValueError(
            f"fit={fit!r}, over={over!r} is unknown: fit is 'joint' or 'layer', over 'position' or 'tokens'"
        )
    probe = TrajectoriesProbe(model, position=position, layers=layers, segment=segment, fit=fit, over=over)
    measure(model, prompts, [probe], batch_size=batch_size, progress=progress, what="trajectories")
    return shared(probe.kept()).project(components)


def _fit(cloud: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, directions, variances and their shares of vectors [vector d_model]."""
    mean = cloud.mean(0)
    _, singular, axes = torch.linalg.svd(cloud - mean, full_matrices=False)
    return mean, *_leading(axes, singular**2, len(cloud), components)


def _fit_scatter(
    count: int, mean: Tensor, scatter: Tensor, components: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of vectors of which only mean and scatter are known."""
    values, vectors = torch.linalg.eigh(scatter)
    return mean, *_leading(vectors.flip(1).T, values.flip(0).clamp_min(0), count, components)


def _leading(axes: Tensor, squares: Tensor, count: int, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first directions, their largest entry positive, with variances and their shares of the whole."""
    most = min(count - 1, axes.shape[1])
    if not 1 <= components <= most:
        raise ValueError(
            f"components={components} is not between 1 and {most}: {count} states of {axes.shape[1]} numbers"
        )
    axes = axes[:components]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    variance = squares / (count - 1)
    share = variance / variance.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return axes * largest.sign(), variance[:components], share[:components]
