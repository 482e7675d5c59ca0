"""Looped layers of ordinary decoders compute what really copied layers compute."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import loop_lens
from loop_lens.models.window import LOOP_RULES
from tests.oracles.twin import small_looped
from tests.oracles.unrolled import MODELS, decoder, layer_outputs, layers_of, unrolled

TOKENS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))
ORDER = [0, 1, *[2, 3, 4] * 3, 5]


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    model = decoder(request.param)
    oracle = unrolled(model, ORDER)
    return loop_lens.loopify(model, layers=range(2, 5), times=3), oracle


@torch.no_grad()
def test_logits_and_every_firing_match_copied_layers(pair: Any) -> None:
    looped, oracle = pair
    logits = oracle(TOKENS).logits
    assert (looped(TOKENS) - logits).abs().max() < 1e-5
    outputs = list(layer_outputs(oracle, TOKENS))
    hooked, cache = looped.run_with_cache(TOKENS)
    assert (hooked - logits).abs().max() < 1e-5
    _, ends = looped.run_with_cache(TOKENS, names_filter=looped.names("resid_post"))
    assert len(outputs) == len(looped.schedule) == len(ORDER)
    for firing, theirs in zip(looped.schedule, outputs, strict=True):
        for seen in (cache, ends):
            assert (seen[f"{firing.prefix}.hook_resid_post"] - theirs).abs().max() < 2e-5


@torch.no_grad()
def test_generation_matches_copied_layers(pair: Any) -> None:
    looped, oracle = pair
    theirs = oracle.generate(TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    options: dict[str, Any] = {
        "max_new_tokens": 5,
        "do_sample": False,
        "verbose": False,
        "stop_at_eos": False,
    }
    for cached in (True, False):
        assert torch.equal(looped.generate(TOKENS, use_past_kv_cache=cached, **options), theirs)
    by_transformers = looped.original_model.generate(
        TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert torch.equal(by_transformers, theirs)
    looped.add_hook("loop.1.blocks.1.attn.hook_z", lambda value, hook: None)
    assert torch.equal(looped.generate(TOKENS, use_past_kv_cache=True, **options), theirs)


@torch.no_grad()
def test_hooks_fire_in_their_own_firing(pair: Any) -> None:
    looped, _ = pair
    fired: list[tuple[int, str]] = []
    inside = ("hook_resid_pre", "attn.hook_z", "hook_mlp_out", "hook_resid_post")
    hooks = [
        (f"blocks.{i}.{name}", lambda value, hook, key=(i, name): fired.append(key))
        for i in range(len(ORDER))
        for name in inside
    ]
    looped.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert len(fired) == len(hooks)
    assert [i for i, _ in fired] == sorted(i for i, _ in fired)


@torch.no_grad()
def test_blocks_hooked_inside_use_the_key_value_cache(pair: Any) -> None:
    # transformers 5.24 calls the cache by another name than transformer-lens 4.3 looks for.
    looped, oracle = pair
    names, past, steps = looped.names("z"), None, []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        options: dict[str, Any] = {"use_cache": True} if past is None else {"past_key_values": past}
        (logits, past), _ = looped.run_with_cache(
            TOKENS[:, start:stop], names_filter=names, return_type="logits_and_cache", **options
        )
        steps.append(logits)
    assert (torch.cat(steps, 1) - oracle(TOKENS).logits).abs().max() < 1e-5


@torch.no_grad()
def test_patterns_are_there_whatever_the_attention_implementation(pair: Any) -> None:
    looped, _ = pair
    _, cache = looped.run_with_cache(TOKENS)
    for firing in looped.schedule:
        for site in ("attn.hook_pattern", "attn.hook_attn_scores", "attn.hook_z", "hook_resid_pre"):
            assert f"{firing.prefix}.{site}" in cache, site
        pattern = cache[f"{firing.prefix}.attn.hook_pattern"]
        assert (pattern.sum(-1) - 1).abs().max() < 1e-5


def by_hand(model: Any, rule: str, alpha: float, times: int) -> Tensor:
    """The rules written out over the layers of an untouched copy."""
    parent, name = layers_of(model)
    layers = list(getattr(parent, name))
    calls: list[tuple[Any, Any]] = []

    class Last(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            anchor = calls[0]
            state = anchor
            for t in range(times):
                out = state
                for layer in layers[2:5]:
                    out = layer(out, **kwargs)
                if rule == "euler":
                    out = state + (out - state) / times
                elif rule == "ema":
                    out = (1 - alpha) * state + alpha * out
                elif rule == "input_anchor":
                    out = alpha * out + (1 - alpha) * anchor
                elif rule == "residual_scaled" and t == times - 1:
                    out = anchor + (out - anchor) / times
                state = out
            return state

    class Enter(nn.Module):
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            calls.append(x)
            return x

    setattr(parent, name, nn.ModuleList([*layers[:2], Enter(), Last(layers[4]), *layers[5:]]))
    model.config.num_hidden_layers = 5
    return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("rule", LOOP_RULES)
@pytest.mark.parametrize("times", [1, 2, 4])
@torch.no_grad()
def test_the_rules(rule: str, times: int) -> None:
    alpha = 0.3 if rule in ("ema", "input_anchor") else None
    model = decoder("llama")
    expected = by_hand(copy.deepcopy(model), rule, alpha or 0.0, times)
    looped = loop_lens.loopify(model, layers=range(2, 5), times=7, rule=rule, alpha=alpha)
    with looped.at_recurrences(times):
        assert (looped(TOKENS) - expected).abs().max() < 1e-5
        hooked, cache = looped.run_with_cache(TOKENS)
        assert (hooked - expected).abs().max() < 1e-5
        resumed = looped(cache["loop.0.blocks.0.hook_resid_pre"], start_at_layer=2)
        assert (resumed - expected).abs().max() < 1e-5
        if times > 1 and rule in ("residual_scaled", "input_anchor"):
            with pytest.raises(ValueError, match="from which the loop began"):
                looped(cache["loop.1.blocks.0.hook_resid_pre"], start_at_layer=5)
        elif times > 1:
            resumed = looped(cache["loop.1.blocks.0.hook_resid_pre"], start_at_layer=5)
            assert (resumed - expected).abs().max() < 1e-5


@pytest.mark.parametrize("rule", [r for r in LOOP_RULES if r != "naive"])
def test_in_place_patches_do_not_reach_what_a_rule_keeps(rule: str) -> None:
    alpha = 0.5 if rule in ("ema", "input_anchor") else None
    looped = loop_lens.loopify(decoder("llama"), layers=range(2, 5), times=3, rule=rule, alpha=alpha)

    def write(value: Tensor, hook: Any) -> Tensor:
        value[:, 3] = 1.0
        return value

    name = "loop.1.blocks.0.hook_resid_pre"
    a = looped.run_with_hooks(TOKENS, fwd_hooks=[(name, write)])
    b = looped.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda v, hook: write(v.clone(), hook))])
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": range(4, 8), "times": 2}, "layers 0-5"),
        ({"layers": [1, 3], "times": 2}, "neighbouring"),
        ({"layers": [3, 2], "times": 2}, "neighbouring"),
        ({"layers": [], "times": 2}, "empty"),
        ({"layers": [2], "times": 0}, "at least 1"),
        ({"layers": [2], "times": 1.5}, "whole number"),
        ({"layers": [2], "times": 2, "rule": "magic"}, "naive"),
        ({"layers": [2], "times": 2, "rule": "ema"}, "alpha"),
        ({"layers": [2], "times": 2, "alpha": 0.5}, "no alpha"),
    ],
)
def test_requests_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    model = decoder("llama")
    before = model(TOKENS).logits
    with pytest.raises(ValueError, match=says):
        loop_lens.loopify(model, **options)
    assert torch.equal(model(TOKENS).logits, before)
    assert type(model.model.layers[2]).__mro__[0].__module__.startswith("transformers")


def test_negative_layers_count_from_the_end() -> None:
    looped = loop_lens.loopify(decoder("llama"), layers=[-3, -2], times=2)
    assert [f.block for f in looped.schedule] == [0, 1, 2, 3, 4, 3, 4, 5]


def test_looped_and_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="wrap"):
        loop_lens.loopify(small_looped(), layers=[1], times=2)
    looped = loop_lens.loopify(decoder("llama"), layers=[1], times=2)
    with pytest.raises(ValueError, match="wrap"):
        loop_lens.loopify(looped, layers=[1], times=2)
    with pytest.raises(ValueError, match="config"):
        loop_lens.loopify(nn.Linear(2, 2), layers=[1], times=2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_saved_and_reopened(name: str, tmp_path: Path) -> None:
    looped = loop_lens.loopify(decoder(name), layers=range(2, 5), times=2, rule="euler")
    looped.set_recurrences(3)
    logits = looped(TOKENS)
    looped.save_pretrained(tmp_path)
    again = loop_lens.boot(tmp_path)
    assert again.recurrences == 3 and str(again.schedule) == str(looped.schedule)
    assert torch.equal(again(TOKENS), logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_compatibility_mode(name: str) -> None:
    looped = loop_lens.loopify(decoder(name), layers=range(2, 5), times=3)
    before = looped(TOKENS).log_softmax(-1)
    looped.enable_compatibility_mode(disable_warnings=True)
    assert (looped(TOKENS).log_softmax(-1) - before).abs().max() < 1e-4
    hooked, _ = looped.run_with_cache(TOKENS)
    assert (hooked.log_softmax(-1) - before).abs().max() < 1e-4
    for i in (2, 3, 4):
        assert (
            looped.blocks[i].attn.o.original_component.weight
            is looped.blocks[i + 3].attn.o.original_component.weight
        )


@pytest.mark.filterwarnings("ignore:.*norm weights stay unfolded")
@pytest.mark.parametrize("name", ["olmo2", "phi3"])
def test_what_can_be_processed_is_where_norms_follow_branches_or_projections_are_fused(name: str) -> None:
    looped = loop_lens.loopify(decoder(name), layers=range(2, 5), times=3)
    before = looped(TOKENS).log_softmax(-1)
    looped.enable_compatibility_mode(disable_warnings=True)
    assert looped.W_U.mean(-1).abs().max() < 1e-6
    for logits in (looped(TOKENS), looped.run_with_cache(TOKENS)[0]):
        assert (logits.log_softmax(-1) - before).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_hooked_follows_bare_through_moves_and_training(name: str) -> None:
    looped = loop_lens.loopify(decoder(name), layers=range(2, 5), times=2)
    list(looped.blocks)
    optimizer = torch.optim.SGD(looped.parameters(), lr=0.05)

    def agree(tolerance: float) -> None:
        with torch.no_grad():
            bare, (hooked, _) = looped(TOKENS), looped.run_with_cache(TOKENS)
        assert (bare - hooked).abs().max() < tolerance

    agree(1e-5)
    for _ in range(2):
        optimizer.zero_grad()
        looped(TOKENS, return_type="loss").backward()
        optimizer.step()
        agree(1e-5)
    looped.to(torch.float64)
    agree(1e-5)
    looped.to(torch.float32)
    looped(TOKENS, return_type="loss").backward()
    optimizer.step()
    agree(1e-5)


@pytest.mark.parametrize("name", ["Albert", "T5", "Mamba"])
def test_what_loopify_cannot_read_is_told_what_can_be_done(name: str) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    heads = {"Albert": "AlbertForMaskedLM", "T5": "T5ForConditionalGeneration", "Mamba": "MambaForCausalLM"}
    if name == "T5":
        sizes = {"vocab_size": 50, "d_model": 32, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    elif name == "Albert":
        sizes |= {"intermediate_size": 32, "embedding_size": 16}
    model = getattr(transformers, heads[name])(getattr(transformers, f"{name}Config")(**sizes))
    with pytest.raises(ValueError, match=r"wrap\(\) opens any model with a body=") as refused:
        loop_lens.loopify(model, layers=[1], times=2)
    assert len(str(refused.value)) < 400 and heads[name] in str(refused.value)
