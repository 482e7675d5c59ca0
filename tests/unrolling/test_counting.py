"""A forward that is not what the schedule says is an error, on a model of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    UnembeddingBridge,
)

import loop_lens
from loop_lens import HookedLoopedTransformer
from loop_lens.unrolling import Blocks, FiringCountError, Loop, LoopBody, Schedule, Segments
from tests.oracles.unrolled import decoder

TOKENS = torch.tensor([[1, 2, 3]])


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Trunk(nn.Module):
    """Two blocks, called as ``block(x)``, three times; or otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.order = [0, 1] * 3
        self.site: Any = lambda name, value: value

    def forward(self, x: Tensor) -> Tensor:
        for step, i in enumerate(self.order):
            if step % 2 == 0:
                x = self.site(f"loop.{step // 2}.hook_state_in", x)
            x = self.layers[i](x)
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.trunk = nn.Embedding(11, 8), Trunk()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11)

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **options: Any
    ) -> Tensor:
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        return self.head(self.norm(self.trunk(x)))


class Adapter(ArchitectureAdapter):
    def __init__(self) -> None:
        sizes: dict[str, Any] = {"d_model": 8, "d_head": 8, "n_heads": 1, "n_layers": 6, "n_ctx": 16}
        super().__init__(TransformerBridgeConfig(d_vocab=11, architecture="Net", **sizes))
        mlp = MLPBridge(
            name="mlp", submodules={"in": LinearBridge(name="up"), "out": LinearBridge(name="down")}
        )
        norm = NormalizationBridge(name="norm", config=self.cfg)
        self.component_mapping = {
            "embed": EmbeddingBridge(name="embed"),
            "blocks": BlockBridge(name="trunk.layers", submodules={"ln1": norm, "mlp": mlp}),
            "ln_final": NormalizationBridge(name="norm", config=self.cfg),
            "unembed": UnembeddingBridge(name="head", config=self.cfg),
        }


class Body(LoopBody):
    block_path = "trunk.layers"

    def __init__(self, net: Net) -> None:
        core = Loop("loop", 3, Blocks("core", 2), sites=("hook_state_in", "hook_state_out"))
        super().__init__(net.trunk, list(net.trunk.layers), Schedule(Segments(core)))
        net.trunk.site = self.site


def own_model() -> tuple[HookedLoopedTransformer, Net]:
    """A model of one's own, opened."""
    torch.manual_seed(0)
    net = Net().eval()
    return loop_lens.wrap(net, body=Body(net), adapter=Adapter()), net


@torch.no_grad()
def test_a_block_called_with_the_stream_alone_returns_what_it_returns() -> None:
    model, net = own_model()
    expected = net(TOKENS)
    seen: list[Tensor] = []
    name = "loop.1.blocks.0.mlp.hook_out"
    logits = model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda value, hook: seen.append(value.clone()))])
    assert torch.equal(logits, expected)
    before = net.trunk.layers[1](net.trunk.layers[0](net.embed(TOKENS)))
    assert torch.equal(seen[0], net.trunk.layers[0].mlp(net.trunk.layers[0].norm(before)))


@torch.no_grad()
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(
    ("order", "says"),
    [
        ([0, 1] * 2, r"ended after 4 firings, and loop\.2\.blocks\.0 never ran"),
        ([0, 1] * 2 + [0], r"ended after 5 firings, and loop\.2\.blocks\.1 never ran"),
        ([], r"ended after 0 firings, and loop\.0\.blocks\.0 never ran"),
        ([1, 0] * 3, r"loop\.0\.blocks\.1 ran as number 0"),
        ([0, 0, 0, 1, 1, 1], r"loop\.1\.blocks\.0 ran as number 1"),
        ([0, 1] * 4, "block 0 was called more than 3 times"),
    ],
)
def test_a_forward_that_the_schedule_does_not_tell(order: list[int], says: str, hooked: bool) -> None:
    model, net = own_model()
    net.trunk.order = order
    hooks: list[Any] = [("loop.0.blocks.0.hook_resid_post", lambda value, hook: None)] if hooked else []
    with pytest.raises(FiringCountError, match=says):
        model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    net.trunk.order = [0, 1] * 3
    assert model(TOKENS).shape == (1, 3, 11)


@torch.no_grad()
def test_a_number_of_iterations_that_the_model_is_not_told() -> None:
    model, net = own_model()
    model.set_recurrences(5)
    with pytest.raises(FiringCountError, match="ended after 6 firings"):
        model(TOKENS)
    net.trunk.order = [0, 1] * 5
    assert model(TOKENS).shape == (1, 3, 11)


@torch.no_grad()
def test_a_forward_may_end_early_where_a_body_says_so() -> None:
    model, net = own_model()
    net.trunk.order = [0, 1] * 2
    model.body.may_end_early = True
    assert torch.equal(model(TOKENS), net(TOKENS))


@torch.no_grad()
def test_a_site_that_the_body_forgot() -> None:
    model, _ = own_model()
    assert model(TOKENS).shape == (1, 3, 11)
    for run in (model.run_with_cache, lambda tokens, names_filter: model.run_with_cache(tokens)):
        with pytest.raises(
            FiringCountError, match=r"loop\.\d\.hook_state_out has hooks, and the forward never"
        ):
            run(TOKENS, names_filter="loop.1.hook_state_out")
    _, cache = model.run_with_cache(TOKENS, names_filter="loop.1.hook_state_in")
    assert "loop.1.hook_state_in" in cache
    for start, stop in ((1, None), (None, 3), (2, 4)):
        stream = torch.randn(1, 3, 8)
        model.body.resume_at = lambda firing: firing
        model.run_with_hooks(
            TOKENS if start is None else stream,
            fwd_hooks=[("loop.0.hook_state_in", lambda value, hook: None)],
            start_at_layer=start,
            stop_at_layer=stop,
        )


@torch.no_grad()
@pytest.mark.parametrize("after", [2, 3])
def test_looping_what_loops_already(after: int) -> None:
    net = decoder("llama")
    layers = net.model.layers
    layers[after].register_forward_hook(
        lambda module, args, kwargs, out: layers[1](out, **kwargs), with_kwargs=True
    )
    model = loop_lens.loopify(net, layers=[1, 2], times=2)
    with pytest.raises(FiringCountError, match="layer 1 more than once in a forward: it loops already"):
        model(TOKENS)


def test_a_module_that_is_listed_twice() -> None:
    net = decoder("llama")
    net.model.layers[2] = net.model.layers[1]
    with pytest.raises(ValueError, match="stands twice in the list"):
        loop_lens.loopify(net, layers=[1, 2], times=2)
    assert net(TOKENS).logits.shape[1] == 3
