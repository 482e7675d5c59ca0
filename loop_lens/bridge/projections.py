"""Projections that transformer-lens splits, as parts of the fused ones that the model computes with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import (
    JointGateUpMLPBridge,
    JointQKVAttentionBridge,
)
from transformers.pytorch_utils import Conv1D

from loop_lens.models.native.attention import mix_in

_calls: ContextVar[dict[int, tuple[Tensor, int, Tensor]] | None] = ContextVar("calls", default=None)
"""Within one forward of a bridge: the input, its version and the output of each fused projection."""


class FusedPart(nn.Linear):
    """Some of a fused projection's outputs, where transformer-lens puts a linear module with copied weights.

    It calls the fused module, so that the model's own weights, adapters and hooks are what counts, and
    gradients are theirs. ``weight`` and ``bias`` are computed from the fused ones.

    Args:
        fused: The fused projection, an ``nn.Linear`` or ``Conv1D``.
        rows: The outputs that belong to this part.
    """

    rows: Tensor

    def __init__(self, fused: nn.Module, rows: Tensor) -> None:
        nn.Module.__init__(self)
        self._fused: tuple[Any] = (fused,)  # a tuple, so that its weights have no second name
        self.training = fused.training
        self.register_buffer("rows", rows, persistent=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The part's rows of the fused weights [out in]."""
        return _out_in(self._fused[0])[self.rows]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The part's share of the fused bias [out]."""
        bias = self._fused[0].bias
        return None if bias is None else bias[self.rows]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """How many outputs the part has."""
        return len(self.rows)

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """How many inputs the fused projection has."""
        return _out_in(self._fused[0]).shape[1]

    def forward(self, input: Tensor) -> Tensor:
        """The part's outputs [... out]."""
        (fused,), calls = self._fused, _calls.get()
        if calls is None or input.is_inference():
            out = fused(input)
        else:
            held = calls.get(id(fused))
            if held is None or held[0] is not input or held[1] != input._version:
                held = calls[id(fused)] = (input, input._version, fused(input))
            out = held[2]
        return out.index_select(-1, self.rows.to(out.device))

    def apart(self) -> nn.Linear:
        """A linear module that holds a copy of the part's weights."""
        weight, bias = self.weight, self.bias
        own: Any = nn.utils.skip_init(nn.Linear, *weight.T.shape, bias=bias is not None)
        own.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            own.bias = nn.Parameter(bias.detach().clone())
        return own

    @torch.no_grad()
    def write(self, own: nn.Linear) -> None:
        """Put such a module's weights into the fused projection."""
        fused = self._fused[0]
        _out_in(fused)[self.rows] = own.weight
        if own.bias is not None:
            if fused.bias is None:
                fused.bias = nn.Parameter(fused.weight.new_zeros(len(_out_in(fused))))
            fused.bias[self.rows] = own.bias


class _CallsOnce:
    """Over a bridge with a split projection: its parts share one call of the fused one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        token = _calls.set({})
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _calls.reset(token)


def fuse_projections(block: nn.Module) -> None:
    """Put parts of the fused projections where transformer-lens put copies of them."""
    for module in list(block.modules()):
        if isinstance(module, JointQKVAttentionBridge):
            _fuse(module, module.qkv, "qkv", module.split_qkv_matrix)
        elif isinstance(module, JointGateUpMLPBridge):
            fused = getattr(module.original_component, module.fused_attr)
            _fuse(module, fused, ("gate", "in"), module.split_gate_up_matrix)


def _fuse(owner: Any, fused: Any, names: Iterable[str], split: Any) -> None:
    if all(isinstance(_original(getattr(owner, part)), FusedPart) for part in names):
        return
    component = owner.original_component
    name = next(n for n, m in component.named_children() if m is fused)
    fused = getattr(fused, "original_component", fused)
    for part, rows in zip(names, _rows(component, name, fused, split), strict=True):
        getattr(owner, part).set_original_component(FusedPart(fused, rows))
    mix_in(owner, _CallsOnce)


def _rows(
    component: nn.Module, name: str, fused: nn.Module, split: Callable[[Any], Iterable[Any]]
) -> list[Tensor]:
    """Which outputs of a fused projection go to each part: what the split makes of their numbers."""
    shape: Any = fused.weight.shape  # type: ignore[union-attr]
    code = torch.arange(shape[-1] if _by_input(fused) else shape[0], dtype=torch.float32)
    numbered = nn.utils.skip_init(
        nn.Linear, 1, 1, bias=fused.bias is not None
    )  # whatever adapters are on the fused
    numbered.weight = nn.Parameter(code.expand(shape) if _by_input(fused) else code[:, None].expand(shape))
    if fused.bias is not None:
        numbered.bias = nn.Parameter(code)
    stand_in = copy.copy(component)
    stand_in._modules = {**component._modules, name: numbered}
    with torch.random.fork_rng(devices=[]):  # it initialises modules
        parts = list(split(stand_in))
    rows = [part.weight[:, 0].long() for part in parts]
    if any(
        not torch.equal(p.weight, r[:, None].expand_as(p.weight)) for p, r in zip(parts, rows, strict=True)
    ):
        raise ValueError(
            f"{type(component).__name__}.{name} is split into parts that are no choice of its outputs: gradients "
            "and adapters would not reach it; open the model with a bridge for its fused projection"
        )
    return rows


@contextmanager
def projections_apart(blocks: nn.Module) -> Generator[None, None, None]:
    """Let parts hold weights of their own in a context, which then become the fused projections'."""
    bridges: list[Any] = [m for m in blocks.modules() if isinstance(_original(m), FusedPart)]
    parts: list[FusedPart] = [bridge.original_component for bridge in bridges]
    for bridge, part in zip(bridges, parts, strict=True):
        bridge.set_original_component(part.apart())
    try:
        yield
        for bridge, part in zip(bridges, parts, strict=True):
            part.write(bridge.original_component)
    finally:
        for bridge, part in zip(bridges, parts, strict=True):
            bridge.set_original_component(part)


def _original(module: nn.Module) -> nn.Module | None:
    return module._modules.get("_original_component")


def _out_in(fused: Any) -> Tensor:
    return fused.weight.T if _by_input(fused) else fused.weight


def _by_input(fused: Any) -> bool:
    """Whether weights are [in out], also of a projection within an adapter of peft's."""
    return isinstance(getattr(fused, "base_layer", fused), Conv1D)
