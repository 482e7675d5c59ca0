"""A keyword that nobody reads is refused, at every function that passes keywords on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import loop_lens
from loop_lens import LoopedConfig, LoopedTransformer
from loop_lens.models.native.config import LoopedConfig as Config
from tests.bridge.kinds import KINDS, TOKENS, Pair, pair
from tests.oracles.twin import small_looped

PAIRS = {kind: pair(kind) for kind in KINDS}
SHORT: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "stop_at_eos": False}
DOORS: dict[str, Any] = {
    "forward": lambda m, **kw: m(TOKENS, **kw),
    "run_with_hooks": lambda m, **kw: m.run_with_hooks(TOKENS, **kw),
    "run_with_cache": lambda m, **kw: m.run_with_cache(TOKENS, **kw),
    "hooks": lambda m, **kw: m.hooks(**kw),
    "generate": lambda m, **kw: m.generate(TOKENS, **SHORT, **kw),
    "generate_stream": lambda m, **kw: next(m.generate_stream(TOKENS, **SHORT, **kw)),
    "hf_generate": lambda m, **kw: m.hf_generate(TOKENS, **SHORT, **kw),
    "get_caching_hooks": lambda m, **kw: m.get_caching_hooks(**kw),
    "to_tokens": lambda m, **kw: m.to_tokens("w1", **kw),
    "accumulated_bias": lambda m, **kw: m.accumulated_bias(1, **kw),
    "enable_compatibility_mode": lambda m, **kw: m.enable_compatibility_mode(no_processing=True, **kw),
    "to": lambda m, **kw: m.to("cpu", **kw),
    "add_hook": lambda m, **kw: m.add_hook("hook_embed", print, **kw),
}
WRONG = (
    "num_steps",
    "total_ut_steps",
    "mean_recurrence",
    "H_cycles",
    "num_loops",
    "recurences",
    "name_filter",
    "zzz",
)


@pytest.fixture(params=KINDS)
def both(request: pytest.FixtureRequest) -> Pair:
    return PAIRS[request.param]


@pytest.mark.parametrize("keyword", WRONG)
@pytest.mark.parametrize("door", DOORS)
def test_unknown_keywords_raise(both: Pair, door: str, keyword: str) -> None:
    with pytest.raises((TypeError, loop_lens.NonAdditiveStreamError), match=f"{keyword}|sum"):
        DOORS[door](both.model, **{keyword: 1})


@pytest.mark.parametrize("door", ["forward", "run_with_hooks", "run_with_cache", "generate", "hf_generate"])
@pytest.mark.parametrize(
    "keyword", ["num_steps", "total_ut_steps", "mean_recurrence", "H_cycles", "num_loops"]
)
def test_a_familys_word_for_depth_is_answered(both: Pair, door: str, keyword: str) -> None:
    with pytest.raises(TypeError, match=r"the number of iterations is recurrences="):
        DOORS[door](both.model, **{keyword: 1})


@pytest.mark.parametrize(
    ("door", "keyword", "near"),
    [
        ("run_with_cache", "name_filter", "names_filter"),
        ("run_with_cache", "pos_slices", "pos_slice"),
        ("forward", "recurences", "recurrences"),
        ("forward", "return_types", "return_type"),
        ("run_with_hooks", "fwd_hook", "fwd_hooks"),
        ("generate", "max_tokens", "max_new_tokens"),
    ],
)
def test_the_nearest_name_is_told(both: Pair, door: str, keyword: str, near: str) -> None:
    with pytest.raises(TypeError, match=f"did you mean '{near}'"):
        DOORS[door](both.model, **{keyword: 1})


def test_hooks_are_not_taken_by_a_run_that_does_not_add_them(both: Pair) -> None:
    with pytest.raises(TypeError, match="fwd_hooks"):
        both.model.run_with_cache(TOKENS, fwd_hooks=[("hook_embed", lambda v, hook: 0 * v)])


def test_options_of_transformers_own_generation_are_told_where_to_go(both: Pair) -> None:
    with pytest.raises(TypeError, match="hf_generate"):
        both.model.generate(TOKENS, num_beams=2, **SHORT)


@pytest.mark.parametrize(
    "keywords",
    [
        {"attention_mask": torch.ones_like(TOKENS)},
        {"position_ids": torch.arange(6)[None]},
        {"use_cache": False},
        {"return_type": "logits", "prepend_bos": False},
        {"output_hidden_states": False},
        {"use_past_kv_cache": True},
    ],
)
def test_known_keywords_pass(both: Pair, keywords: dict[str, Any]) -> None:
    expected = both.model(TOKENS)
    assert torch.allclose(both.model(TOKENS, **keywords), expected, atol=1e-5)
    cached, _ = both.model.run_with_cache(TOKENS, device="cpu", names_filter="hook_embed", **keywords)
    assert torch.allclose(cached, expected, atol=1e-5)


def test_what_a_models_own_forward_reads_passes() -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x: Any, **kwargs: Any) -> Any:
            return kwargs["scale"] * x

    from loop_lens.bridge.doors import require_known

    class Stub:
        original_model = Scaled()

        def forward(self) -> None: ...

    require_known(Stub(), "forward", ["scale"])  # type: ignore[arg-type]


@pytest.mark.parametrize("keyword", [*WRONG, "fwd_hooks", "stop_at_layer"])
def test_the_native_models_own_forward_refuses(keyword: str) -> None:
    with pytest.raises(TypeError, match=keyword):
        small_looped()(TOKENS, **{keyword: 1})


def test_a_tokenizers_output_is_no_unknown_keyword() -> None:
    bare = small_looped()
    given = {"attention_mask": torch.ones_like(TOKENS), "token_type_ids": torch.zeros_like(TOKENS)}
    assert torch.equal(bare(TOKENS, **given).logits, bare(TOKENS).logits)


def test_the_number_of_labels_scales_the_loss_as_transformers_trainer_expects() -> None:
    bare = small_looped()
    mean, total = bare(TOKENS, labels=TOKENS).loss, bare(TOKENS, labels=TOKENS, num_items_in_batch=1).loss
    assert torch.allclose(total, 10 * mean)  # 2 x 5 places have a next token


@pytest.mark.parametrize(
    ("keyword", "near"),
    [
        ("recurences", "recurrences"),
        ("hidden_sizes", "hidden_size"),
        ("num_steps", "recurrences"),
        ("zzz", "zzz"),
    ],
)
def test_a_misspelt_option_of_the_config_raises(keyword: str, near: str) -> None:
    with pytest.raises(TypeError, match=near):
        LoopedConfig(**{keyword: 2})
    if keyword != "zzz":  # a config.json may hold what another version of transformers knows
        with pytest.raises(TypeError, match=near):
            Config.from_dict({**LoopedConfig().to_dict(), keyword: 2})


def test_what_transformers_knows_of_configs_passes(tmp_path: Any) -> None:
    config = LoopedConfig(
        recurrences=5,
        attn_implementation="eager",
        torch_dtype="float32",
        output_attentions=False,
        rope_theta=5e5,
    )
    assert config._attn_implementation == "eager" and config.rope_parameters["rope_theta"] == 5e5
    model = LoopedTransformer(config)
    model.save_pretrained(tmp_path)
    again = LoopedTransformer.from_pretrained(tmp_path)
    assert again.config.recurrences == 5 and again.config.rope_parameters == config.rope_parameters
    assert Config.from_dict(config.to_dict()).to_dict() == config.to_dict()
