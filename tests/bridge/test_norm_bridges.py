"""Norms give what their modules give, however wide, and what a hook makes of them counts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import loop_lens
from tests.oracles.twin import small_looped
from tests.oracles.unrolled import MODELS, decoder

TOKENS = torch.randint(1, 48, (2, 7), generator=torch.Generator().manual_seed(1))

NATIVE: dict[str, dict[str, Any]] = {
    **{norm: {"block_norm": norm} for norm in ("pre", "sandwich", "post_branch", "post_residual")},
    "qk after rope": {"qk_norm": "head_after_rope"},
    "loop norm": {"loop_norm": True, "coda_layers": 0},
}
"""Native models by where their norms are; those after RoPE have no weights."""


def opened(kind: str) -> Any:
    torch.manual_seed(0)
    if kind in NATIVE:
        return loop_lens.wrap(small_looped(**NATIVE[kind]))
    return loop_lens.loopify(decoder(kind), layers=range(2, 5), times=2)


shared = functools.cache(opened)


@pytest.fixture(params=[*NATIVE, *MODELS])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def norms(model: Any) -> list[str]:
    return [name for name in model.hook_dict if name.endswith(("hook_scale", "hook_normalized"))]


def run(model: Any, hook: Any, site: str = "") -> Tensor:
    return model.run_with_hooks(TOKENS, fwd_hooks=[(n, hook) for n in norms(model) if n.endswith(site)])


def look(value: Tensor, hook: Any) -> None:
    pass


def double(value: Tensor, hook: Any) -> None:
    value.mul_(2)


def module_of(model: Any, name: str) -> Any:
    """What the norm bridge of a hook stands over."""
    parts = name.split(".")[:-1]
    top = model.blocks[int(parts[1])] if parts[0] == "blocks" else model
    return functools.reduce(getattr, parts[2:] if top is not model else parts, top).original_component


@torch.no_grad()
def test_the_result_is_the_modules_own(kind: str) -> None:
    model = opened(kind)
    inputs: dict[str, Tensor] = {}

    def check(value: Tensor, hook: Any) -> None:
        if hook.name.endswith("hook_in"):
            inputs["x"] = value.clone()
        elif hook.name.endswith("hook_out"):
            own = module_of(model, hook.name)(inputs["x"])
            assert torch.equal(value, own) and value.dtype == own.dtype, hook.name

    at = [name for name in norms(model) if name.endswith("hook_scale")]
    sites = ("in", "scale", "normalized", "out")
    hooks = [(name.replace("hook_scale", f"hook_{site}"), check) for name in at for site in sites]
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        with model.hooks(fwd_hooks=hooks):
            model(TOKENS)
            with torch.inference_mode():
                model(TOKENS)
            with torch.autocast("cpu", torch.bfloat16):
                model(TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("native", NATIVE)
def test_looking_changes_no_bit(native: str) -> None:
    model = opened(native)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        assert torch.equal(run(model, look), model(TOKENS))
        with torch.inference_mode():
            assert torch.equal(run(model, look), model(TOKENS))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(run(model, look), model(TOKENS))


@torch.no_grad()
def test_a_value_returned_as_it_was_changes_nothing(kind: str) -> None:
    # What a hook returns is what the result is computed from, here as the module would.
    model = shared(kind)
    assert (run(model, lambda value, hook: value * 1) - model(TOKENS)).abs().max() < 1e-5


@torch.no_grad()
def test_edits_act_returned_or_in_place(kind: str) -> None:
    model = shared(kind)
    doubled = run(model, lambda value, hook: 2 * value, "hook_normalized")
    assert (doubled - model(TOKENS)).abs().max() > 1e-3
    assert torch.equal(run(model, double, "hook_normalized"), doubled)
    assert (run(model, lambda value, hook: value / 2, "hook_scale") - doubled).abs().max() < 1e-4
    assert torch.equal(
        run(model, double, "hook_scale"), run(model, lambda value, hook: 2 * value, "hook_scale")
    )


@torch.no_grad()
@pytest.mark.parametrize("native", NATIVE)
def test_float64_norms_are_computed_in_float64(native: str) -> None:
    model = opened(native).to(torch.float64)
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        seen[hook.name] = value.clone()

    names = norms(model)
    ends = [n.replace("normalized", end) for n in names if "normalized" in n for end in ("in", "out")]
    model.run_with_hooks(TOKENS, fwd_hooks=[(name, keep) for name in (*names, *ends)])
    for name in (name for name in names if "normalized" in name):
        x = seen[name.replace("normalized", "in")]
        expected = x / (x.pow(2).mean(-1, keepdim=True) + model.original_model.config.rms_norm_eps).sqrt()
        assert (seen[name] - expected).abs().max() < 1e-13
        weight = getattr(module_of(model, name), "weight", 1.0)
        assert (seen[name.replace("normalized", "out")] - expected * weight).abs().max() < 1e-13


@pytest.mark.parametrize("native", NATIVE)
def test_backward_hooks_see_the_gradient_and_change_no_bit(native: str) -> None:
    model, seen = shared(native), list[Tensor]()
    name = next(name for name in norms(model) if name.endswith("hook_normalized"))
    with model.hooks(bwd_hooks=[(name, lambda grad, hook: seen.append(grad))]):
        logits = model(TOKENS)
        logits.logsumexp(-1).sum().backward()
    assert torch.equal(logits, model(TOKENS))
    assert len(seen) == 1 and seen[0].abs().max() > 0
