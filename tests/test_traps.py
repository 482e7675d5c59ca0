"""What goes wrong silently on loops elsewhere: here it is right, or it raises."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import patching
from transformer_lens.tools.analysis import (
    EdgeAttributionConfig,
    attribution_patch,
    direct_logit_attribution,
    logit_lens,
)

import loop_lens
from loop_lens import HookedLoopedTransformer, NonAdditiveStreamError
from tests.conftest import GOLDENS
from tests.oracles.checkpoints import golden
from tests.oracles.twin import small_looped, tokenizer

TOKENS = torch.randint(0, 46, (2, 6), generator=torch.Generator().manual_seed(1))
OTHERS = torch.randint(0, 46, (2, 6), generator=torch.Generator().manual_seed(2))

NON_ADDITIVE: dict[str, dict[str, Any]] = {
    "Huginn-like": {"block_norm": "post_residual", "post_loop_norm": True},
    "Ouro-like": {
        "block_norm": "pre",
        "loop_norm": True,
        "injection": "none",
        "initial_state": "prelude",
        "coda_layers": 0,
    },
    "retrofit-like": {"block_norm": "pre"},
    "added prelude": {"injection": "add", "initial_state": "prelude"},
    "from zeros": {"injection": "none", "initial_state": "zeros"},
}


def opened(**options: Any) -> HookedLoopedTransformer:
    torch.manual_seed(0)
    return loop_lens.wrap(small_looped(**options), tokenizer=tokenizer())


@pytest.fixture(params=[*NON_ADDITIVE, "hrm_text", "euler"])
def non_additive(request: pytest.FixtureRequest) -> HookedLoopedTransformer:
    if request.param == "hrm_text":
        return loop_lens.boot(GOLDENS / "hrm_text", tokenizer=tokenizer())
    if request.param == "euler":
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=48, hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_attention_heads=3
        )
        return loop_lens.loopify(
            LlamaForCausalLM(config).eval(), layers=[1, 2], times=3, rule="euler", tokenizer=tokenizer()
        )
    return opened(**NON_ADDITIVE[request.param])


@pytest.mark.parametrize(
    "call",
    [
        lambda cache: cache.decompose_resid(layer=-1),
        lambda cache: cache.get_full_resid_decomposition(),
        lambda cache: cache.stack_head_results(layer=-1, incl_remainder=True),
        lambda cache: cache.stack_neuron_results(layer=-1, incl_remainder=True),
        lambda cache: cache.stack_head_results(layer=-1, apply_ln=True),
        lambda cache: cache.logit_attrs(torch.zeros(1, 2, 6, 24), 3),
        lambda cache: cache.model.accumulated_bias(2),
    ],
)
def test_sums_over_a_stream_that_is_no_sum_raise(non_additive: Any, call: Any) -> None:
    _, cache = non_additive.run_with_cache(TOKENS)
    with pytest.raises(NonAdditiveStreamError, match="in this model"):
        call(cache)


def test_accumulated_streams_need_no_sum(non_additive: HookedLoopedTransformer) -> None:
    _, cache = non_additive.run_with_cache(TOKENS)
    stack = cache.accumulated_resid(layer=-1)
    for firing in non_additive.schedule:
        assert torch.equal(stack[firing.index], cache[f"{firing.prefix}.hook_resid_pre"])


def test_heads_and_neurons_of_a_block_are_unaffected(non_additive: HookedLoopedTransformer) -> None:
    _, cache = non_additive.run_with_cache(TOKENS)
    heads = cache.stack_head_results(layer=-1)
    first = non_additive.cfg.n_heads
    total = heads[:first].sum(0)
    assert (total - cache["blocks.0.attn.hook_out"]).abs().max() < 1e-4
    neurons = cache.stack_neuron_results(layer=1)
    assert not neurons.isnan().any()
    assert (neurons.sum(0) - cache["blocks.0.mlp.hook_out"]).abs().max() < 1e-4


def test_direct_logit_attribution_raises(non_additive: HookedLoopedTransformer) -> None:
    with pytest.raises(ValueError, match=r"in this model|requires|hook"):
        direct_logit_attribution(non_additive, TOKENS, answer_tokens=3)


def test_direct_path_patching_raises(non_additive: HookedLoopedTransformer) -> None:
    _, clean = non_additive.run_with_cache(TOKENS)
    _, corrupted = non_additive.run_with_cache(OTHERS)
    with pytest.raises(ValueError, match="in this model"):
        patching.get_act_patch_direct_path(
            non_additive, OTHERS, clean, corrupted, lambda logits: logits.sum(), 0, 0, verbose=False
        )


def test_edge_attribution_raises(non_additive: HookedLoopedTransformer) -> None:
    model = non_additive
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    with pytest.raises(ValueError, match="in this model"):
        attribution_patch(
            model,
            TOKENS[:1],
            OTHERS[:1],
            lambda logits: logits[:, -1, 3].sum(),
            EdgeAttributionConfig(granularity="edge"),
        )


@pytest.mark.parametrize("kind", [kind for kind in NON_ADDITIVE if kind != "from zeros"])
def test_node_attribution_is_first_order_exact(kind: str) -> None:
    """Attribution patching needs no sum: for a small change it is the change of the metric."""
    model = opened(**NON_ADDITIVE[kind])

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 3].sum()

    name = model.name("attn_out", iteration=1, layer=0)
    grads: list[Tensor] = []
    with model.hooks(bwd_hooks=[(name, lambda g, hook: grads.append(g))]):
        metric(model(TOKENS)).backward()
    model = copy.deepcopy(model)
    direction = torch.randn_like(grads[0])
    with torch.no_grad():
        runs = [
            metric(model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda v, hook, e=e: v + e * direction)]))
            for e in (1e-3, -1e-3)
        ]
    slope = (runs[0] - runs[1]) / 2e-3
    assert abs(slope - (grads[0] * direction).sum()) < 0.02 * max(1.0, abs(slope))


@pytest.mark.parametrize("injection", ["none", "add", "linear"])
@pytest.mark.parametrize(
    "site", ["hook_initial_state", "loop.0.hook_state_in", "loop.0.blocks.0.hook_resid_pre"]
)
def test_a_patched_first_state_is_not_injected_again(injection: str, site: str) -> None:
    """The first state may be the very tensor that is injected: a write must not reach the injection."""
    options = {"injection": injection, "initial_state": "prelude"}
    model = opened(**options)
    _, clean = model.run_with_cache(TOKENS)

    def write(value: Tensor, hook: Any) -> Tensor:
        value[:, 2] = 1.0
        return value

    with model.hooks(fwd_hooks=[(site, write)]):
        patched, cache = model.run_with_cache(TOKENS)
    assert torch.equal(cache["hook_prelude_out"], clean["hook_prelude_out"])
    assert torch.equal(cache["prelude.blocks.0.hook_resid_post"], clean["prelude.blocks.0.hook_resid_post"])
    moved = model.run_with_hooks(TOKENS, fwd_hooks=[(site, lambda v, hook: write(v.clone(), hook))])
    assert torch.equal(moved, patched)
    if injection == "add":
        # What the second iteration adds is the prelude's own output.
        added = cache["loop.1.hook_injected"] - cache["loop.1.hook_state_in"]
        assert (added - clean["hook_prelude_out"]).abs().max() < 1e-5


def test_starting_inside_the_loop_needs_the_preludes_output() -> None:
    model = opened()
    logits, cache = model.run_with_cache(TOKENS)
    for firing in model.schedule:
        residual = cache[f"{firing.prefix}.hook_resid_pre"]
        given = {"prelude_out": cache["hook_prelude_out"]}
        resumed = model(residual, start_at_layer=firing.index, **given)
        assert (resumed - logits).abs().max() < 1e-5
        injects_again = firing.segment == "loop" and firing.iteration != model.recurrences - 1
        if injects_again:
            with pytest.raises(ValueError, match="prelude_out"):
                model(residual, start_at_layer=firing.index)
        else:
            assert (model(residual, start_at_layer=firing.index) - logits).abs().max() < 1e-5


def test_starting_inside_nested_loops_is_refused() -> None:
    model = loop_lens.boot(GOLDENS / "hrm_text")
    with pytest.raises(ValueError, match="two states"):
        model(torch.zeros(1, 4, 64), start_at_layer=3)


@pytest.mark.parametrize("value", [TOKENS, "text"])
def test_starting_takes_a_residual_stream(value: Any) -> None:
    with pytest.raises(ValueError, match="residual stream"):
        opened()(value, start_at_layer=1)


def test_ouros_lens_is_its_own_readout_at_every_iteration() -> None:
    """lm_head(H[t]): normed once, not twice, and not the last pass shown as all of them."""
    _, weights, expected = golden("ouro")
    model = loop_lens.boot(GOLDENS / "ouro")
    _, cache = model.run_with_cache(expected["input_ids"])
    assert logit_lens(model, expected["input_ids"]).values.shape[0] == 13  # passes, not the last of them
    head = weights["lm_head.weight"]
    for t in range(4):
        native = cache[f"loop.{t}.hook_state_out"] @ head.T
        read = model.unembed(model.ln_final(cache[f"loop.{t}.blocks.2.hook_resid_post"]))
        assert (read - native).abs().max() < 1e-5
        with model.at_recurrences(t + 1):
            assert (model(expected["input_ids"]) - native).abs().max() < 1e-5


def test_the_final_norm_fires_once_though_the_loop_shares_its_weights() -> None:
    for family in ("ouro", "huginn", "hrm_text"):
        _, _, expected = golden(family)
        model = loop_lens.boot(GOLDENS / family)
        fired: list[str] = []
        model.run_with_hooks(
            expected["input_ids"],
            fwd_hooks=[("ln_final.hook_in", lambda v, hook, fired=fired: fired.append(hook.name))],
        )
        assert len(fired) == 1
        if family == "hrm_text":
            continue  # its norms have no weights
        weight = model.ln_final.original_component.weight
        assert model.original_model.model.inner_norm.weight is weight


def test_a_saturated_exit_gate_does_not_shorten_the_forward() -> None:
    _, _, expected = golden("ouro")
    model = loop_lens.boot(GOLDENS / "ouro")
    with torch.no_grad():
        model.original_model.model.exit_gate.bias.fill_(50.0)
    assert (model(expected["input_ids"]) - expected["logits"]).abs().max() < 1e-5
    both = model(expected["input_ids"], return_type="both")
    assert (both[0] - expected["logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["huginn", "retrofit_llama"])
def test_padding_is_not_attended_to(family: str) -> None:
    _, _, expected = golden(family)
    tokens = expected["input_ids"][:1]
    model = loop_lens.boot(GOLDENS / family)
    clean = model(tokens)
    padded = torch.cat([torch.full((1, 3), 7), tokens], 1)
    mask = torch.tensor([[0] * 3 + [1] * tokens.shape[1]])
    logits = model(padded, attention_mask=mask)
    assert (logits[:, 3:] - clean).abs().max() < 1e-5
    assert (model(padded)[:, 3:] - clean).abs().max() > 1e-3


def test_patching_helpers_need_no_arguments_that_they_do_not_pass_on() -> None:
    """Number of iterations and initial state live on the model, so helpers find them there."""
    model = opened()
    model.initial_state = torch.randn(2, 6, 24)
    with torch.no_grad(), model.at_recurrences(2):
        _, clean = model.run_with_cache(TOKENS)
        grid = patching.get_act_patch_resid_pre(model, OTHERS, clean, lambda logits: logits[:, -1, 3].sum())
        assert grid.shape == (6, 6)
        whole = model(TOKENS)[:, -1, 3].sum()

    def everything(value: Tensor, hook: Any) -> Tensor:
        return clean[hook.name]

    with torch.no_grad(), model.at_recurrences(2):
        last = model.run_with_hooks(OTHERS, fwd_hooks=[("coda.blocks.0.hook_resid_pre", everything)])
    assert abs(last[:, -1, 3].sum() - whole) < 1e-4


def test_explicit_names_that_cannot_fire_are_told() -> None:
    model = opened()
    with pytest.warns(UserWarning, match="did not fire"):
        model.run_with_cache(TOKENS, names_filter=["blocks.1.attn.hook_hidden_states"])
    with pytest.warns(UserWarning, match="hook_result"):
        model.run_with_cache(TOKENS, names_filter=["blocks.1.attn.hook_result"])


def test_hrm_state_patches_act_as_in_its_equations() -> None:
    """Patching a state by hand: z_L or z_H enters every later sum, and nothing earlier."""
    _, _, expected = golden("hrm_text")
    model = loop_lens.boot(GOLDENS / "hrm_text", attn_implementation="eager")
    bare: Any = copy.deepcopy(model).original_model
    tokens = expected["input_ids"]
    shift = torch.randn(2, 11, 64)
    for site, state in (
        ("H.1.hook_state_in", "H"),
        ("H.1.L.1.hook_state_in", "L"),
        ("H.0.hook_state_in", "H"),
    ):
        with model.hooks(fwd_hooks=[(site, lambda v, hook: v.add_(shift))]):
            patched = model(tokens)
        again = _hrm_by_hand(bare, tokens, site, shift)
        assert (patched - again).abs().max() < 1e-4, (site, state)
        assert (patched - expected["logits"]).abs().max() > 1e-3


def _hrm_by_hand(model: Any, tokens: Tensor, site: str, shift: Tensor) -> Tensor:
    inner = model.model
    mask = torch.full((11, 11), torch.finfo(torch.float32).min).triu(1)[None, None]
    positions = torch.arange(11)[None]
    embedded = inner.embed_tokens(tokens) * inner.embedding_scale
    rotary = inner.rotary_emb(embedded, positions)

    def stack(module: Any, x: Tensor) -> Tensor:
        for layer in module.layers:
            x = layer(x, attention_mask=mask, position_embeddings=rotary)
        return module.final_norm(x)

    high, low = embedded, inner.z_L_init.expand_as(embedded)
    for h in range(2):
        if site == f"H.{h}.hook_state_in":
            high = high + shift
        for i in range(3):
            if site == f"H.{h}.L.{i}.hook_state_in":
                low = low + shift
            low = stack(inner.L_module, low + high)
        high = stack(inner.H_module, high + low)
    return model.lm_head(high)


def test_the_logit_lens_reads_hrm_text() -> None:
    _, _, expected = golden("hrm_text")
    model = loop_lens.boot(GOLDENS / "hrm_text")
    values = logit_lens(model, expected["input_ids"]).values
    assert values.shape[0] == 17 and (values[-1] - expected["logits"][:, -1]).abs().max() < 1e-5
