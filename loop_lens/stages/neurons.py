"""Which MLP neurons raise or lower a few tokens' logits, from weights alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from loop_lens.figures.canvas import new_figure
from loop_lens.measuring.results import Result
from loop_lens.stages.directions import TOKENS, NormFold, neurons_of, token_directions


@dataclass(frozen=True)
class NeuronFractions(Result):
    """Prediction and suppression neurons of each physical block.

    Attributes:
        blocks: Segment and layer of each physical block.
        block: The physical block of each neuron [neuron].
        kurtosis: Of each neuron's effects on the vocabulary, 3 for a normal distribution [neuron]; NaN for
            one without any.
        skew: Of the same [neuron].
        threshold: The kurtosis above which a neuron counts.

    Example:
        >>> neurons = loop_lens.stages.prediction_neurons(model, threshold=4.0)
        >>> neurons.blocks
        (('prelude', 0), ('loop', 0), ('loop', 1), ('coda', 0))
        >>> neurons.prediction.round(decimals=2).tolist()  # of each block
        [0.0, 0.03, 0.06, 0.09]
    """

    blocks: tuple[tuple[str, int], ...]
    block: Tensor
    kurtosis: Tensor
    skew: Tensor
    threshold: float

    @property
    def is_prediction(self) -> Tensor:
        """Which neurons are prediction neurons [neuron]."""
        return (self.kurtosis > self.threshold) & (self.skew > 0)

    @property
    def is_suppression(self) -> Tensor:
        """Which neurons are suppression neurons [neuron]."""
        return (self.kurtosis > self.threshold) & (self.skew < 0)

    @property
    def sizes(self) -> Tensor:
        """Number of neurons of each block [block]."""
        return self._number(torch.ones_like(self.block, dtype=torch.bool))

    @property
    def prediction(self) -> Tensor:
        """Fraction of prediction neurons [block]."""
        return self._number(self.is_prediction).double() / self.sizes

    @property
    def suppression(self) -> Tensor:
        """Fraction of suppression neurons [block]."""
        return self._number(self.is_suppression).double() / self.sizes

    def _number(self, which: Tensor) -> Tensor:
        return torch.bincount(self.block[which], minlength=len(self.blocks))

    @property
    def percent(self) -> Tensor:
        """Depth of each block in % of the physical blocks [block]."""
        n = len(self.blocks)
        return 100 * torch.arange(1, n + 1, dtype=torch.float64) / n

    def to_dataframe(self) -> pd.DataFrame:
        """One row per physical block."""
        segments, layers = zip(*self.blocks, strict=True)
        return pd.DataFrame(
            {
                "block": range(len(self.blocks)),
                "segment": segments,
                "layer": layers,
                "percent": self.percent.tolist(),
                "neurons": self.sizes.tolist(),
                "prediction": self.prediction.tolist(),
                "suppression": self.suppression.tolist(),
            }
        )

    def neurons_to_dataframe(self) -> pd.DataFrame:
        """One row per neuron: block, place in its MLP, kurtosis, skew, kind."""
        first = self.sizes.cumsum(0) - self.sizes
        kind = pd.Series("other", index=range(len(self.block)))
        kind[self.is_prediction.numpy()] = "prediction"
        kind[self.is_suppression.numpy()] = "suppression"
        return pd.DataFrame(
            {
                "block": self.block.numpy(),
                "neuron": (torch.arange(len(self.block)) - first[self.block]).numpy(),
                "kurtosis": self.kurtosis.numpy(),
                "skew": self.skew.numpy(),
                "kind": kind,
            }
        )

    def plot(self, *, against: NeuronFractions | Mapping[str, NeuronFractions] | None = None) -> Any:
        """Both fractions against % of depth, references dashed over them, by name if several; a figure, not shown."""
        figure, axes = new_figure()
        references = {"reference": against} if isinstance(against, NeuronFractions) else dict(against or {})
        styles = ("--", ":", "-.")
        for k, (name, one) in enumerate([("", self), *references.items()]):
            style = "o-" if k == 0 else styles[(k - 1) % len(styles)]
            for color, what in (("C0", "prediction"), ("C3", "suppression")):
                label = f"{what} ({name})" if name else what
                axes.plot(one.percent, getattr(one, what), style, color=color, markersize=3, label=label)
        axes.set(xlabel="% of physical blocks", ylabel="fraction of neurons")
        axes.legend(fontsize=7)
        return figure


@torch.no_grad()
def prediction_neurons(
    model: TransformerBridge,
    *,
    threshold: float = 10.0,
    unit_tokens: bool = True,
    progress: bool = True,
) -> NeuronFractions:
    """Find, from weights alone, the neurons that raise or lower the logits of a few tokens.

    A neuron's effect on token v is u_v . w_out: w_out the neuron's row of the MLP's output matrix (gated
    or not), u_v the token's column of W_U. Into u_v go the final norm's weight and, if it is a layer norm,
    its centring; then u is centred over the vocabulary. A norm that the MLP's own output goes through
    (branch norms as in Ouro and OLMo 2, residual norms as in Huginn) is folded into w_out the same way.
    A neuron with kurtosis above ``threshold`` is a prediction neuron if its skew is positive, a suppression
    neuron if negative. Each physical block counts once, however often it fires. Later iterations and
    blocks, injections and loop norms are not followed: it is the direct effect.

    Args:
        model: A looped model, or any `TransformerBridge` whose blocks have an MLP.
        threshold: Pearson kurtosis (3 for a normal distribution) above which a neuron counts.
        unit_tokens: Whether u_v is scaled to unit norm, so that effects are cosines (as published); without,
            they are logits.

    Raises:
        ValueError: If a block has no MLP with output weights of its own, or weights are NaN or infinite.

    Example:
        >>> neurons = loop_lens.stages.prediction_neurons(model, threshold=4.0)
        >>> neurons.to_dataframe()[["segment", "layer", "neurons"]].values.tolist()[:2]
        [['prelude', 0, 128], ['loop', 0, 128]]

    Source:
        Gurnee et al. 2024, arXiv 2401.12181, section on prediction neurons; moments of cos(W_U, w_out),
        the threshold 10, and folding and centring (transformer-lens' defaults then) as in the authors'
        published code. Folding the MLP's own norm is ours: GPT-2 has none there.
    """
    blocks = neurons_of(model)
    norm = NormFold(model.ln_final, int(model.cfg.d_model), "the final norm")
    unembedding: Tensor = model.W_U.detach()
    n_tokens = unembedding.shape[1]
    sizes = torch.tensor([len(block.weight) for block in blocks])
    sums = [torch.zeros(3, n, dtype=torch.float64) for n in sizes.tolist()]
    work, parts = token_directions(unembedding, norm, unit_tokens), math.ceil(n_tokens / TOKENS)
    for tokens in tqdm(work, total=parts, desc="neurons", delay=2, disable=not progress, leave=False):
        for block, total in zip(blocks, sums, strict=True):
            for here, rows in block.directions():
                total[:, here] += _powers(rows @ tokens.to(rows.device).mT).cpu()
    second, third, fourth = (torch.cat(sums, -1) / n_tokens).unbind()
    if not bool(fourth.isfinite().all()):
        raise ValueError("the weights hold NaN or infinity: these neurons have no effects to count")
    owner = torch.repeat_interleave(torch.arange(len(blocks)), sizes)
    places = tuple(block.place for block in blocks)
    return NeuronFractions(places, owner, fourth / second**2, third / second**1.5, threshold)


def _powers(effects: Tensor) -> Tensor:
    """Sums of the second, third and fourth powers [power neuron] of effects [neuron token]."""
    squares = effects.square()
    powers = (squares, squares * effects, squares.square())
    return torch.stack([values.sum(-1, dtype=torch.float64) for values in powers])
