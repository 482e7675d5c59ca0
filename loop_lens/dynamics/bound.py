"""How far attention may move at most when the stream moves: Proposition 4.2, head by head.

Let X [pos d_in] be what enters a block's attention (behind the block's first norm, where it has one before
attention), S = s X W_Q W_K^T X^T the scores, with s the attention's own scale, 1 / sqrt(d_head) as a rule. For
inputs X and Y,

    S(X) - S(Y) = s (X - Y) W_Q (X W_K)^T + s Y W_Q ((X - Y) W_K)^T,

and softmax has a Lipschitz constant of L = 1/2 from scores to attention in the Euclidean norm of a row. A mask
leaves entries out, which only makes the left side smaller. Hence, for Frobenius norms,

    |A(X) - A(Y)| <= L 2 s B kappa |X - Y|.

Without rotary embeddings this holds with kappa = |W_Q W_K^T| and B the larger spectral norm of X and Y. With
them each row of X W_Q and X W_K is turned by its own angle, which keeps rows' norms but not the spectral norm
of the whole: it is proven with kappa = |W_Q| |W_K| and B the larger Frobenius norm. By rows, with total
variation on the left, |.|_inf <= 2 s B kappa max_j |x_j - y_j| for scores gives the same form with B the
longest token. Biases of queries and keys are rows of W for an input that is always 1.

Gradient ascent over inputs, weights and angles (2 to 16 tokens, heads of 2 and 4) reaches 0.85 to 0.98 of these
bounds and never more. As printed, with kappa = |W_Q W_K^T|, the bound is exceeded 200 times with rotary embeddings:
where queries and keys live in different halves of the turned planes, W_Q W_K^T is 0 and attention moves all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loop_lens.bridge.model import HookedLoopedTransformer
from loop_lens.dynamics.distances import frobenius_rows, require_two_tokens, total_variation
from loop_lens.dynamics.scores import head_norms
from loop_lens.dynamics.states import LoopMeasured, LoopProbe, named
from loop_lens.figures.lines import line_figure
from loop_lens.measuring.collecting import measured
from loop_lens.measuring.moments import Collector, Moments
from loop_lens.measuring.results import merged
from loop_lens.measuring.vectors import distances, lengths
from loop_lens.prompts.reader import Batch
from loop_lens.unrolling.sites import Site

LIPSCHITZ = 0.5
RATIOS = ("ratio", "stated_ratio", "row_ratio")
_METRICS = ("input_norm", "measured", "bound", "stated_bound", "row_measured", "row_bound", *RATIOS)
_UNTURNED = ("standard", "alibi", "none")  # positions that do not turn queries and keys


@dataclass(frozen=True)
class AttentionBound(LoopMeasured):
    """Attention's step and its bounds, per head.

    Attributes:
        rotary: Whether queries and keys are turned by rotary embeddings.
        kappa: |W_Q W_K^T| of each head, spectral [layer head].
        kappa_product: |W_Q| |W_K| of each head [layer head].
        moments: Of each metric, over prompts [iteration layer head].
        worst: The largest of each ratio over prompts [iteration layer head], by its name.

    Example:
        >>> bound = loop_lens.dynamics.attention_bound(model, prompts)
        >>> bound.holds(), bound.rotary
        (True, True)
        >>> round(bound.worst["ratio"][1:].max().item(), 3)  # no step is over 2% of what it may be
        0.018
    """

    segment: str
    rotary: bool
    kappa: Tensor
    kappa_product: Tensor
    moments: Moments
    worst: dict[str, Tensor] = merged("max")

    def holds(self, ratio: str = "ratio") -> bool:
        """Whether a bound held on every prompt, head, layer and iteration."""
        return bool((self._worst(ratio) <= 1).all())

    def _worst(self, ratio: str) -> Tensor:
        """The largest of a ratio over prompts, of each step [iteration layer head]."""
        if ratio not in RATIOS:
            raise ValueError(f"ratio {ratio!r} is unknown: there are {', '.join(RATIOS)}")
        return self.worst[ratio][1:]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per iteration, layer and head: each metric's mean and spreads, the worst ratios, kappas."""
        table = self.moments.to_dataframe()
        for name, value in self.worst.items():
            table[f"worst_{name}"] = value.flatten().tolist()
        for name in ("kappa", "kappa_product"):
            each = getattr(self, name).expand(len(self.iterations), -1, -1)
            table[name] = each.flatten().tolist()
        return table

    def plot(self, ratio: str = "ratio") -> Any:
        """The worst ratio of any head against the iteration, one line per layer; not shown."""
        worst = self._worst(ratio).amax(-1)
        return line_figure(
            {named(layer): values for layer, values in zip(self.layers, worst.T, strict=True)},
            ylabel=f"step / {ratio.replace('ratio', 'bound')}",
            at=range(1, len(worst) + 1),
            level=(1.0, "the bound"),
            log=True,
        )


class _Seen(NamedTuple):
    """A firing's attention: its pattern, its input, and the input's norms, see `_sizes`."""

    pattern: Tensor
    x: Tensor
    sizes: Tensor


class AttentionBoundProbe(LoopProbe[AttentionBound]):
    """Measures `AttentionBound` in a run of `loop_lens.measuring.measure`; options as in `attention_bound`.

    Example:
        >>> probe = loop_lens.dynamics.AttentionBoundProbe(model)
        >>> loop_lens.measuring.measure(model, prompts, [probe])
        >>> probe.result().kappa.shape  # layer head
        torch.Size([2, 4])
    """

    hooks = ("attn.hook_in", "pattern")

    def __init__(self, model: HookedLoopedTransformer, *, segment: str | None = None) -> None:
        super().__init__(model, segment=segment, least=2, what="the bound")
        first = [f for f in model.schedule if f.segment == self.segment and f.iteration == self.iterations[0]]
        self._norms = [head_norms(getattr(model.blocks[f.index], "attn", None)) for f in first]
        self.rotary = getattr(model.cfg, "positional_embedding_type", None) not in _UNTURNED
        # Rotary embeddings made for longer contexts also stretch what they turn.
        stretches = [float(getattr(m, "attention_scaling", 1.0)) for m in model.original_model.modules()]
        factor = max(stretches) ** 2 if self.rotary else 1.0
        self.kappa = torch.stack([norms.kappa for norms in self._norms]) * factor
        self.kappa_product = torch.stack([norms.product for norms in self._norms]) * factor
        self._heads = self.kappa.shape[1]
        axes = {"iteration": self.iterations, "layer": range(self.n_layers), "head": range(self._heads)}
        self.collectors = (Collector(_METRICS, axes),)
        shape = (len(self.iterations), self.n_layers, self._heads)
        self.worst = {name: torch.full(shape, float("nan"), dtype=torch.float64) for name in RATIOS}

    def begin(self, batch: Batch, reference: Mapping[Site, Tensor]) -> None:
        require_two_tokens(batch.lengths, batch.index)
        super().begin(batch, reference)
        self._inputs: dict[int, Tensor] = {}

    def take(self, site: Site, value: Tensor) -> None:
        """Note the input; at the pattern, compare with the iteration before."""
        cell = _, layer = self.cell(site)
        if site.short != "pattern":
            self._inputs[layer] = value.masked_fill(~self.mask.unsqueeze(-1), 0.0)
            return
        x = self._inputs.pop(layer)
        seen = _Seen(value, x, self._sizes(x, self._norms[layer].biased))
        self.put(cell, {"input_norm": seen.sizes[1].expand(self._heads, -1)})
        if layer in self.before:
            self._compare(cell, seen, self.before[layer])
        self.before[layer] = seen

    def _sizes(self, x: Tensor, biased: bool) -> Float[Tensor, "3 prompt"]:
        """Spectral norm, Frobenius norm and longest token of each prompt's input."""
        wide = x.double()
        if biased:
            wide = torch.cat([wide, self.mask.unsqueeze(-1).double()], dim=-1)
        gram = wide @ wide.mT if wide.shape[1] < wide.shape[2] else wide.mT @ wide
        # NaN, which it cannot take, is reported when the batch is over.
        spectral = torch.linalg.eigvalsh(gram.nan_to_num(0.0, 0.0, 0.0))[:, -1].clamp_min(0).sqrt()
        rows = lengths(wide)
        return torch.stack([spectral, lengths(rows), rows.amax(-1)])

    def _compare(self, cell: tuple[int, int], now: _Seen, before: _Seen) -> None:
        layer, device = cell[1], now.x.device
        gaps = distances(now.x, before.x)
        spectral, frobenius, longest = torch.maximum(now.sizes, before.sizes)
        kappa, product = self.kappa[layer].to(device), self.kappa_product[layer].to(device)
        proven_kappa, proven_size = (product, frobenius) if self.rotary else (kappa, spectral)
        factor = LIPSCHITZ * 2 * self._norms[layer].scale
        gap = factor * lengths(gaps)
        bound = proven_kappa[:, None] * proven_size * gap
        stated = kappa[:, None] * spectral * gap
        by_row = proven_kappa[:, None] * longest * factor * gaps.amax(-1)
        padding = ~self.mask[:, None]
        moved = frobenius_rows(now.pattern, before.pattern).masked_fill(padding, 0.0)
        step = lengths(moved).T
        shifted = total_variation(now.pattern, before.pattern).masked_fill(padding, 0.0)
        rows = shifted.amax(-1).T.double()
        # Rounding moves attention even where nothing else does, and no bound on exact numbers allows for it.
        eps = torch.finfo(now.pattern.dtype).eps
        floor = eps * lengths(lengths(now.pattern).masked_fill(padding, 0.0)).T
        ratios = {
            "ratio": step / torch.maximum(bound, floor),
            "stated_ratio": step / torch.maximum(stated, floor),
            "row_ratio": rows / by_row.clamp_min(eps),
        }
        bounds = {"measured": step, "bound": bound, "stated_bound": stated}
        self.put(cell, {**bounds, "row_measured": rows, "row_bound": by_row, **ratios})
        for name, ratio in ratios.items():
            place = self.worst[name][cell]
            place.copy_(torch.fmax(place, ratio.amax(-1).cpu()))

    def result(self) -> AttentionBound:
        worst = {name: value.clone() for name, value in self.worst.items()}
        about = (self.segment, self.rotary, self.kappa, self.kappa_product)
        return AttentionBound(*about, self.collectors[0].moments(), worst)


def attention_bound(
    model: HookedLoopedTransformer,
    prompts: Any,
    *,
    segment: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> AttentionBound:
    """Measure each head's step against what Proposition 4.2 allows; see the module for the proof.

    Per head, layer and iteration:

    - ``input_norm``: the input's Frobenius norm;
    - ``measured``, ``bound``: the Frobenius norm of the pattern's step, and what is proven for the model at hand;
    - ``stated_bound``: as printed, with kappa = |W_Q W_K^T| and B the spectral norm of the input; proven without
      rotary embeddings only, where it is ``bound``;
    - ``row_measured``, ``row_bound``: the largest total variation of a query, and what it may be;
    - ``ratio``, ``stated_ratio``, ``row_ratio``: measured / bound, where a bound below the rounding of the pattern
      counts as that rounding (in narrow dtypes the scores' own rounding can exceed it).

    The input is what enters the attention's projections (``attn.hook_in``): behind the block's first norm where the
    family norms before attention, the stream itself where it norms the branch alone.

    Raises:
        ValueError: If the model norms queries and keys or its attention is not bilinear in its input, as the bound
            supposes; if a prompt has one token, there are fewer than two iterations, or no attention patterns.

    Example:
        >>> bound = loop_lens.dynamics.attention_bound(model, prompts)
        >>> bool((bound.mean("measured")[1:] < bound.mean("bound")[1:]).all())
        True

    Source:
        arXiv 2604.11791, Proposition 4.2, which is stated for X the stream and does not treat norms, rotary
        embeddings or biases; these are added here.
    """
    probe = AttentionBoundProbe(model, segment=segment)
    return measured(model, prompts, probe, batch_size=batch_size, progress=progress, what="attention bound")
