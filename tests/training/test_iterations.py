"""What the native model gives to training: readouts of every iteration, and where gradients stop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import loop_lens
from loop_lens import LoopedTransformer
from loop_lens.training.trainer import checkpoint_blocks
from tests.training.toy import tiny

IDS = torch.tensor([[1, 2, 3, 4, 5], [0, 6, 2, 2, 1]])
SHAPES: list[dict[str, Any]] = [
    {},
    {"loop_norm": True, "coda_layers": 0, "prelude_layers": 0, "injection": "none", "exit_gate": True},
    {"post_loop_norm": True, "block_norm": "post_residual"},
    {"loop_norm": True, "state_projection": True, "logit_scale": 0.5, "injection": "diagonal"},
]


@pytest.mark.parametrize("fields", SHAPES)
def test_one_forward_reads_every_iteration_as_separate_forwards_do(fields: dict[str, Any]) -> None:
    model = tiny(initializer_range=0.4, **fields).eval()
    found = model(IDS, use_cache=False, read_iterations=True).iteration_logits
    for t in range(3):
        model.config.recurrences = t + 1
        torch.testing.assert_close(found[t], model(IDS).logits, atol=2e-5, rtol=1e-5)


def test_padding_is_masked_in_every_iteration_s_readout() -> None:
    model = tiny(initializer_range=0.4).eval()
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    every = model(IDS, attention_mask=mask, use_cache=False, read_iterations=True).iteration_logits
    for t in range(3):
        model.config.recurrences = t + 1
        expected = model(IDS, attention_mask=mask).logits
        torch.testing.assert_close(every[t][mask.bool()], expected[mask.bool()], atol=2e-5, rtol=1e-5)


def test_chosen_places_and_iterations_are_those_of_the_whole() -> None:
    model = tiny(initializer_range=0.4).eval()
    places = torch.tensor([1, 4, 7])
    whole = model(IDS, use_cache=False, read_iterations=True).iteration_logits
    some = model(IDS, use_cache=False, read_iterations=[0, 2], places=places)
    torch.testing.assert_close(some.iteration_logits, whole[[0, 2]].flatten(1, 2)[:, places])
    torch.testing.assert_close(some.logits, model(IDS).logits.flatten(0, 1)[places])


def test_readouts_are_refused_where_they_would_be_wrong() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="use_cache=False"):
        model(IDS, use_cache=True, read_iterations=True)
    with pytest.raises(ValueError, match="there are 0-2"):
        model(IDS, use_cache=False, read_iterations=[3])
    with pytest.raises(ValueError, match="at least 1"):
        model(IDS, use_cache=False, backprop_iterations=0)
    opened = loop_lens.wrap(tiny())
    with pytest.raises(ValueError, match="lens"):
        opened.original_model(IDS, use_cache=False, read_iterations=True)


def loss_of(model: LoopedTransformer, **options: Any) -> Tensor:
    logits = model(IDS, use_cache=False, **options).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def gradients(model: LoopedTransformer) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def by_hand(model: LoopedTransformer, keep: int) -> Tensor:
    """The forward written out with each early iteration's state and injection detached."""
    trunk = model.model
    position_ids = torch.arange(5)[None]
    shared = {"position_embeddings": trunk.rotary_emb(IDS.double(), position_ids), "attention_mask": None}
    e = trunk.embed_tokens(IDS)
    for block in trunk.prelude:
        e = block(e, **shared)
    state = e
    for t in range(3):
        early = t < 3 - keep
        state = trunk.injection(state.detach() if early else state, e.detach() if early else e)
        for block in trunk.core:
            state = block(state, **shared)
        if early:
            state = state.detach()
    for block in trunk.coda:
        state = block(state, **shared)
    return cross_entropy(model.lm_head(trunk.norm(state))[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_truncated_gradients_are_those_of_states_detached_by_hand(keep: int) -> None:
    model = tiny(initial_state="prelude", initializer_range=0.3).double()
    loss = loss_of(model, backprop_iterations=keep)
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    expected_loss = by_hand(model, keep)
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss)
    expected = gradients(model)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=1e-9)


def test_gradients_through_all_iterations_agree_with_finite_differences() -> None:
    model = tiny(block_norm="sandwich", initializer_range=0.3)
    # transformers' norms compute in float32 whatever they are given.
    for block in [*model.model.prelude, *model.model.core, *model.model.coda]:
        for name in ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"):
            setattr(block, name, nn.RMSNorm(16, 1e-6))
    model.model.norm = nn.RMSNorm(16, 1e-6)
    model.double()
    loss_of(model).backward()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        size = 1e-6
        with torch.no_grad():
            parameter += size * direction
            up = loss_of(model)
            parameter -= 2 * size * direction
            down = loss_of(model)
            parameter += size * direction
        numeric = (up - down) / (2 * size)
        torch.testing.assert_close((parameter.grad * direction).sum(), numeric, atol=1e-7, rtol=1e-5)


def test_bf16_keeps_gradients_of_weights_that_ran_without_a_graph_before() -> None:
    model = tiny(initial_state="prelude", initializer_range=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, backprop_iterations=1).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.core.parameters())


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = tiny(initial_state="prelude", initializer_range=0.3).train()
    loss_of(model, backprop_iterations=2).backward()
    expected = gradients(model)
    model.zero_grad()
    checkpoint_blocks(model, on=True)
    loss_of(model, backprop_iterations=2).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=0, rtol=0)
