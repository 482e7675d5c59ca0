"""Looking inside a block changes no gradient, whatever weights queries, keys and values come from."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import loop_lens
from loop_lens.models.checkpoint import WeightsError
from tests.oracles.unrolled import FUSED, MODELS, decoder

TOKENS = torch.randint(1, 48, (2, 7), generator=torch.Generator().manual_seed(1))


def opened(name: str) -> Any:
    return loop_lens.loopify(decoder(name), layers=range(2, 5), times=2)


shared = functools.cache(opened)

SHOWN = [name for name in FUSED if name != "codegen"]
"""Those that transformer-lens 4.3 can show inside under transformers 5.24."""

SPLIT = [name for name in FUSED if name != "glm"]
"""Those whose queries, keys and values are fused: GLM's gates alone are."""


def gradients(model: Any, *, looks: bool) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model.run_with_cache(TOKENS)[0] if looks else model(TOKENS)
    logits.logsumexp(-1).sum().backward()
    parameters = model.original_model.named_parameters()
    return {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def assert_looking_changes_no_gradient(model: Any) -> None:
    bare, hooked = gradients(model, looks=False), gradients(model, looks=True)
    assert bare.keys() == hooked.keys()
    assert len(bare) == sum(p.requires_grad for p in model.original_model.parameters())
    for name, grad in bare.items():
        assert (hooked[name] - grad).abs().max() < 1e-5 * max(1, float(grad.abs().max())), name


@pytest.mark.parametrize("name", [*SHOWN, *(name for name in MODELS if name not in FUSED)])
def test_looking_changes_no_gradient(name: str) -> None:
    assert_looking_changes_no_gradient(shared(name))


@pytest.mark.parametrize("name", FUSED)
def test_no_weight_has_a_copy(name: str) -> None:
    model = shared(name)
    own = {id(p) for p in model.original_model.parameters()}
    assert {id(p) for block in model.blocks for p in block.parameters()} <= own


@pytest.mark.parametrize("name", SPLIT)
def test_parts_are_what_transformer_lens_splits(name: str) -> None:
    attention = shared(name).blocks[2].attn
    split = attention.split_qkv_matrix(attention.original_component)
    x = torch.randn(2, 3, attention.q.in_features)
    for part, theirs in zip("qkv", split, strict=True):
        ours = getattr(attention, part).original_component
        assert torch.equal(ours.weight, theirs.weight)
        assert (ours(x) - theirs(x)).abs().max() < 1e-5


@pytest.mark.parametrize("name", SHOWN)
def test_processed_weights_are_the_models_own(name: str) -> None:
    model = opened(name)
    before = model(TOKENS).log_softmax(-1)
    model.enable_compatibility_mode(disable_warnings=True)
    for logits in (model(TOKENS), model.run_with_cache(TOKENS)[0], model.original_model(TOKENS).logits):
        assert (logits.log_softmax(-1) - before).abs().max() < 1e-4
    assert_looking_changes_no_gradient(model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "falcon", "phi3", "mpt", "phi", "llama", "olmo2"])
@pytest.mark.filterwarnings("ignore:.*norm weights stay unfolded")
def test_processed_weights_are_saved_or_refused(name: str, tmp_path: Path) -> None:
    model = opened(name)
    model.enable_compatibility_mode(disable_warnings=True)
    if name in ("gpt2", "gpt_neox", "falcon", "mpt"):  # a bias for heads that have none, a head that was tied
        with pytest.raises(WeightsError, match=r"(bias|lm_head.weight).* no place"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())
    else:
        model.save_pretrained(tmp_path)
        assert (loop_lens.boot(tmp_path)(TOKENS) - model(TOKENS)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "bloom", "gpt_bigcode", "mpt"])
def test_a_fused_projection_is_called_once_and_its_hooks_count(name: str) -> None:
    model, calls = opened(name), list[int]()
    list(model.blocks)
    looped = model.blocks[2].attn.qkv.original_component

    def negate(module: Any, args: Any, out: Tensor) -> Tensor:
        calls.append(1)
        return -out

    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_q", lambda value, hook: None)]):
        plain = model(TOKENS)
        handle = looped.register_forward_hook(negate)
        assert not torch.equal(model(TOKENS), plain)
        assert calls == [1]
        handle.remove()


def test_threads_keep_their_own_calls() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = shared("gpt2")
    prompts = [torch.randint(1, 48, (1, 7)) for _ in range(8)]
    with torch.no_grad(), model.hooks(fwd_hooks=[(model.names("q")[0], lambda value, hook: None)]):
        alone = [model(prompt) for prompt in prompts]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda prompt: model(prompt).detach(), prompts))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
