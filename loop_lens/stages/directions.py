"""Neurons' and tokens' directions in the residual stream, read off the weights, with norms folded in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from loop_lens.measuring.run import schedule_of

TOKENS = 4096  # of the vocabulary at a time
NEURONS = 2048  # so that a block of effects has 32 MiB
_AFTER_MLP = ("ln2_post", "ln2_resid")  # norms that the MLP's output goes through within its block


def _unit(rows: Tensor) -> Tensor:
    """Rows of unit length; zeros stay zeros."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


class BlockNeurons(NamedTuple):
    """A physical block's neurons: segment and layer, output weights [neuron d_model], and the norms behind them."""

    place: tuple[str, int]
    weight: Tensor
    folds: list[NormFold]

    def directions(self) -> Iterator[tuple[slice, Tensor]]:
        """Some thousand neurons at a time, as unit directions into the stream [neuron d_model] in float32."""
        for start in range(0, len(self.weight), NEURONS):
            here = slice(start, start + NEURONS)
            rows = self.weight[here].float()
            for fold in self.folds:
                rows = fold.apply(rows)
            # Moments are of standardised effects: the scale is free, and unit rows keep powers in range.
            yield here, _unit(rows)


def neurons_of(model: TransformerBridge) -> list[BlockNeurons]:
    """The neurons of each physical block."""
    schedule = schedule_of(model)
    blocks: list[BlockNeurons] = []
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
        parts, width = dict(block.named_children()), weight.shape[1]
        folds = [NormFold(parts[n], width, f"{firing.prefix}'s {n}") for n in _AFTER_MLP if n in parts]
        blocks.append(BlockNeurons((firing.segment, firing.layer), weight, folds))
    return blocks


class NormFold:
    """A norm as a linear map of directions, read off its output: its centring, if it has one, and its weights."""

    def __init__(self, norm: Any, d_model: int, name: str) -> None:
        norm = getattr(norm, "original_component", None) or norm
        like = next(iter(norm.parameters()), torch.zeros(0))
        probe = torch.ones(1, 1, d_model, dtype=torch.float32, device=like.device)
        probe[..., 1::2] = -1
        probe -= probe.mean()
        probe /= probe.square().mean().sqrt()

        def odd(x: Tensor) -> Tensor:
            """Half of the difference between the outputs of x and -x, which is free of biases."""
            out: list[Tensor] = [norm(each.to(like.dtype)).float().flatten() for each in (x, -x)]
            return (out[0] - out[1]) / 2

        self.weight = odd(probe) / probe.flatten()
        self.centres = float(odd(torch.ones_like(probe)).norm()) < 1e-3 * float(self.weight.norm())
        if not bool(self.weight.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity: these neurons have no effects to count")

    def apply(self, directions: Tensor) -> Tensor:
        """Directions [... d_model] behind the norm, up to the norm's scale."""
        return self._centred(directions) * self.weight

    def read(self, readers: Tensor) -> Tensor:
        """Readers [... d_model] of what is behind the norm as readers of what is before it."""
        return self._centred(readers * self.weight)

    def _centred(self, rows: Tensor) -> Tensor:
        return rows - rows.mean(-1, keepdim=True) if self.centres else rows


def token_directions(weight: Tensor, norm: NormFold, unit: bool) -> Iterator[Tensor]:
    """Tokens' directions in W_U, some thousand at a time [token d_model]: folded, centred, and if they are to be of
    unit length, scaled and centred again.
    """
    n = weight.shape[1]

    def folded() -> Iterator[Tensor]:
        for start in range(0, n, TOKENS):
            yield norm.read(weight[:, start : start + TOKENS].float().mT)

    def mean(parts: Iterator[Tensor]) -> Tensor:
        total = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
        for part in parts:
            total += part.sum(0, dtype=torch.float64)
        return (total / n).float()

    shift = mean(folded())
    if not unit:
        yield from (tokens - shift for tokens in folded())
        return
    centre = mean(_unit(tokens - shift) for tokens in folded())
    yield from (_unit(tokens - shift) - centre for tokens in folded())
