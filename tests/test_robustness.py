"""Any number of iterations, dtypes, moves, requests that make no sense, and silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loop_lens
from loop_lens import HookedLoopedTransformer, LoopedConfig
from tests.conftest import GOLDENS
from tests.oracles.twin import small_looped, tokenizer

TOKENS = torch.randint(0, 46, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture()
def model() -> HookedLoopedTransformer:
    torch.manual_seed(0)
    return loop_lens.wrap(small_looped())


@pytest.mark.parametrize("recurrences", [1, 2, 64, 255, 512])
def test_any_number_of_iterations_with_the_same_weights(
    model: HookedLoopedTransformer, recurrences: int
) -> None:
    keys, parameters = list(model.state_dict()), list(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    model.set_recurrences(recurrences)
    assert model.recurrences == recurrences
    assert len(model.blocks) == model.cfg.n_layers == len(model.schedule) == 2 + 2 * recurrences
    assert list(model.state_dict()) == keys
    after = list(model.parameters())
    assert all(a is b for a, b in zip(parameters, after, strict=True))
    last = model.name("resid_post", iteration=recurrences - 1, layer=1)
    _, cache = model.run_with_cache(TOKENS, names_filter=last)
    assert cache[last] is cache[f"blocks.{2 * recurrences}.hook_resid_post"]
    model(TOKENS, return_type="loss").backward()
    optimizer.step()
    assert len(optimizer.state) == len(parameters)
    assert len(model.blocks.opened) == 1  # what nobody asks for is not made


def test_everything_at_five_hundred_firings(model: HookedLoopedTransformer) -> None:
    model.set_recurrences(255)
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS[:1, :2])
    assert torch.equal(logits, model(TOKENS[:1, :2]))
    assert cache.grid("pattern").shape[:2] == (255, 2)
    assert len({id(p) for block in model.blocks for p in block.parameters()}) < 60


@pytest.mark.parametrize("bad", [0, -1, 2.5, True, "3"])
def test_recurrences_that_make_no_sense(model: HookedLoopedTransformer, bad: Any) -> None:
    before = model(TOKENS)
    with pytest.raises(ValueError, match="at least 1"):
        model.set_recurrences(bad)
    with pytest.raises(ValueError, match="at least 1"), model.at_recurrences(bad):
        pass
    assert model.recurrences == 3 and torch.equal(model(TOKENS), before)
    with pytest.raises(ValueError, match="at least 1"):
        loop_lens.boot(GOLDENS / "ouro", recurrences=0)


def test_nested_loops_change_by_name() -> None:
    model = loop_lens.boot(GOLDENS / "hrm_text")
    model.set_recurrences(H=3, L=1)
    assert [loop.times for loop in model.schedule.loops.values()] == [3, 1]
    assert model(TOKENS).shape == (2, 6, 256) and model.recurrences == 3
    with pytest.raises(KeyError, match="H, L"):
        model.set_recurrences(M=2)
    with model.at_recurrences(1):
        assert len(model.blocks) == 4
    assert len(model.blocks) == 12


def test_one_forward_with_another_number(model: HookedLoopedTransformer) -> None:
    with model.at_recurrences(5):
        expected = model(TOKENS)
    assert torch.equal(model(TOKENS, recurrences=5), expected)
    assert model.recurrences == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_moves_keep_the_ties(model: HookedLoopedTransformer, dtype: torch.dtype) -> None:
    list(model.blocks)
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    core: Any = model.original_model.model.core
    for t in range(3):
        weight = model.blocks[1 + 2 * t].attn.q.original_component.weight
        assert weight is core[0].self_attn.q_proj.weight
    bare, (hooked, cache) = model(TOKENS), model.run_with_cache(TOKENS)
    assert bare.dtype == dtype and torch.equal(bare, hooked)
    assert cache["loop.1.hook_state_in"].dtype == dtype
    trunk: Any = model.original_model.model
    assert trunk.inner_norm.weight is model.ln_final.original_component.weight


def test_booting_in_bfloat16() -> None:
    model = loop_lens.boot(GOLDENS / "huginn", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.cfg.dtype == torch.bfloat16
    reference = loop_lens.boot(GOLDENS / "huginn")(TOKENS)
    logits = model(TOKENS)
    assert logits.dtype == torch.float32  # Huginn reads out in full precision
    assert (logits - reference).abs().max() < 0.2 * reference.std()
    assert torch.equal(model.run_with_cache(TOKENS)[0], logits)


def test_two_models_at_once() -> None:
    torch.manual_seed(0)
    a, b = loop_lens.wrap(small_looped()), loop_lens.wrap(small_looped(recurrences=5))
    expected = a(TOKENS), b(TOKENS)

    def run_other(value: Any, hook: Any) -> None:
        assert torch.equal(b.run_with_cache(TOKENS)[0], expected[1])

    assert torch.equal(a.run_with_hooks(TOKENS, fwd_hooks=[("loop.1.hook_state_in", run_other)]), expected[0])


def test_wrapping_twice_is_refused(model: HookedLoopedTransformer) -> None:
    with pytest.raises(ValueError, match="already"):
        loop_lens.wrap(model)
    with pytest.raises(ValueError, match="already"):
        loop_lens.wrap(model.original_model)
    assert model(TOKENS).isfinite().all()


@pytest.mark.parametrize("other", [nn.Linear(2, 2), nn.Sequential()])
def test_models_that_are_not_looped(other: nn.Module) -> None:
    with pytest.raises(loop_lens.UnknownFamilyError, match="loopify"):
        loop_lens.wrap(other)


def test_ordinary_models_are_sent_to_loopify() -> None:
    from tests.oracles.unrolled import decoder

    with pytest.raises(loop_lens.UnknownFamilyError, match="loopify"):
        loop_lens.wrap(decoder("llama"))


def test_a_bad_initial_state_leaves_the_model_usable() -> None:
    torch_model = small_looped()
    with pytest.raises(ValueError, match="initial_state"):
        loop_lens.wrap(torch_model, initial_state=torch.zeros(2, 2))
    model = loop_lens.wrap(small_looped(), initial_state=3)
    with pytest.raises(ValueError, match="initial_state"):
        model.initial_state = "ones"
    assert model.initial_state == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "multiple of 4 heads"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "must divide"),
        ({"recurrences": 0}, "at least 1"),
        ({"core_layers": 0}, "at least one core layer"),
        ({"prelude_layers": -1}, "negative"),
        ({"block_norm": "both"}, "sandwich"),
        ({"injection": "magic"}, "diagonal"),
        ({"initial_state": "ones"}, "noise"),
        ({"qk_norm": "some"}, "head"),
    ],
)
def test_impossible_configs(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LoopedConfig(**options)


def test_the_hook_dict_is_a_mapping(model: HookedLoopedTransformer) -> None:
    names = list(model.hook_dict)
    assert len(names) == len(set(names)) == len(model.hook_dict) > 100 * len(model.schedule) // 3
    assert all(name in model.hook_dict for name in names)
    assert "loop.0.blocks.0.hook_resid_pre" in model.hook_dict and "nope" not in model.hook_dict
    assert model.hook_dict.get("nope") is None
    assert len(model.hook_dict.items()) == len(names)
    assert set(model.mod_dict) >= set(names)


def test_native_models_generate_with_transformers_too() -> None:
    torch.manual_seed(0)
    bare = small_looped()
    expected = TOKENS
    with torch.no_grad():
        for _ in range(5):
            expected = torch.cat([expected, bare(expected).logits[:, -1:].argmax(-1)], 1)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 47}
    mask = torch.ones_like(TOKENS)
    assert torch.equal(bare.generate(TOKENS, attention_mask=mask, use_cache=False, **options), expected)
    model = loop_lens.wrap(bare)
    assert torch.equal(model.original_model.generate(TOKENS, attention_mask=mask, **options), expected)
    ours = model.generate(
        TOKENS, max_new_tokens=5, do_sample=False, verbose=False, stop_at_eos=False, use_past_kv_cache=True
    )
    assert torch.equal(ours, expected)


def test_text_goes_in(model: HookedLoopedTransformer) -> None:
    model = loop_lens.wrap(small_looped(), tokenizer=tokenizer())
    tokens = model.to_tokens("w1 w2 w3")
    assert tokens.tolist() == [[46, 1, 2, 3]]
    assert torch.equal(model("w1 w2 w3"), model(tokens))
    assert torch.equal(model.run_with_cache("w1 w2 w3")[0], model(tokens))


def test_nothing_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = loop_lens.boot(GOLDENS / "huginn", device="cpu")
    model.to(torch.float64).cpu()
    model.run_with_cache(TOKENS)
    model.save_pretrained(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_models_own_loop_can_be_described() -> None:
    """``wrap`` takes any looped model, given its schedule and how to read its blocks."""
    from loop_lens.models.kind import bridge_config
    from loop_lens.models.native.adapter import LoopedAdapter
    from loop_lens.models.native.body import NativeBody

    torch.manual_seed(0)
    torch_model = small_looped()
    expected = torch_model(TOKENS).logits
    adapter = LoopedAdapter(bridge_config(torch_model, "mine"), torch_model.config)
    model = loop_lens.wrap(torch_model, body=NativeBody(torch_model), adapter=adapter)
    assert torch.equal(model.run_with_cache(TOKENS)[0], expected)
    with pytest.raises(ValueError, match="go together"):
        loop_lens.wrap(small_looped(), adapter=adapter)
