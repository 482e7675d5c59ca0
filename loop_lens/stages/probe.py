"""What attention and the stream do at every firing, measured while the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from loop_lens.dynamics.distances import require_two_tokens
from loop_lens.measuring.collecting import CollectingProbe, measured
from loop_lens.measuring.moments import Collector
from loop_lens.measuring.run import schedule_of
from loop_lens.measuring.vectors import lengths
from loop_lens.prompts.reader import Batch
from loop_lens.stages.mixing import attention_received, concentration_of, entropy_of, mixing_score, spectrum
from loop_lens.stages.result import Stages
from loop_lens.unrolling.numbers import whole
from loop_lens.unrolling.sites import Site

ATTENTION = ("colsum_concentration", "sink_rate", "mixing_score")
STREAM = ("matrix_entropy", "relative_matrix_entropy", "anisotropy", "first_norm", "norm")
HEADS = ("colsum_concentration", "sink", "mixing_score")


class StagesProbe(CollectingProbe[Stages]):
    """Measures `Stages` in a run of `loop_lens.measuring.measure`; options as in `stages`.

    Example:
        >>> probe = loop_lens.stages.StagesProbe(model, patterns=False)
        >>> loop_lens.measuring.measure(model, prompts, [probe])
        >>> probe.result().metrics
        ('matrix_entropy', 'relative_matrix_entropy', 'anisotropy', 'first_norm', 'norm')
    """

    def __init__(
        self,
        model: TransformerBridge,
        *,
        sink_tau: float = 0.3,
        sink_token: int = 0,
        patterns: bool = True,
    ) -> None:
        sink_token = whole(sink_token, "sink_token")
        if sink_token < 0:
            raise ValueError(
                f"sink_token counts from the start of the prompt: give 0 or more, not {sink_token}"
            )
        self.hooks = ("pattern", "resid_post") if patterns else ("resid_post",)
        self.tau, self.token = float(sink_tau), sink_token
        self._firings = tuple(schedule_of(model))
        self._n_heads = int(model.cfg.n_heads)
        axes = {"firing": [firing.prefix for firing in self._firings]}
        pooled = Collector((*(ATTENTION if patterns else ()), *STREAM), axes)
        heads = Collector(HEADS, {**axes, "head": range(self._n_heads)})
        self.collectors = (pooled, heads) if patterns else (pooled,)

    def begin(self, batch: Batch, reference: Mapping[Site, Tensor]) -> None:
        require_two_tokens(batch.lengths, batch.index)
        for index, length in zip(batch.index, batch.lengths.tolist(), strict=True):
            if length <= self.token:
                raise ValueError(
                    f"prompt {index} has {length} tokens, so sink_token={self.token} does not exist in it: "
                    f"choose 0-{length - 1}"
                )
        super().begin(batch, reference)
        # Without padding there is nothing to mask, and no copy to make.
        self._padded = None if bool(batch.mask.all()) else batch.mask
        self._lengths = batch.lengths
        self._later = batch.mask.clone()
        self._later[:, 0] = False

    def take(self, site: Site, value: Tensor) -> None:
        """Summarise a pattern or a stream."""
        summarise = self._take_pattern if site.short == "pattern" else self._take_stream
        summarise((site.fired_before,), value)

    def _take_pattern(self, cell: tuple[int], pattern: Tensor) -> None:
        if pattern.shape[1] != self._n_heads:
            raise ValueError(
                f"{self._firings[cell[0]].prefix} has {pattern.shape[1]} heads, not the model's {self._n_heads}: "
                "measure without attention (patterns=False)"
            )
        mask = None if self._padded is None else self._padded[:, None]
        received = attention_received(pattern, mask=mask)
        concentration = concentration_of(received, self._lengths[:, None])
        sink = received[..., self.token]
        mixing = mixing_score(pattern, mask=mask)
        rates = (sink >= self.tau).to(sink.dtype)
        pooled = (concentration.mean(-1), rates.mean(-1), mixing.mean(-1))
        self.put(cell, dict(zip(ATTENTION, pooled, strict=True)))
        heads = (concentration.T, sink.T, mixing.T)
        self.put(cell, dict(zip(HEADS, heads, strict=True)), to=self.collectors[1])

    def _take_stream(self, cell: tuple[int], resid: Tensor) -> None:
        shares = spectrum(resid, mask=self._padded)
        entropy, norms = entropy_of(shares), lengths(resid)
        rank = self._lengths.clamp_max(resid.shape[-1]).double()
        each = (entropy, entropy / rank.log(), shares[..., -1], norms[:, 0])
        self.put(cell, dict(zip(STREAM[:-1], each, strict=True)))
        self.put(cell, {"norm": norms}, self._later)

    def result(self) -> Stages:
        firings = tuple((f.segment, f.iteration, f.layer, f.block) for f in self._firings)
        pooled, *heads = (collector.moments() for collector in self.collectors)
        return Stages(firings, self.tau, self.token, pooled, heads[0] if heads else None)


def stages(
    model: TransformerBridge,
    prompts: Any,
    *,
    sink_tau: float = 0.3,
    sink_token: int = 0,
    patterns: bool = True,
    batch_size: int = 8,
    progress: bool = True,
) -> Stages:
    """Measure, while the model runs, which stage of inference each firing looks like.

    Per prompt, averaged over heads: ``colsum_concentration`` (ColSum, at each prompt's own length),
    ``sink_rate`` and ``mixing_score``. Per prompt: ``matrix_entropy`` of the stream's squared singular values in
    nats, ``relative_matrix_entropy`` (over the log of the largest possible rank, min(tokens, d_model)),
    ``anisotropy``, the share of the largest, and ``first_norm``, the first token's norm. Per token after the
    first: ``norm`` of the stream. The stream is each block's output. Nothing is kept from one firing to the
    next.

    Args:
        model: A looped model at the number of iterations to measure, or any `TransformerBridge` of a
            causal language model, whose layers then lie on the same axes.
        prompts: As for all measures of `loop_lens.dynamics`, like ``batch_size`` and ``progress``.
        sink_tau: Mean attention from which a head counts as a sink.
        sink_token: Position of the token that may be the sink.
        patterns: Whether to measure attention, too.

    Raises:
        ValueError: If a prompt has a single token, or the model has no patterns to see.
        DivergedError: If a value becomes NaN or infinite; names the first firing.

    Example:
        >>> found = loop_lens.stages.stages(model, prompts)
        >>> [round(x, 2) for x in found.mean("sink_rate").tolist()[:3]]  # prelude, iteration 0
        [0.62, 0.38, 0.25]

    Source:
        arXiv 2604.11791, stages of inference. Concentration and mixing are of each head, then averaged.
    """
    probe = StagesProbe(model, sink_tau=sink_tau, sink_token=sink_token, patterns=patterns)
    return measured(model, prompts, probe, batch_size=batch_size, progress=progress, what="stages")
