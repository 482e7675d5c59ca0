"""Which MLP neurons raise or lower a few tokens' logits, from weights alone."""

from __future__ import annotations

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
from loop_lens.measuring.run import schedule_of

_TOKENS = 4096  # of the vocabulary at a time
_NEURONS = 2048  # so that a block of effects has 32 MiB
_AFTER_MLP = ("ln2_post", "ln2_resid")  # norms that the MLP's output goes through within its block


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
        return torch.bincount(self.block, minlength=len(self.blocks))

    def _fraction(self, which: Tensor) -> Tensor:
        return torch.bincount(self.block[which], minlength=len(self.blocks)).double() / self.sizes

    @property
    def prediction(self) -> Tensor:
        """Fraction of prediction neurons [block]."""
        return self._fraction(self.is_prediction)

    @property
    def suppression(self) -> Tensor:
        """Fraction of suppression neurons [block]."""
        return self._fraction(self.is_suppression)

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
        """Both fractions against % of depth; a figure, not shown.

        Args:
            against: References to draw dashed over them, by name if several.
        """
        figure, axes = new_figure(6, 3.2)
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

    The vocabulary passes in float32, some thousand tokens and neurons at a time; moments add up in
    float64.

    Args:
        model: A looped model, or any `TransformerBridge` whose blocks have an MLP.
        threshold: Pearson kurtosis (3 for a normal distribution) above which a neuron counts.
        unit_tokens: Whether u_v is scaled to unit norm, so that effects are cosines (as published); without,
            they are logits.
        progress: Whether to show a progress bar, for work beyond two seconds.

    Raises:
        ValueError: If a block has no MLP with output weights of its own, or weights are NaN or infinite.

    Source:
        Gurnee et al. 2024, arXiv 2401.12181, section on prediction neurons; moments of cos(W_U, w_out),
        the threshold 10, and folding and centring (transformer-lens' defaults then) as in the authors'
        published code. Folding the MLP's own norm is ours: GPT-2 has none there.
    """
    blocks, weights = _neurons(model)
    norm = _Fold(model.ln_final, int(model.cfg.d_model), "the final norm")
    unembedding = _Unembedding(model.W_U.detach(), norm, unit_tokens)
    sums = [torch.zeros(3, len(w), dtype=torch.float64) for w in weights]
    steps = len(unembedding) * sum(-(-len(w) // _NEURONS) for w in weights)
    with tqdm(total=steps, desc="neurons", delay=2, disable=not progress, leave=False) as bar:
        for tokens in unembedding:
            for w, total in zip(weights, sums, strict=True):
                for start in range(0, len(w), _NEURONS):
                    here = slice(start, start + _NEURONS)
                    rows = w.rows(here)
                    total[:, here] += _powers(rows @ tokens.to(rows.device).mT).cpu()
                    bar.update()
    second, third, fourth = (torch.cat(sums, -1) / unembedding.size).unbind()
    if not bool(fourth.isfinite().all()):
        raise ValueError("the weights hold NaN or infinity: these neurons have no effects to count")
    owner = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor([len(w) for w in weights]))
    return NeuronFractions(blocks, owner, fourth / second**2, third / second**1.5, threshold)


def _powers(effects: Tensor) -> Tensor:
    """Sums of the second, third and fourth powers [power neuron] of effects [neuron token]."""
    squares = effects.square()
    found = (squares, squares * effects, squares.square())
    return torch.stack([values.sum(-1, dtype=torch.float64) for values in found])


class _Neurons:
    """A block's neurons as unit directions into the stream, some thousand at a time.

    Args:
        weight: The MLP's output weights [neuron d_model].
        folds: Norms that the MLP's output goes through within its block.
    """

    def __init__(self, weight: Tensor, folds: list[_Fold]) -> None:
        self._weight, self._folds = weight, folds

    def __len__(self) -> int:
        return len(self._weight)

    def rows(self, here: slice) -> Tensor:
        """Unit directions [neuron d_model] in float32."""
        rows = self._weight[here].float()
        for fold in self._folds:
            rows = fold.apply(rows)
        # Moments are of the standardised effects: the scale is free, and unit rows keep powers in range.
        return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _neurons(model: TransformerBridge) -> tuple[tuple[tuple[str, int], ...], list[_Neurons]]:
    """The physical blocks, and the neurons of each.

    Raises:
        ValueError: If a block has no MLP with output weights of its own.
    """
    schedule = schedule_of(model)
    blocks: list[tuple[str, int]] = []
    neurons: list[_Neurons] = []
    for visits in schedule.visits:
        firing = schedule[visits[0]]
        block: Any = model.blocks[firing.index]
        try:
            weight: Tensor = block.mlp.W_out.detach()
        except AttributeError:
            weight = torch.empty(0)
        if weight.ndim != 2:
            raise ValueError(
                f"{firing.prefix} has no MLP with output weights [d_mlp d_model], so it has no neurons to count"
            )
        parts = dict(block.named_children())
        width = weight.shape[1]
        folds = [_Fold(parts[n], width, f"{firing.prefix}'s {n}") for n in _AFTER_MLP if n in parts]
        blocks.append((firing.segment, firing.layer))
        neurons.append(_Neurons(weight, folds))
    return tuple(blocks), neurons


class _Fold:
    """A norm as a linear map of directions: its centring, if it has one, and its weights.

    Read off the norm's own output on two streams, whatever it calls its weights.
    """

    def __init__(self, norm: Any, d_model: int, name: str) -> None:
        norm = getattr(norm, "original_component", None) or norm
        like = next(iter(norm.parameters()), torch.zeros(0))
        probe = torch.ones(1, 1, d_model, dtype=torch.float32, device=like.device)
        probe[..., 1::2] = -1
        probe -= probe.mean()
        probe /= probe.square().mean().sqrt()
        dtype = like.dtype

        def run(x: Tensor) -> Tensor:
            out: Tensor = norm(x.to(dtype))
            return out.float().flatten()

        # Half of the difference between x and -x is free of biases.
        self.weight = (run(probe) - run(-probe)) / 2 / probe.flatten()
        even = (run(torch.ones_like(probe)) - run(-torch.ones_like(probe))) / 2
        self.centres = float(even.norm()) < 1e-3 * float(self.weight.norm())
        if not bool(self.weight.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity: these neurons have no effects to count")

    def apply(self, directions: Tensor) -> Tensor:
        """Directions [... d_model] behind the norm, up to the norm's scale."""
        if self.centres:
            directions = directions - directions.mean(-1, keepdim=True)
        return directions * self.weight

    def read(self, readers: Tensor) -> Tensor:
        """Readers [... d_model] of what is behind the norm as readers of what is before it."""
        readers = readers * self.weight
        return readers - readers.mean(-1, keepdim=True) if self.centres else readers


class _Unembedding:
    """Tokens' directions, some thousand at a time [token d_model]: folded, centred, scaled, centred again.

    Args:
        weight: W_U [d_model d_vocab].
        norm: The final norm.
        unit: Whether to scale each token to unit norm.
    """

    def __init__(self, weight: Tensor, norm: _Fold, unit: bool) -> None:
        self._weight, self._norm, self._unit = weight, norm, unit
        self.size = weight.shape[1]
        self._shift = torch.zeros(weight.shape[0], device=weight.device)
        self._shift = self._mean(self._folded)
        self._centre = self._mean(self._scaled) if unit else torch.zeros_like(self._shift)

    def __len__(self) -> int:
        return -(-self.size // _TOKENS)

    def __iter__(self) -> Any:
        for start in range(0, self.size, _TOKENS):
            yield self._scaled(start) - self._centre

    def _folded(self, start: int) -> Tensor:
        tokens = self._weight[:, start : start + _TOKENS].float().mT
        return self._norm.read(tokens)

    def _scaled(self, start: int) -> Tensor:
        tokens = self._folded(start) - self._shift
        if self._unit:
            tokens = tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return tokens

    def _mean(self, tokens: Any) -> Tensor:
        total = torch.zeros_like(self._shift, dtype=torch.float64)
        for start in range(0, self.size, _TOKENS):
            total += tokens(start).sum(0, dtype=torch.float64)
        return (total / self.size).float()
