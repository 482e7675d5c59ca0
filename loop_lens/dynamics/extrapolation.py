"""What the model predicts after any number of iterations, and beyond those it was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.dynamics.converging import Convergence, ConvergenceProbe
from loop_lens.figures.canvas import new_figure
from loop_lens.figures.lines import draw_band
from loop_lens.lenses.coda import CodaLens
from loop_lens.lenses.readout import CHUNK
from loop_lens.measuring.moments import Collector, DivergedError, Measured, Moments
from loop_lens.measuring.probe import Probe
from loop_lens.measuring.processes import shared
from loop_lens.measuring.run import batches_shown, measure
from loop_lens.measuring.vectors import wide
from loop_lens.prompts.reader import Batch
from loop_lens.unrolling.sites import Site
from loop_lens.unrolling.tree import Iteration

METRICS = ("loss", "accuracy", "kl", "entropy", "agreement")
RECURRENCES = (1, 2, 4, 8, 16, 32, 64)
IGNORED = -100
_MOVES = ("norm", "step", "relative_step", "step_cosine")


@dataclass(frozen=True)
class Extrapolation(Measured):
    """What a model predicts after R iterations, for several R.

    Attributes:
        trained: The number of iterations that the model was made for; the reference of ``kl`` and ``agreement``.
        moments: Of each metric, over labelled tokens [recurrences].
        convergence: How the loop's own states move in the same run, None where every R needs a run of its own.

    Example:
        >>> found = loop_lens.dynamics.extrapolate(model, prompts, recurrences=(4, 8, 16), progress=False)
        >>> found.trained, found.to_dataframe().beyond.tolist()
        (8, [False, False, True])
        >>> figure = found.plot(("loss", "kl"))
    """

    trained: int
    moments: Moments
    convergence: Convergence | None

    @property
    def recurrences(self) -> tuple[int, ...]:
        """The numbers of iterations, in order."""
        return self.moments.axes["recurrences"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per R: each metric's mean and spreads, and how the loop's last layer moves in iteration R - 1.

        ``beyond`` says whether R is more than the model was made for.
        """
        table = self.moments.to_dataframe()
        table.insert(1, "beyond", [r > self.trained for r in self.recurrences])
        if self.convergence is not None:
            for metric in _MOVES:
                values = self.convergence.mean(metric)[:, -1]
                table[metric] = [float(values[r - 1]) for r in self.recurrences]
        return table

    def plot(self, metrics: Sequence[str] = ("loss", "accuracy", "kl")) -> Any:
        """One panel per metric against R (log scale), one prompt spread around it, the trained R marked; not shown."""
        figure, panels = new_figure(3.4 * len(metrics), 2.8, 1, len(metrics), squeeze=False)
        for axes, metric in zip(panels[0], metrics, strict=True):
            mean, spread = self.mean(metric), self.std(metric, over="prompts")
            draw_band(axes, self.recurrences, mean, mean - spread, mean + spread, marker="o", markersize=3)
            axes.axvline(self.trained, color="gray", linestyle=":", label=f"trained: {self.trained}")
            axes.set_xscale("log", base=2)
            axes.set_xticks(self.recurrences, [str(r) for r in self.recurrences], fontsize=7)
            axes.set(xlabel="iterations", ylabel=metric)
        panels[0][0].legend(fontsize=7)
        return figure


class ExtrapolationProbe(Probe):
    """Measures the predictions of `Extrapolation` in a run of `loop_lens.measuring.measure`.

    The model is at the largest R or the trained one, whichever is more; options are those of `extrapolate`.

    Example:
        >>> probe = loop_lens.dynamics.ExtrapolationProbe(model, recurrences=(2, 8), trained=8)
        >>> loop_lens.measuring.measure(model, prompts, [probe], progress=False)
        >>> probe.result().mean("agreement")[-1].item()  # with itself
        1.0
    """

    hooks = ("state_out",)

    def __init__(
        self, model: HookedLoopedTransformer, recurrences: Sequence[int], trained: int, labels: Any = None
    ) -> None:
        self._model, self._labels, self.trained = model, labels, trained
        self._at = {r: i for i, r in enumerate(recurrences)}
        self._collector = Collector(METRICS, {"recurrences": recurrences})
        self._loop = model.schedule.main_loop
        self._after: dict[Iteration, int] = {r - 1: r for r in (*recurrences, trained)}

    def wants(self, site: Site) -> bool:
        """The states after some numbers of iterations."""
        return site.segment == self._loop and site.iteration in self._after

    def begin(self, batch: Batch, reference: Mapping[Site, Tensor]) -> None:
        self._batch = batch
        self._right = _labels_of(batch, self._labels)
        self.mask = self._right != IGNORED
        self._collector.begin(len(batch.tokens), batch.tokens.device)
        self._pending: list[tuple[int, Tensor, Site]] = []
        self._reference: Tensor | None = None
        self.undefined = False

    def see(self, site: Site, value: Tensor) -> None:
        """Read a state out; those before the reference wait for it: they are small, their logits are not."""
        recurrences = self._after[site.iteration]
        if recurrences == self.trained:
            self.compare(recurrences, self._read(value, site))
            for earlier, kept, where in self._pending:
                self.compare(earlier, self._read(kept, where))
            self._pending = []
        elif self._reference is None:
            self._pending.append((recurrences, value.clone(), site))
        else:
            self.compare(recurrences, self._read(value, site))

    def _read(self, state: Tensor, at: Site) -> Float[Tensor, "token vocab"]:
        """Logits of the labelled positions, by the model's own end."""
        return CodaLens().read_at(state, self.mask, at, self._model)

    def compare(self, recurrences: int, logits: Float[Tensor, "token vocab"]) -> None:
        """Compare the logits of the labelled positions with the reference's, which come first."""
        if recurrences == self.trained:
            self._reference = wide(logits).log_softmax(-1)
            self.undefined = bool(self._reference.isnan().any())
        cell = self._at.get(recurrences)
        if cell is None:
            return
        assert self._reference is not None, "the reference is read first"
        values = _compared(logits, self._right[self.mask], self._reference)
        whole = values.new_zeros(len(METRICS), *self.mask.shape)
        whole[:, self.mask] = values
        self._collector.put(slice(None), (cell,), whole, self.mask)

    def end(self) -> None:
        self._pending, self._reference = [], None
        self._collector.end()

    def result(self, convergence: Convergence | None = None) -> Extrapolation:
        """What was measured so far, by this process; with what another probe measured of the states."""
        return Extrapolation(self.trained, self._collector.moments(), convergence)


def _compared(
    logits: Float[Tensor, "token vocab"],
    right: Int[Tensor, " token"],
    reference: Float[Tensor, "token vocab"],
) -> Float[Tensor, "metric token"]:
    """The metrics of `METRICS`, a few rows at a time."""
    metrics = torch.zeros(len(METRICS), len(logits), dtype=reference.dtype, device=logits.device)
    size = max(1, CHUNK // (4 * logits.shape[-1]))
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        logprobs, expected = wide(logits[rows]).log_softmax(-1), reference[rows]
        top = logprobs.argmax(-1)
        metrics[0, rows] = -logprobs.gather(-1, right[rows, None]).squeeze(-1)
        metrics[1, rows] = (top == right[rows]).to(metrics.dtype)
        # 0 log 0 is 0: a token that a logit of minus infinity rules out.
        metrics[2, rows] = (
            (expected.exp() * (expected - logprobs)).masked_fill(expected == -torch.inf, 0.0).sum(-1)
        )
        metrics[3, rows] = -(logprobs.exp() * logprobs).masked_fill(logprobs == -torch.inf, 0.0).sum(-1)
        metrics[4, rows] = (top == expected.argmax(-1)).to(metrics.dtype)
    metrics[2].clamp_min_(0)
    return metrics


def _labels_of(batch: Batch, labels: Any) -> Int[Tensor, "prompt pos"]:
    """What is to be said at each position; `IGNORED` where nothing counts."""
    right = torch.full_like(batch.tokens, IGNORED)
    lengths: list[int] = batch.lengths.tolist()
    for row, (prompt, length) in enumerate(zip(batch.index, lengths, strict=True)):
        if labels is None:
            if length < 2:
                raise ValueError(
                    f"prompt {prompt} has one token and so no next one to predict: give at least two, or labels="
                )
            right[row, : length - 1] = batch.tokens[row, 1:length]
            continue
        if prompt >= len(labels):
            raise ValueError(f"there are labels for {len(labels)} prompts, but prompt {prompt} has none")
        own = torch.as_tensor(labels[prompt])
        if own.ndim != 1 or len(own) < length or bool((own[length:] != IGNORED).any()):
            raise ValueError(
                f"the labels of prompt {prompt} are {tuple(own.shape)} for {length} tokens: give one a token, "
                f"{IGNORED} where none counts"
            )
        right[row, :length] = own[:length].to(right)
        if not bool((right[row] != IGNORED).any()):
            raise ValueError(f"prompt {prompt} has no label: give at least one that is not {IGNORED}")
    return right


@torch.no_grad()
def extrapolate(
    model: HookedLoopedTransformer,
    prompts: Any,
    *,
    recurrences: Sequence[int] = RECURRENCES,
    labels: Int[Tensor, "prompt pos"] | Sequence[Sequence[int]] | None = None,
    trained: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Extrapolation:
    """Measure what a model predicts, against the number of iterations.

    Per labelled token: ``loss``, the negative log probability of the right token in nats; ``accuracy``, whether it is
    the most likely one; ``entropy`` in nats; ``kl``, KL(trained || R) in nats, and ``agreement`` of the most likely
    token, to what the model says after its trained number of iterations. One run of the most iterations is read
    out after each R as the model itself would (by its coda, or its norm and unembedding), with one R's logits and
    the reference's in memory; `Convergence` of the loop's states comes from the same run. Under loopify's rules
    ``"euler"`` and ``"residual_scaled"``, whose iterations depend on R, each R is a run of its own.

    Args:
        recurrences: The numbers of iterations.
        labels: What is to be said at each of a prompt's own tokens, -100 where nothing counts: [prompt pos], or
            one sequence a prompt, in the prompts' order; behind the tokens, -100 alone. By
            default the prompt's own next token. (As for a loss on logits: already shifted, unlike what
            transformers takes.)
        trained: The number of iterations that the model was made for; by default the one it is set to.

    Raises:
        ValueError: If no R is above 1, a prompt has no token to predict, or labels do not fit.
        DivergedError: If states or what is said become NaN or infinite; names the first iteration or R.

    Source:
        Read-outs by the coda: arXiv 2507.02199; accuracy against iterations: arXiv 2502.05171 and 2510.25741.

    Example:
        >>> from loop_lens.dynamics import extrapolate
        >>> found = extrapolate(model, prompts, recurrences=(1, 2, 4, 8, 16), progress=False)
        >>> [round(share, 2) for share in found.mean("agreement").tolist()]  # with what it says after 8
        [0.5, 0.78, 0.89, 1.0, 1.0]
    """
    wanted = sorted(set(recurrences))
    for r in (*wanted, *([] if trained is None else [trained])):
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"recurrences must be whole numbers of at least 1, got {r!r}")
    if not wanted or wanted[-1] < 2:
        raise ValueError(f"recurrences={tuple(recurrences)} shows no trend: give at least one R of 2 or more")
    trained = model.recurrences if trained is None else trained
    every = sorted({*wanted, trained})
    probe = ExtrapolationProbe(model, wanted, trained, labels)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "what": "extrapolation"}
    moves = None
    try:
        if model.body.depends_on_times:
            _run_each(model, prompts, probe, [trained, *(r for r in every if r != trained)], **options)
        else:
            with model.at_recurrences(every[-1]):
                loop = model.schedule.main_loop
                segment = loop if loop in model.schedule.segments else None
                moves = ConvergenceProbe(model, patterns=False, segment=segment)
                # In this order, so that the iteration that diverged is named.
                measure(model, prompts, [moves, probe], **options)
    except DivergedError as error:
        if not probe.undefined:
            raise
        said = f"what is said after {trained} iterations is NaN, and everything is compared with it"
        raise DivergedError(f"{said}: {error}") from None
    return shared(probe.result(moves and moves.result()))


def _run_each(
    model: HookedLoopedTransformer,
    prompts: Any,
    probe: ExtrapolationProbe,
    recurrences: Sequence[int],
    **options: Any,
) -> None:
    """One forward per batch and R, the reference first."""
    for batch in batches_shown(model, prompts, **options):
        probe.begin(batch, {})
        for r in recurrences:
            with model.at_recurrences(r):
                logits: Any = model(batch.tokens)
            probe.compare(r, logits[probe.mask])
        probe.end()
