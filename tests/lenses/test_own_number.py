"""An attribution is of the model's own number or raises, in every mode of autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import loop_lens
from loop_lens import attribute, patch_sweep
from loop_lens.interventions import ablate, steer
from loop_lens.lenses import find_exits, fit_jacobian_lens, fit_tuned_lens
from tests.interventions.models import difference, opened, prompts, wrapped
from tests.oracles.twin import small_looped

NAMES = ("huginn", "ouro", "hrm_text", "looped_gpt2", "looped_llama")


@pytest.mark.parametrize("name", NAMES)
def test_a_head_that_does_more_than_the_unembedding_is_told(name: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model)
    head: Any = model.unembed.original_component
    gain = torch.linspace(0.5, 1.5, model.cfg.d_vocab)
    handle = head.register_forward_hook(lambda module, args, out: out * gain)
    for site in (None, model.name("resid_post", segment=model.schedule[-1].segment, **last(model))):
        with pytest.raises(ValueError, match="head does more"):
            attribute(model, tokens, target=3, site=site)
    handle.remove()
    attribute(model, tokens, target=3)


def last(model: Any) -> dict[str, Any]:
    return {"iteration": model.schedule[-1].iteration, "layer": model.schedule[-1].layer}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_component_is_told(name: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model)
    t = model.schedule.iterations(model.schedule.innermost_loop)[0]
    with (
        steer(model, 3 * torch.randn(model.cfg.d_model), iterations=t, layers=0),
        pytest.raises(ValueError, match="writes into the stream"),
    ):
        attribute(model, tokens, target=3)
    with ablate(model, "z", iterations=t, layers=0):
        found = attribute(model, tokens, target=3)
        assert torch.allclose(found.total, model(tokens)[:, -1, 3], atol=1e-3)


def test_a_norm_that_is_not_found_is_told() -> None:
    net = small_looped(block_norm="post_residual", injection="linear", initial_state="noise")
    for block in net.model.core:
        norm: Any = block.attn_post_norm
        norm.__class__ = type("Rescaling", (type(norm),), {})
    model = loop_lens.wrap(net)
    with pytest.raises(ValueError, match=r"the terms of prompt . sum to"):
        attribute(model, prompts(model)[0], target=3)


def differentiated(model: Any) -> list[torch.Tensor]:
    """What every function that differentiates finds."""
    clean, corrupted = prompts(model)
    options: dict[str, Any] = {"site": "resid_post", "progress": False}
    fitted = {"dim_batch": 24, "progress": False}
    return [
        attribute(model, clean, target=3).terms,
        patch_sweep(model, clean, corrupted, difference, method="attribution", **options).values,
        patch_sweep(model, clean, corrupted, difference, method="integrated", steps=2, **options).values,
        *fit_jacobian_lens(model, clean, **fitted).matrices.values(),
        *(p.detach() for p in fit_tuned_lens(model, clean, steps=2, progress=False).parameters()),
    ]


@pytest.mark.parametrize("name", ["huginn", "looped_gpt2"])
def test_gradients_in_every_mode_and_of_frozen_weights(name: str) -> None:
    model = opened(name)
    expected = differentiated(model)
    assert all(p.grad is None for p in model.original_model.parameters())
    results = []
    with torch.no_grad():
        results.append(differentiated(model))
    with torch.inference_mode():
        results.append(differentiated(model))
        assert torch.is_inference_mode_enabled()
    model.original_model.requires_grad_(False)
    results.append(differentiated(model))
    for found in results:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_weights_made_under_inference_mode_are_told() -> None:
    with torch.inference_mode():
        model = wrapped()
    with pytest.raises(ValueError, match=r"was made under torch\.inference_mode"):
        differentiated(model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["huginn", "ouro", "looped_llama", "hrm_text"])
def test_a_coda_that_takes_more_than_the_state_is_told(name: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model)
    body: Any = model.body
    loop_lens.lens(model, tokens, kind="coda")
    body.enter_coda = lambda state: 2 * state + 1
    last = model.schedule.iterations(model.schedule.main_loop)[-1]
    for ask in (
        lambda: loop_lens.lens(model, tokens, kind="coda", positions=[-1]),
        lambda: find_exits(model, tokens, rule="kl"),
    ):
        with pytest.raises(ValueError, match=rf"at \w+\.{last}\.hook_state_out what the model says after it"):
            ask()
    loop_lens.lens(model, tokens, kind="logit")
