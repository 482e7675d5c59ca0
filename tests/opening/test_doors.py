"""What `wrap` and `loopify` are given: they take it, or say what to give, and change nothing by refusing."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import loop_lens
from loop_lens.interventions import LogitDiff, patch_sweep
from loop_lens.prompts import batches_of, token_ids
from loop_lens.training import Curriculum, Fixed, LogNormalPoisson, Ramp, TrainingConfig, Uniform
from tests.oracles.twin import small_looped

IDS = torch.tensor([[1, 2, 3]])


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_layer=3, n_embd=16, n_head=2, n_positions=32)).eval()


def adapted() -> Any:
    return get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn"], init_lora_weights=False)).eval()


def native() -> Any:
    sizes = {
        "d_model": 16,
        "n_heads": 2,
        "d_head": 8,
        "n_layers": 3,
        "n_ctx": 16,
        "d_vocab": 20,
        "act_fn": "gelu",
    }
    return TransformerBridge.boot_native(sizes)  # type: ignore[attr-defined]


GIVEN: dict[str, tuple[Callable[[], Any], str]] = {
    "peft": (adapted, r"PeftModel.*merge_and_unload\(\)"),
    "compiled": (lambda: torch.compile(gpt2()), r"compiled model.*model\._orig_mod"),
    "parallel": (lambda: torch.nn.DataParallel(gpt2()), r"DataParallel.*model\.module"),
    "a bridge": (native, "TransformerBridge.*torch model itself"),
    "open": (lambda: loop_lens.loopify(gpt2(), layers=[1], times=2).original_model, "unrolled already"),
    "opened": (lambda: loop_lens.loopify(gpt2(), layers=[1], times=2), "already"),
    "open native": (lambda: loop_lens.wrap(small_looped()).original_model, "unrolled already"),
}


@pytest.mark.parametrize(("make", "says"), GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize(
    "door",
    [loop_lens.wrap, lambda model: loop_lens.loopify(model, layers=[1], times=3)],
    ids=["wrap", "loopify"],
)
def test_what_is_wrapped_already_is_answered_with_what_to_give(make: Any, says: str, door: Any) -> None:
    given = make()
    modules = list(map(type, given.modules()))
    with pytest.raises(ValueError, match=says):
        door(given)
    assert list(map(type, given.modules())) == modules


@pytest.mark.parametrize(
    "door", [loop_lens.wrap, lambda model: loop_lens.loopify(model, layers=[1], times=3)]
)
def test_what_is_no_model_is_refused(door: Any) -> None:
    with pytest.raises(TypeError, match=r"boot\(\)"):
        door("gpt2")


def test_a_merged_model_is_what_the_adapters_made_of_it() -> None:
    model = adapted()
    expected = model(IDS).logits
    opened = loop_lens.loopify(model.merge_and_unload(), layers=[1], times=1)
    assert torch.allclose(opened.run_with_cache(IDS)[0], expected, atol=1e-5)


def test_a_refused_second_loop_leaves_the_first_one_working() -> None:
    base = gpt2()
    model = loop_lens.loopify(base, layers=[1], times=2)
    expected, cached = model.run_with_cache(IDS)
    with pytest.raises(ValueError, match="load it anew"):
        loop_lens.loopify(base, layers=[2], times=2)
    again, cache = model.run_with_cache(IDS)
    assert torch.equal(again, expected) and cache.keys() == cached.keys()


@pytest.mark.parametrize("what", ["model", "body", "original_model", "cache"])
@pytest.mark.parametrize(
    "by", [pickle.dumps, lambda thing: torch.save(thing, io.BytesIO())], ids=["pickle", "torch"]
)
def test_pickling_says_what_to_do(what: str, by: Any) -> None:
    model = loop_lens.wrap(small_looped())
    thing = {"model": model, "cache": model.run_with_cache(IDS)[1]}.get(what) or getattr(model, what)
    with pytest.raises(TypeError, match=r"save_pretrained\(folder\).*boot\(folder\)"):
        by(thing)


def test_a_deep_copy_stands_alone() -> None:
    model = loop_lens.loopify(gpt2(), layers=[1], times=2)
    copied, expected = copy.deepcopy(model), model(IDS)
    with torch.no_grad():
        next(iter(model.original_model.parameters())).add_(1)
    assert torch.equal(copied(IDS), expected) and not torch.equal(model(IDS), expected)


def words(unk: str | None, **special: str) -> PreTrainedTokenizerFast:
    vocabulary = {
        "a": 0,
        "b": 1,
        "c": 2,
        **({unk: 3} if unk else {}),
        **{t: 4 + i for i, t in enumerate(special.values())},
    }
    inner = Tokenizer(WordLevel(vocabulary, unk_token=unk) if unk else WordLevel(vocabulary))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=unk, **special)


@pytest.mark.parametrize("unk", ["<unk>", None])
@pytest.mark.parametrize(
    "special", [{}, {"pad_token": "<pad>"}, {"bos_token": "<s>"}, {"eos_token": "</s>"}], ids=str
)
def test_no_word_is_lost_to_a_token_that_the_tokenizer_lacks(
    unk: str | None, special: dict[str, str]
) -> None:
    model = loop_lens.loopify(gpt2(), layers=[1], times=2, tokenizer=words(unk, **special))
    tokens = model.to_tokens("a b c")[0].tolist()
    assert tokens[-3:] == [0, 1, 2] and 3 not in tokens
    assert len(tokens) == 3 if not ({"bos_token", "eos_token"} & special.keys()) else len(tokens) in (3, 4)
    assert torch.equal(model("a b c"), model(torch.tensor([tokens])))


def test_a_target_that_the_tokenizer_does_not_know_is_refused() -> None:
    model = loop_lens.loopify(gpt2(), layers=[1], times=2, tokenizer=words("<unk>"))
    for tokens in ("d", ["a", "d"]):
        with pytest.raises(ValueError, match="'d' is not in the vocabulary"):
            token_ids(model, tokens)
    assert token_ids(model, "<unk>").tolist() == [3]
    with pytest.raises(ValueError, match="not in the vocabulary"):
        patch_sweep(model, "a b", "a c", site="resid_post", metric=LogitDiff("d", "a"))


BROUGHT: dict[str, Callable[[int], Any]] = {
    "numpy": np.int64,
    "tensor": torch.tensor,
    "pandas": lambda n: pd.Series([n]).iloc[0],
    "uint8": np.uint8,
}


@pytest.mark.parametrize("whole", BROUGHT.values(), ids=BROUGHT)
def test_whole_numbers_of_any_kind_are_taken_at_every_door(whole: Callable[[int], Any]) -> None:
    model = loop_lens.loopify(gpt2(), layers=[whole(1), whole(2)], times=whole(2))
    assert model.body.config_fields["loop_lens"] == {
        "layers": [1, 2],
        "times": 2,
        "rule": "naive",
        "alpha": None,
    }
    assert type(model.body.config_fields["loop_lens"]["times"]) is int
    opened = loop_lens.wrap(small_looped(injection="linear", initial_state="noise"), initial_state=whole(3))
    assert opened.initial_state == 3 and type(opened.initial_state) is int
    assert [len(b.index) for b in batches_of(model, [[1, 2], [3]], whole(1))] == [1, 1]
    config = TrainingConfig(
        steps=whole(3),
        batch_size=whole(2),
        seed=whole(1),
        recurrences=Uniform(whole(1), whole(3), per_level=whole(1)),
        ramp=Ramp(whole(2)),
        curriculum=Curriculum((whole(1), whole(2)), window=whole(2), settle=whole(1)),
    )
    plain = TrainingConfig(
        steps=3,
        batch_size=2,
        seed=1,
        recurrences=Uniform(1, 3, 1),
        ramp=Ramp(2),
        curriculum=Curriculum((1, 2), window=2, settle=1),
    )
    assert config == plain and repr(config) == repr(plain)
    assert repr((Fixed(whole(2)), LogNormalPoisson(2, most=whole(4)))) == repr(
        (Fixed(2), LogNormalPoisson(2, most=4))
    )
    assert token_ids(model, whole(3)).tolist() == [3]
    assert token_ids(model, pd.Series([3, 4])).tolist() == [3, 4]  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [2.0, "2", True, None, [2], 0])
def test_what_is_no_whole_number_is_refused(wrong: Any) -> None:
    for use in (
        lambda: loop_lens.loopify(gpt2(), layers=[1], times=wrong),
        lambda: Fixed(wrong),
        lambda: Ramp(wrong),
        lambda: TrainingConfig(steps=wrong),
        lambda: Curriculum((1,), window=wrong),
    ):
        with pytest.raises(ValueError, match="must be a whole number of at least 1, got"):
            use()
