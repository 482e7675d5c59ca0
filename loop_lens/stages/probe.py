"""What attention and the stream do at every firing, measured while the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from loop_lens.measuring.moments import Collector
from loop_lens.measuring.probe import Probe
from loop_lens.measuring.processes import shared
from loop_lens.measuring.run import measure, schedule_of
from loop_lens.prompts.reader import Batch
from loop_lens.stages.mixing import attention_received, concentration_of, entropy_of, mixing_score, spectrum
from loop_lens.stages.result import Stages
from loop_lens.unrolling.sites import Site

ATTENTION = ("colsum_concentration", "sink_rate", "mixing_score")
STREAM = ("matrix_entropy", "relative_matrix_entropy", "anisotropy", "first_norm")
TOKENS = ("norm",)
HEADS = ("colsum_concentration", "sink", "mixing_score")


class StagesProbe(Probe):
    """Measures `Stages` in a run of `loop_lens.measuring.measure`.

    Args:
        model: A looped model, or any `TransformerBridge` of a causal language model.
        sink_tau: As in `stages`.
        sink_token: As in `stages`.
        patterns: Whether to measure attention, too.

    Raises:
        ValueError: If the sink's token is counted from the end.

    Example:
        >>> from loop_lens.measuring import measure
        >>> from loop_lens.stages import StagesProbe
        >>> probe = StagesProbe(model, patterns=False)
        >>> measure(model, prompts, [probe])
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
        if sink_token < 0:
            raise ValueError(
                f"sink_token counts from the start of the prompt: give 0 or more, not {sink_token}"
            )
        self.hooks = ("pattern", "resid_post") if patterns else ("resid_post",)
        self.tau, self.token = sink_tau, sink_token
        self._firings = tuple(schedule_of(model))
        self._n_heads = int(model.cfg.n_heads)
        pooled = ATTENTION if patterns else ()
        self._stream = slice(len(pooled), len(pooled) + len(STREAM))
        self._tokens = slice(self._stream.stop, self._stream.stop + len(TOKENS))
        axes = {"firing": [firing.prefix for firing in self._firings]}
        self._collector = Collector((*pooled, *STREAM, *TOKENS), axes)
        self._heads = Collector(HEADS, {**axes, "head": range(self._n_heads)}) if patterns else None

    def begin(self, batch: Batch, reference: Mapping[Site, Tensor]) -> None:
        """Start a batch.

        Raises:
            ValueError: If a prompt is of one token, or has no token to be the sink.
        """
        lengths = batch.lengths
        for index, length in zip(batch.index, lengths.tolist(), strict=True):
            if length < 2:
                raise ValueError(
                    f"prompt {index} has one token: attention over one position has no meaning, give prompts of "
                    "two tokens or more"
                )
            if length <= self.token:
                raise ValueError(
                    f"prompt {index} has {length} tokens, so sink_token={self.token} does not exist in it: "
                    f"choose 0-{length - 1}"
                )
        # Without padding there is nothing to mask, and no copy to make.
        self._mask = None if bool(batch.mask.all()) else batch.mask
        self._lengths = lengths
        self._later = batch.mask.clone()
        self._later[:, 0] = False
        for collector in self._collectors:
            collector.begin(len(batch.tokens), batch.tokens.device)

    def see(self, site: Site, value: Tensor) -> None:
        """Summarise a pattern or a stream."""
        summarise = self._see_pattern if site.short == "pattern" else self._see_stream
        summarise((site.fired_before,), value)

    def _see_pattern(self, cell: tuple[int], pattern: Tensor) -> None:
        if pattern.shape[1] != self._n_heads:
            raise ValueError(
                f"{self._firings[cell[0]].prefix} has {pattern.shape[1]} heads, not the model's {self._n_heads}: "
                "measure without attention (patterns=False)"
            )
        mask = None if self._mask is None else self._mask[:, None]
        received = attention_received(pattern, mask=mask)
        concentration = concentration_of(received, self._lengths[:, None])
        sink = received[..., self.token]
        mixing = mixing_score(pattern, mask=mask)
        heads = torch.stack([concentration, sink, mixing])
        rates = (sink >= self.tau).to(sink.dtype)
        pooled = torch.stack([concentration, rates, mixing]).mean(-1)
        self._collector.put(slice(0, len(ATTENTION)), cell, pooled)
        assert self._heads is not None, "without patterns, it sees none"
        self._heads.put(slice(None), cell, heads.transpose(1, 2))

    def _see_stream(self, cell: tuple[int], resid: Tensor) -> None:
        shares = spectrum(resid, mask=self._mask)
        entropy = entropy_of(shares)
        norms = torch.linalg.vector_norm(resid, dim=-1, dtype=torch.promote_types(resid.dtype, torch.float32))
        rank = self._lengths.clamp_max(resid.shape[-1]).double()
        self._collector.put(
            self._stream,
            cell,
            torch.stack([entropy, entropy / rank.log(), shares[..., -1], norms[:, 0].double()]),
        )
        self._collector.put(self._tokens, cell, norms.unsqueeze(0), self._later)

    @property
    def _collectors(self) -> list[Collector]:
        return [self._collector, *([] if self._heads is None else [self._heads])]

    def end(self) -> None:
        """Add the batch up."""
        for collector in self._collectors:
            collector.end()

    def result(self) -> Stages:
        """What was measured so far, by this process."""
        firings = tuple((f.segment, f.iteration, f.layer, f.block) for f in self._firings)
        heads = None if self._heads is None else self._heads.moments()
        return Stages(firings, self.tau, self.token, self._collector.moments(), heads)


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
        prompts: Texts, tokens or a dataset, of any lengths from two, see
            `loop_lens.prompts.read_prompts`.
        sink_tau: Mean attention from which a head counts as a sink.
        sink_token: Position of the token that may be the sink.
        patterns: Whether to measure attention, too.
        batch_size: Prompts a forward.
        progress: Whether to show a progress bar, for work beyond two seconds.

    Raises:
        ValueError: If there are no prompts, one has a single token, or the model has no patterns to see.
        DivergedError: If states become NaN or infinite; names the first firing.

    Example:
        >>> found = loop_lens.stages.stages(model, prompts)
        >>> [round(x, 2) for x in found.mean("sink_rate").tolist()[:3]]  # prelude, iteration 0
        [0.62, 0.38, 0.25]

    Source:
        arXiv 2604.11791, stages of inference. Concentration and mixing are of each head, then averaged.
    """
    probe = StagesProbe(model, sink_tau=sink_tau, sink_token=sink_token, patterns=patterns)
    measure(model, prompts, [probe], batch_size=batch_size, progress=progress, what="stages")
    return shared(probe.result())
