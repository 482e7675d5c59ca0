"""What torch's walks see of a looped model: what they see of an ordinary bridge, each weight once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loop_lens
from tests.oracles.twin import small_looped
from tests.oracles.unrolled import decoder

TOKENS = torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(1))


class Probe(nn.Module):
    """A user's own module around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(2, 2)


@pytest.fixture(params=["native", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    if request.param == "native":
        return loop_lens.wrap(small_looped())
    return loop_lens.loopify(decoder(request.param), layers=range(2, 4), times=3)


def by_block(model: Any, keys: list[str]) -> list[str]:
    """Names with the indices of first firings turned into those of physical blocks."""
    return [
        re.sub(r"blocks\.(\d+)", lambda m: f"blocks.{model.schedule[int(m[1])].block}", key) for key in keys
    ]


def test_an_optimizer_of_a_users_own_module_has_every_weight_once(model: Any) -> None:
    walked = [id(p) for p in Probe(model).parameters()]
    assert {id(p) for p in model.original_model.parameters()} <= set(walked)
    assert len(walked) == len(set(walked))


@pytest.mark.parametrize("model", ["native", "llama"], indirect=True)
@pytest.mark.parametrize("walk", ["named_parameters", "named_buffers", "named_modules", "state_dict"])
def test_names_are_those_of_an_ordinary_bridge_over_the_physical_blocks(model: Any, walk: str) -> None:
    def names() -> list[str]:
        walked = getattr(nn.Module, walk)(model, prefix="model." if walk == "state_dict" else "model")
        return [name if isinstance(name, str) else name[0] for name in walked]

    with model.firings.physical_view():
        ordinary = names()
    assert by_block(model, names()) == ordinary
    model.run_with_cache(TOKENS)
    assert by_block(model, names()) == ordinary  # however many firings were opened


def test_every_firing_is_found_by_its_name(model: Any) -> None:
    for firing in model.schedule:
        assert model.get_submodule(f"blocks.{firing.index}.attn") is model.blocks[firing.index].attn
    with pytest.raises(AttributeError):
        model.get_submodule(f"blocks.{len(model.schedule)}.attn")
    for name, module in model.named_modules():
        assert model.get_submodule(name) is module


MOVES: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Tensor], bool]]] = {
    "half": (nn.Module.half, lambda p: p.dtype == torch.float16),
    "bfloat16": (nn.Module.bfloat16, lambda p: p.dtype == torch.bfloat16),
    "double": (nn.Module.double, lambda p: p.dtype == torch.float64),
    "share_memory": (nn.Module.share_memory, Tensor.is_shared),
    "requires_grad_": (lambda m: m.requires_grad_(False), lambda p: not p.requires_grad),
    "apply": (lambda m: m.apply(zero), lambda p: not p.any()),
}


def zero(module: nn.Module) -> None:
    """Set a module's own parameters to 0."""
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data.zero_()


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("part", ["model", "blocks"])
def test_moves_reach_every_weight(model: Any, move: str, part: str) -> None:
    act, done = MOVES[move]
    act(Probe(model) if part == "model" else model.blocks)
    blocks = [p for block in model.body.blocks for p in block.parameters()]
    assert blocks and all(map(done, blocks if part == "blocks" else model.original_model.parameters()))


def test_the_state_of_a_users_own_module_loads_into_another(model: Any) -> None:
    expected = model(TOKENS)
    state = {key: value.clone() for key, value in Probe(model).state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(model(TOKENS), expected)
    Probe(model).load_state_dict(state)
    assert torch.equal(model(TOKENS), expected)
    assert torch.allclose(model.run_with_cache(TOKENS)[0], expected, atol=1e-5)
