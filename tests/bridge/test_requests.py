"""Requests at the edge: whole numbers of any library, bounds that do not exist, nothing at all, caches that stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import loop_lens
from loop_lens.models.window import Window
from loop_lens.unrolling import Loop, UnknownNameError
from tests.bridge.kinds import KINDS, TOKENS, Pair, pair
from tests.oracles.twin import small_looped, tokenizer

PAIRS = {kind: pair(kind) for kind in KINDS}
WHOLE: dict[str, Any] = {
    "numpy": np.int64,
    "numpy of no dimension": np.array,
    "tensor": torch.tensor,
    "pandas": lambda n: pd.Series([n]).iloc[0],
}
NONE: list[Any] = [True, np.bool_(True), torch.tensor(True), 2.0, np.float64(2), torch.tensor([2]), "2"]


@pytest.fixture(params=KINDS)
def both(request: pytest.FixtureRequest) -> Pair:
    return PAIRS[request.param]


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers_of_any_library(both: Pair, kind: str) -> None:
    n, model = WHOLE[kind], both.model
    with model.at_recurrences(n(2)):
        assert type(model.recurrences) is int and model.recurrences == 2
        expected = model(TOKENS)
        assert torch.equal(model(TOKENS, recurrences=n(2)), expected)
    model.set_recurrences(n(3))
    loop = model.schedule.innermost_loop
    iteration = model.schedule.iterations(loop)[1]
    asked: Any = tuple(map(n, iteration)) if isinstance(iteration, tuple) else n(iteration)
    name = model.name("resid_post", iteration=iteration, layer=1)
    assert model.name("resid_post", iteration=asked, layer=n(1)) == name
    assert model.names("resid_post", iteration=asked, layer=n(1)) == [name]
    assert model.names("resid_post", iteration=[asked], layer=[n(1)]) == [name]
    assert model.schedule.find(loop, asked, n(1)).prefix == name.removesuffix(".hook_resid_post")
    assert model.schedule.site(name).at(asked).name == name
    stopped = model(TOKENS, stop_at_layer=n(2))
    assert torch.equal(stopped, model(TOKENS, stop_at_layer=2))
    if both.kind != "hrm":
        _, cache = model.run_with_cache(TOKENS)
        at: dict[str, Any] = {"prelude_out": cache["hook_prelude_out"]} if both.kind == "native" else {}
        stream = cache["blocks.2.hook_resid_pre"]
        assert torch.equal(
            model(stream, start_at_layer=n(2), **at),
            model(stream, start_at_layer=2 - len(model.blocks), **at),
        )


def test_arrays_of_iterations(both: Pair) -> None:
    if both.kind == "hrm":
        every = both.model.names("state_out", segment="H", iteration=np.array([0, 2]))
    else:
        every = both.model.names("state_out", iteration=torch.tensor([0, 2]))
        assert both.model.names("state_out", iteration=pd.Series([0, 2])) == every
    assert len(every) == 2


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers_of_windows_and_loops(kind: str) -> None:
    n = WHOLE[kind]
    window = Window.of([n(1), n(2)], n(3), "naive", None, 4)
    assert window == Window(1, 2, 3) and type(window.first) is type(window.times) is int
    assert type(Loop("loop", n(3)).times) is int


@pytest.mark.parametrize("value", NONE, ids=repr)
@pytest.mark.parametrize(
    "call",
    [
        lambda m, v: m.set_recurrences(v),
        lambda m, v: m.at_recurrences(v),
        lambda m, v: m(TOKENS, recurrences=v),
        lambda m, v: m.generate(TOKENS, recurrences=v),
        lambda m, v: m(TOKENS, stop_at_layer=v),
        lambda m, v: m.run_with_cache(TOKENS, start_at_layer=v),
        lambda m, v: m.schedule.find("loop", 0, v),
        lambda m, v: Window.of([1, 2], v, "naive", None, 4),
        lambda m, v: Window.of([1, v], 2, "naive", None, 4),
    ],
)
def test_what_is_no_whole_number_is_refused(call: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="whole number"):
        call(PAIRS["native"].model, value)
    assert PAIRS["native"].model.recurrences == 3


@pytest.mark.parametrize("run", ["forward", "run_with_cache", "run_with_hooks"])
@pytest.mark.parametrize("bound", ["start_at_layer", "stop_at_layer"])
@pytest.mark.parametrize("index", [-99, 99])
def test_bounds_that_do_not_exist(both: Pair, run: str, bound: str, index: int) -> None:
    given = torch.randn(2, 6, 24) if bound == "start_at_layer" else TOKENS
    with pytest.raises(ValueError, match=f"{bound}={index} does not exist: there are firings 0-"):
        getattr(both.model, run)(given, **{bound: index})


def test_a_forward_cannot_start_after_it_stops() -> None:
    with pytest.raises(ValueError, match="start_at_layer=3 comes after stop_at_layer=2"):
        PAIRS["native"].model(torch.randn(2, 6, 24), start_at_layer=3, stop_at_layer=2)


@pytest.mark.parametrize("nothing", [[], (), slice(7, None), np.array([], dtype=int)], ids=repr)
def test_no_iteration_is_a_mistake(nothing: Any) -> None:
    model = PAIRS["native"].model
    with pytest.raises(ValueError, match="chooses no iteration: there are 0 to 2"):
        model.names("state_out", iteration=nothing)
    with pytest.raises(ValueError, match="chooses no layer: there are 0 to 1"):
        model.names("resid_post", layer=nothing)


@pytest.mark.parametrize(
    "nothing",
    [torch.zeros(0, 5).long(), torch.zeros(1, 0).long(), torch.zeros(0, 5, 24), [], [[]], "", ["w1", ""]],
    ids=repr,
)
@pytest.mark.parametrize("run", ["forward", "run_with_cache", "run_with_hooks", "generate"])
def test_no_prompt_is_a_mistake(run: str, nothing: Any) -> None:
    model = loop_lens.wrap(small_looped(), tokenizer=tokenizer())
    with pytest.raises(ValueError, match=r"empty|no tokens|at least one"):
        getattr(model, run)(nothing, prepend_bos=False)


def test_a_predicate_caches_what_it_accepts(both: Pair) -> None:
    for ending in ("hook_resid_post", "hook_resid_pre", "hook_out"):
        _, cache = both.model.run_with_cache(TOKENS, names_filter=lambda n, e=ending: n.endswith(f".{e}"))
        assert cache and all(name.endswith(f".{ending}") for name in cache)
    _, cache = both.model.run_with_cache(TOKENS, names_filter=lambda n: n.endswith("hook_resid_post"))
    assert len(cache) == len(both.model.schedule)
    _, plain = both.model.run_with_cache(
        TOKENS, names_filter=lambda n: n.endswith("hook_resid_post"), return_cache_object=False
    )
    assert list(plain) == list(cache)


def test_hooks_that_stay_keep_their_cache_live() -> None:
    torch.manual_seed(0)
    model = loop_lens.wrap(small_looped())
    name, other = model.name("resid_post", iteration=1, layer=0), TOKENS.flip(1)
    for names in (name, [name], lambda n: n == name, None):
        _, expected = model.run_with_cache(other)
        _, live = model.run_with_cache(TOKENS, names_filter=names, reset_hooks_end=False)
        _, plain = model.run_with_cache(
            TOKENS, names_filter=names, reset_hooks_end=False, return_cache_object=False
        )
        model(other)
        model.reset_hooks()
        for key in [*live, name, "blocks.3.hook_resid_post"]:
            assert torch.equal(live[key], expected[key]), key
        assert all(torch.equal(value, expected[key]) for key, value in plain.items())
        model(TOKENS)
        assert torch.equal(live[name], expected[name])


def test_the_bare_native_model_keeps_keys_and_values_of_every_firing() -> None:
    torch.manual_seed(0)
    bare = small_looped()
    expected = TOKENS
    for _ in range(4):
        expected = torch.cat([expected, bare(expected).logits[:, -1:].argmax(-1)], 1)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 47}
    mask = torch.ones_like(TOKENS)
    for use_cache in (True, False):
        assert torch.equal(
            bare.generate(TOKENS, attention_mask=mask, use_cache=use_cache, **options), expected
        )
    first = bare(TOKENS[:, :4], use_cache=True)
    second = bare(TOKENS[:, 4:], past_key_values=first.past_key_values)
    logits = torch.cat([first.logits, second.logits], 1)
    assert (logits - bare(TOKENS).logits).abs().max() < 1e-5
    assert bare(TOKENS, use_cache=False).past_key_values is None
    opened = loop_lens.wrap(bare)
    logits, cache = opened(TOKENS[:, :4], return_type="logits_and_cache")
    assert torch.equal(logits, first.logits)
    assert (opened(TOKENS[:, 4:], past_key_values=cache) - second.logits).abs().max() < 1e-5


def test_an_unknown_place_still_says_what_there_is() -> None:
    with pytest.raises(UnknownNameError, match="loop 0-2"):
        PAIRS["native"].model.name("resid_post", iteration=np.int64(5), layer=0)
