"""How many tokens settle, orbit or slide, at each layer and threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.dynamics.limits import LEAST, LIMIT_KINDS, Of, limiting_behaviour, several
from loop_lens.dynamics.states import Column, StateProbe, tidy
from loop_lens.figures.canvas import new_figure
from loop_lens.measuring.collecting import measured
from loop_lens.measuring.results import Result, merged
from loop_lens.measuring.tables import grid_table
from loop_lens.measuring.vectors import cosines, distances
from loop_lens.prompts.reader import Batch
from loop_lens.unrolling.sites import Site
from loop_lens.unrolling.tree import Iteration

_MOVING = LIMIT_KINDS[1:]
_COLUMNS = ("prompt", "position", "layer", "kind", "frequency", "amplitude", "gradient")


@dataclass(frozen=True)
class LimitTable(Result):
    """How many tokens behave in which way.

    Attributes:
        reference: Number of iterations whose last state the series are to; None where each n has its own.
        layers: The loop's layers, then ``"state"``: what leaves the iteration.
        counts: Tokens of each kind, in the order of `loop_lens.dynamics.LIMIT_KINDS` [n tau rho layer kind].
        sums: Sums over tokens of what describes their kind: the frequency and the amplitude of orbits, the
            gradient of sliders [n tau rho layer 3].
        moving: The tokens that are no fixed points at the first n, tau and rho, as columns, see `moving_tokens`;
            prompts keep their numbers when results merge.

    Example:
        >>> table = loop_lens.dynamics.limit_table(model, prompts, progress=False)
        >>> table.percent.shape  # n tau rho layer kind; the last layer is the state
        torch.Size([1, 1, 1, 3, 4])
        >>> table.moving_tokens().kind.value_counts().to_dict()
        {'slider': 54, 'orbit': 6}
    """

    segment: str
    of: Of
    reference: int | None
    layers: tuple[Column, ...]
    n: tuple[int, ...]
    tau: tuple[float, ...]
    rho: tuple[float, ...]
    counts: Tensor = merged("add")
    sums: Tensor = merged("add")
    moving: dict[str, Tensor] = merged("append")

    @property
    def percent(self) -> Tensor:
        """Share of tokens of each kind, in percent [n tau rho layer kind]."""
        return 100 * self.counts / self.counts.sum(-1, keepdim=True)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per n, tau, rho and layer (missing at the state): percent of tokens that are not fixed
        points, split by kind, and the means that describe orbits and sliders.
        """
        axes = {"n": self.n, "tau": self.tau, "rho": self.rho, "layer": self.layers}
        tokens, means = self.counts.sum(-1), self.sums / self.counts[..., [1, 1, 2]]
        columns = {"tokens": tokens, "not_fixed": 100 * (tokens - self.counts[..., 0]) / tokens}
        columns |= {kind: self.percent[..., 1 + k] for k, kind in enumerate(_MOVING)}
        described = ("orbit_frequency", "orbit_amplitude", "slider_gradient")
        columns |= {name: means[..., k] for k, name in enumerate(described)}
        return tidy(grid_table(axes, columns))

    def moving_tokens(self) -> pd.DataFrame:
        """One row per token and layer (missing at the state) that is no fixed point at the first thresholds."""
        columns = {name: column.tolist() for name, column in self.moving.items()}
        columns["layer"] = [self.layers[k] for k in columns["layer"]]
        columns["kind"] = [LIMIT_KINDS[k] for k in columns["kind"]]
        return tidy(pd.DataFrame(columns)).sort_values(["prompt", "position"], ignore_index=True)

    def plot(self) -> Any:
        """Percent of tokens that are not fixed points by layer, split by kind, one panel per n; at the first
        tau and rho. A figure, not shown.
        """
        figure, panels = new_figure(1 + 2.6 * len(self.n), 3.0, 1, len(self.n), squeeze=False, sharey=True)
        names = [str(layer) for layer in self.layers]
        for k, (n, axes) in enumerate(zip(self.n, panels[0], strict=True)):
            below = torch.zeros(len(names), dtype=torch.float64)
            for kind, share in zip(_MOVING, self.percent[k, 0, 0, :, 1:].T, strict=True):
                axes.bar(names, share.tolist(), bottom=below.tolist(), label=kind)
                below = below + share
            axes.set(xlabel="layer", title=f"{n} iterations", ylabel="" if k else "% of tokens")
        panels[0][0].legend(fontsize=7)
        return figure


class LimitTableProbe(StateProbe[LimitTable]):
    """Measures a `LimitTable` in a run of `loop_lens.measuring.measure`; options as in `limit_table`.

    It needs a reference run: to ``reference``, or to the number of iterations that is measured.

    Example:
        >>> probe = loop_lens.dynamics.LimitTableProbe(model, of="norm")
        >>> loop_lens.measuring.measure(model, prompts, [probe], reference=model.recurrences, progress=False)
        >>> int(probe.result().counts[0, 0, 0, 0].sum())  # tokens at layer 0
        20
    """

    def __init__(
        self,
        model: HookedLoopedTransformer,
        *,
        n: int | Sequence[int] | None = None,
        tau: float | Sequence[float] = 0.05,
        rho: float | Sequence[float] = 0.9,
        of: Of = "cosine",
        reference: int | None = None,
        segment: str | None = None,
    ) -> None:
        left_out = 1 if reference is None else 0
        what = f"limiting behaviour (a series of {LEAST} values{', the final one left out' * left_out})"
        super().__init__(model, segment=segment, least=LEAST + left_out, what=what)
        total = len(self.iterations)
        self.n = (total,) if n is None else (n,) if isinstance(n, int) else tuple(n)
        for each in self.n:
            if not LEAST + left_out <= each <= total:
                raise ValueError(
                    f"n={each} cannot be classified: {self.segment!r} runs {total} iterations, and {what} "
                    f"needs {LEAST + left_out} or more"
                )
        if reference is not None and reference < model.recurrences:
            raise ValueError(
                f"reference={reference} comes before the end of what is measured ({model.recurrences} iterations)"
            )
        if of not in ("cosine", "norm"):
            raise ValueError(f"of={of!r} is unknown: choose 'cosine' or 'norm'")
        self.tau, self.rho, self.reference = several(tau), several(rho), reference
        self.of: Of = of
        # Where the limits are: at the end of each n, or (None) of the reference run.
        self._final: list[Iteration] = [None] if reference else [self.iterations[each - 1] for each in self.n]
        shape = (len(self.n), len(self.tau), len(self.rho), len(self.columns))
        self._counts = torch.zeros(*shape, len(LIMIT_KINDS), dtype=torch.int64)
        self._sums = torch.zeros(*shape, 3, dtype=torch.float64)
        self._moving = [torch.zeros(len(_COLUMNS), 0, dtype=torch.float64)]

    def refers_to(self, site: Site, *, last: bool) -> bool:
        """The final states of each n, or of the reference."""
        return last if self.reference else site.iteration in self._final

    def begin(self, batch: Batch, reference: Mapping[Site, Tensor]) -> None:
        """Sort the final states by n and column."""
        super().begin(batch, reference)
        self._prompts = torch.tensor(batch.index, device=batch.tokens.device)
        self._limits = {
            (None if self.reference else site.iteration, self.column(site)): value
            for site, value in reference.items()
        }
        shape = (len(self._final), len(self.iterations), len(self.columns), *batch.tokens.shape)
        self._series = torch.zeros(shape, dtype=torch.float64, device=batch.tokens.device)

    def take(self, site: Site, value: Tensor) -> None:
        """Compare with the final states."""
        i, column = self.cell(site)
        compare = distances if self.of == "norm" else cosines
        for series, final in zip(self._series, self._final, strict=True):
            series[i, column] = compare(value, self._limits[final, column])

    def end(self) -> None:
        """Classify the batch's tokens; those for which a series means nothing are left out."""
        super().end()
        prompt, position = self.mask.nonzero(as_tuple=True)
        for a, n in enumerate(self.n):
            one, last = (self._series[0], n) if self.reference else (self._series[a], n - 1)
            values = one[:last, :, self.mask].permute(1, 2, 0)  # column token iteration
            real = ~values.isnan().any(-1)
            found = limiting_behaviour(values.nan_to_num(), self.tau, self.rho, of=self.of)
            kinds = torch.nn.functional.one_hot(found.code, len(LIMIT_KINDS)) * real[..., None]
            self._counts[a] += kinds.sum(-2).cpu()  # tau rho column kind
            orbits, sliders = kinds[..., 1].double(), kinds[..., 2].double()
            sums = (orbits * found.frequency, orbits * found.amplitude, sliders * found.gradient)
            self._sums[a] += torch.stack([each.sum(-1) for each in sums], -1).cpu()
            if a == 0:
                kind = found.code[0, 0]
                column, token = (kind * real).nonzero(as_tuple=True)
                describe = [
                    each[column, token] for each in (kind, found.frequency, found.amplitude, found.gradient)
                ]
                moving = (self._prompts[prompt[token]], position[token], column, *describe)
                self._moving.append(torch.stack([each.double() for each in moving]).cpu())
        self._limits = {}

    def result(self) -> LimitTable:
        moving: dict[str, Tensor] = dict(zip(_COLUMNS, torch.cat(self._moving, 1), strict=True))
        moving |= {name: moving[name].long() for name in _COLUMNS[:4]}
        about = (self.segment, self.of, self.reference, self.columns, self.n, self.tau, self.rho)
        return LimitTable(*about, self._counts.clone(), self._sums.clone(), moving)


def limit_table(
    model: HookedLoopedTransformer,
    prompts: Any,
    *,
    n: int | Sequence[int] | None = None,
    tau: float | Sequence[float] = 0.05,
    rho: float | Sequence[float] = 0.9,
    of: Of = "cosine",
    reference: int | None = None,
    segment: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> LimitTable:
    """Classify every token of every prompt at every layer, and the state that leaves each iteration.

    Each batch runs twice: first to the final states, then to compare with them. What is kept of an iteration are
    cosines, one number a token and layer.

    Args:
        n: Numbers of iterations, in firing order, e.g. ``(64, 128)``: what the first so many of this run say,
            the last of them being the limit. All that the model runs by default. (Under the rules of
            `loopify` that divide by R, a run of fewer iterations is another run.)
        tau: One tolerance, or several.
        rho: One share, or several; all combinations are counted.
        of: Whether series are of cosines to the final state or of norms of the difference from it.
        reference: Number of iterations whose last state is the limit for every n, at or beyond what is
            measured. Then nothing is left out of the series. None as in the paper: each n has its own last
            state, which is left out.

    Raises:
        ValueError: If an n is too small or not reached, or the reference comes before.

    Source:
        arXiv 2604.11791, Algorithm 1 and tables 3 and 4 (n = 128, tau = 0.05, rho = 0.9); the grid of n, tau
        and rho and the free reference are additions.

    Example:
        >>> with model.at_recurrences(32):
        ...     table = loop_lens.dynamics.limit_table(model, prompts, n=(16, 32), progress=False)
        >>> table.percent[:, 0, 0, -1, 0].tolist()  # fixed points among the states, in percent
        [55.0, 90.0]
    """
    probe = LimitTableProbe(model, n=n, tau=tau, rho=rho, of=of, reference=reference, segment=segment)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "what": "limiting behaviour"}
    return measured(model, prompts, probe, reference=reference or model.recurrences, **options)
