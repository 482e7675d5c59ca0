"""A looped model without injection is an ordinary Llama with repeated weights: every tool agrees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import patching
from transformer_lens.head_detector import detect_head
from transformer_lens.tools.analysis import (
    EdgeAttributionConfig,
    JacobianLens,
    SubspaceInterchange,
    attribution_patch,
    direct_logit_attribution,
    faithfulness,
    logit_lens,
    random_basis,
    run_with_intervention,
)

import loop_lens
from tests.oracles.twin import looped_llama_twin, small_looped, untied_twin

TOKENS = torch.randint(0, 46, (2, 6), generator=torch.Generator().manual_seed(1))
OTHERS = torch.randint(0, 46, (2, 6), generator=torch.Generator().manual_seed(2))
Pair = tuple[Any, Any]


TWINS = {"native": untied_twin, "looped Llama": looped_llama_twin}


@pytest.fixture(scope="module", params=TWINS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return TWINS[request.param]()


@pytest.fixture(params=TWINS)
def fresh(request: pytest.FixtureRequest) -> Pair:
    return TWINS[request.param]()


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -1, 5]).sum()


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("twin", TWINS)
def test_everything_cached(twin: str, kv_heads: int) -> None:
    ours, theirs = TWINS[twin](num_key_value_heads=kv_heads)
    a, ca = ours.run_with_cache(TOKENS)
    b, cb = theirs.run_with_cache(TOKENS)
    close(a, b)
    assert set(cb.keys()) <= set(ca.keys())
    assert set(ca.keys()) - set(cb.keys()) == set(ours.schedule.sites)
    for name in cb:
        close(ca[name], cb[name])


def _result(name: str, **kwargs: Any) -> Callable[[Any], Tensor]:
    return lambda cache: getattr(cache, name)(**kwargs)


@pytest.mark.parametrize(
    "call",
    [
        _result("accumulated_resid", layer=-1, incl_mid=True),
        _result("accumulated_resid", layer=5, apply_ln=True),
        _result("decompose_resid", layer=-1),
        _result("decompose_resid", layer=4, mode="attn"),
        _result("stack_head_results", layer=-1),
        _result("stack_head_results", layer=5, incl_remainder=True),
        _result("stack_neuron_results", layer=-1),
        _result("stack_neuron_results", layer=3, incl_remainder=True),
        _result("get_full_resid_decomposition"),
        _result("get_full_resid_decomposition", expand_neurons=False, apply_ln=True),
        _result("stack_activation", activation_name="z"),
        lambda cache: cache.apply_ln_to_stack(cache.decompose_resid(layer=-1), layer=-1),
        lambda cache: cache.logit_attrs(cache.decompose_resid(layer=-1), 3, incorrect_tokens=5),
        lambda cache: cache.logit_attrs(cache.stack_head_results(layer=-1), 3),
    ],
)
def test_activation_cache(pair: Pair, call: Callable[[Any], Tensor]) -> None:
    ours, theirs = pair
    close(call(ours.run_with_cache(TOKENS)[1]), call(theirs.run_with_cache(TOKENS)[1]))


def test_the_decomposition_adds_up(pair: Pair) -> None:
    _, cache = pair[0].run_with_cache(TOKENS)
    last = cache[f"blocks.{len(pair[0].blocks) - 1}.hook_resid_post"]
    assert (cache.decompose_resid(layer=-1).sum(0) - last).abs().max() < 1e-5


HELPERS = sorted(
    name for name in dir(patching) if name.startswith("get_act_patch_") and "direct_path" not in name
)


@pytest.mark.parametrize("helper", HELPERS)
@torch.no_grad()
def test_patching_helpers(pair: Pair, helper: str) -> None:
    assert len(HELPERS) >= 17
    results = []
    for model in pair:
        _, clean = model.run_with_cache(TOKENS[:, :3])
        results.append(getattr(patching, helper)(model, OTHERS[:, :3], clean, metric))
    assert results[0].std() > 0
    close(*results)


@torch.no_grad()
def test_direct_path_patching(pair: Pair) -> None:
    results = []
    for model in pair:
        _, clean = model.run_with_cache(TOKENS)
        _, corrupted = model.run_with_cache(OTHERS)
        results.append(
            patching.get_act_patch_direct_path(
                model, OTHERS, clean, corrupted, metric, src_layer=1, src_head=2, verbose=False
            )
        )
    assert results[0].abs().max() > 0
    close(*results)


def test_head_detection(pair: Pair) -> None:
    found = [detect_head(m, "w1 w2 w3 w1 w2 w3", "previous_token_head") for m in pair]
    close(*found)


def test_logit_lens(pair: Pair) -> None:
    ours, theirs = (logit_lens(model, TOKENS) for model in pair)
    close(ours.values, theirs.values)


@pytest.mark.parametrize("unit", ["component", "layer", "head"])
def test_direct_logit_attribution(fresh: Pair, unit: str) -> None:
    for model in fresh:
        model.enable_compatibility_mode(disable_warnings=True)
    ours, theirs = (
        direct_logit_attribution(model, TOKENS, answer_tokens=3, incorrect_tokens=5, unit=unit)
        for model in fresh
    )
    assert ours.labels == theirs.labels
    close(ours.attribution, theirs.attribution)


@pytest.mark.parametrize("granularity", ["node", "edge"])
def test_attribution_patching(fresh: Pair, granularity: str) -> None:
    results = []
    for model in fresh:
        model.set_use_attn_result(True)
        if granularity == "edge":
            model.set_use_split_qkv_input(True)
            model.set_use_hook_mlp_in(True)
        config = EdgeAttributionConfig(granularity=granularity)
        results.append(attribution_patch(model, TOKENS[:1, :4], OTHERS[:1, :4], metric, config))
    ours, theirs = (r.node_scores for r in results)
    assert ours.keys() == theirs.keys() and any(abs(value) > 1e-3 for value in ours.values())
    assert all(abs(ours[node] - theirs[node]) < 1e-5 for node in ours)
    if granularity == "edge":
        a, b = (r.edge_scores for r in results)
        assert a.keys() == b.keys() and all(abs(a[edge] - b[edge]) < 1e-5 for edge in a)


def test_interchange(pair: Pair) -> None:
    source, basis = torch.randn(2, 24), random_basis(24, 4, 0)
    results = [
        run_with_intervention(
            model,
            "blocks.4.hook_resid_post",
            SubspaceInterchange(basis),
            TOKENS,
            source,
            lambda tokens, model=model: model(tokens)[:, -1, :4],
            positions=torch.tensor([2, 3]),
        )
        for model in pair
    ]
    assert (results[0] - pair[0](TOKENS)[:, -1, :4]).abs().max() > 1e-3
    close(*results)


def test_jacobian_lens(pair: Pair) -> None:
    prompts = ["w1 w2 w3 w4 w5 w6 w7", "w8 w9 w3 w2 w1 w4 w4"]
    options: dict[str, Any] = {"corpus": "test", "skip_first_positions": 1, "show_progress": False}
    ours, theirs = (JacobianLens.fit(model, prompts, **options) for model in pair)
    stream = torch.randn(24)
    for layer in (0, 3, 5):
        close(ours.transport(stream, layer), theirs.transport(stream, layer))


@pytest.mark.parametrize("cached", [True, False])
def test_greedy_generation(pair: Pair, cached: bool) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "verbose": False,
        "stop_at_eos": False,
    }
    ours, theirs = pair
    a = ours.generate(TOKENS, use_past_kv_cache=cached, **options)
    b = theirs.generate(TOKENS, use_past_kv_cache=False, **options)
    assert torch.equal(a, b)


def test_stopping_at_every_firing(pair: Pair) -> None:
    ours, theirs = pair
    for layer in range(-len(ours.blocks), len(ours.blocks) + 1):
        close(ours(TOKENS, stop_at_layer=layer), theirs(TOKENS, stop_at_layer=layer))
        _, a = ours.run_with_cache(TOKENS, stop_at_layer=layer)
        _, b = theirs.run_with_cache(TOKENS, stop_at_layer=layer)
        assert {n for n in a if n.startswith("blocks.")} == {n for n in b if n.startswith("blocks.")}


def test_starting_at_every_firing(pair: Pair) -> None:
    ours, theirs = pair
    logits, cache = theirs.run_with_cache(TOKENS)
    for layer in range(len(ours.blocks)):
        residual = cache[f"blocks.{layer}.hook_resid_pre"]
        close(ours(residual, start_at_layer=layer), logits)
        close(ours(residual, start_at_layer=layer - len(ours.blocks)), logits)
        _, a = ours.run_with_cache(residual, start_at_layer=layer)
        _, b = theirs.run_with_cache(residual, start_at_layer=layer)
        assert {n for n in a if n.startswith("blocks.")} == {n for n in b if n.startswith("blocks.")}
        for name in a:
            if name.startswith("blocks."):
                close(a[name], cache[name])
        patch = [(f"blocks.{len(ours.blocks) - 1}.hook_resid_pre", lambda v, hook: v * 0.5)]
        close(
            ours.run_with_hooks(residual, fwd_hooks=patch, start_at_layer=layer),
            theirs.run_with_hooks(residual, fwd_hooks=patch, start_at_layer=layer),
        )


def test_backward_hooks(pair: Pair) -> None:
    grads: list[dict[str, Tensor]] = []
    for model in pair:
        _, cache = model.run_with_cache(TOKENS, incl_bwd=True, return_type="loss")
        grads.append({name: cache[name] for name in cache if name.endswith("_grad")})
    assert grads[1].keys() <= grads[0].keys() and len(grads[1]) > 100
    for name, grad in grads[1].items():
        close(grads[0][name], grad)


def test_parameter_gradients_sum_over_firings(fresh: Pair) -> None:
    ours, theirs = fresh
    for model in fresh:
        model(TOKENS, return_type="loss").backward()
    for index, block in enumerate(ours.body.blocks):
        for visited in ("self_attn.q_proj", "mlp.down_proj"):
            attn, name = visited.split(".")
            bridged = {"self_attn": "attn", "mlp": "mlp"}[attn]
            part = {"q_proj": "q", "down_proj": "out"}[name]
            copies = [
                getattr(getattr(theirs.blocks[k], bridged), part).original_component.weight.grad
                for k in ours.schedule.visits[index]
            ]
            close(block.get_submodule(visited).weight.grad, torch.stack(copies).sum(0))


@pytest.mark.parametrize("name", ["W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out", "W_E", "W_U"])
def test_weights(pair: Pair, name: str) -> None:
    ours, theirs = (getattr(model, name) for model in pair)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["QK", "OV"])
def test_circuits(pair: Pair, name: str) -> None:
    close(*(getattr(model, name).AB for model in pair))


def test_composition_scores(pair: Pair) -> None:
    close(*(model.all_composition_scores("Q").scores for model in pair))


def test_compatibility_mode(fresh: Pair) -> None:
    ours, theirs = fresh
    before = ours(TOKENS).log_softmax(-1)
    for model in fresh:
        model.enable_compatibility_mode(disable_warnings=True)
    close(ours(TOKENS), theirs(TOKENS))
    close(ours(TOKENS).log_softmax(-1), before)
    a, b = (model.run_with_cache(TOKENS)[1] for model in fresh)
    assert set(b.keys()) <= set(a.keys())
    for name in b:
        close(a[name], b[name])
    close(ours.W_Q, theirs.W_Q)
    first, again = (ours.blocks[i].attn.q.original_component.weight for i in (1, 3))
    assert first is again
    assert sum(p.numel() for p in ours.parameters()) == ours.n_params
    with ours.at_recurrences(5):
        assert ours.blocks[9].attn.q.original_component.weight is first


@pytest.mark.parametrize(
    "options",
    [{"block_norm": n} for n in ("sandwich", "post_branch", "post_residual")]
    + [{"loop_norm": True}, {"post_loop_norm": True}],
)
def test_folding_that_is_not_sound_is_refused(options: dict[str, Any]) -> None:
    model = loop_lens.wrap(small_looped(**options))
    before = model(TOKENS)
    with pytest.raises(ValueError, match="not sound for this model"):
        model.enable_compatibility_mode()
    assert torch.equal(model(TOKENS), before)
    model.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    close(model(TOKENS), before)


def test_folding_with_an_injection_is_sound() -> None:
    model = loop_lens.wrap(small_looped(injection="linear"))
    before = model(TOKENS).log_softmax(-1)
    model.enable_compatibility_mode(disable_warnings=True)
    logits, _ = model.run_with_cache(TOKENS)
    close(model(TOKENS).log_softmax(-1), before)
    close(logits.log_softmax(-1), before)


def test_faithfulness(fresh: Pair) -> None:
    results = []
    for model in fresh:
        model.set_use_attn_result(True)
        model.set_use_split_qkv_input(True)
        model.set_use_hook_mlp_in(True)
        clean, corrupt = TOKENS[:1, :3], OTHERS[:1, :3]
        scored = attribution_patch(model, clean, corrupt, metric, EdgeAttributionConfig(granularity="edge"))
        edges = list(scored.edge_scores)[::3]
        results.append(faithfulness(model, clean, corrupt, metric, edges))
    ours, theirs = results
    assert ours.total_edges == theirs.total_edges and 0 < ours.circuit_size < ours.total_edges
    assert abs(ours.recovered - theirs.recovered) < 1e-4
