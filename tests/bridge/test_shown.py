"""What a hook function is shown, and what messages list."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch

import loop_lens
from loop_lens import HookedLoopedTransformer
from loop_lens.interventions.edits import foreign_hooks
from tests.bridge.kinds import KINDS, TOKENS, Pair, pair

PAIRS = {kind: pair(kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def both(request: pytest.FixtureRequest) -> Pair:
    return PAIRS[request.param]


def spellings(model: HookedLoopedTransformer) -> list[str]:
    last = model.schedule.iterations(model.schedule.innermost_loop)[-1]
    inside = model.locate(model.name("resid_post", iteration=last, layer=1))
    between = model.name("state_out", iteration=last)
    return [inside.name, inside.flat, inside.canonical, between, "hook_embed"]


@pytest.mark.parametrize("way", ["run_with_hooks", "hooks", "batch"])
def test_the_name_is_the_one_asked_for(both: Pair, way: str) -> None:
    model = both.model
    for name in spellings(model):
        seen: list[Any] = []
        hook = (name, lambda value, hook, seen=seen: seen.append((hook.name, hook.iteration)))
        if way == "hooks":
            with model.hooks(fwd_hooks=[hook]):
                model(TOKENS)
        else:
            model.run_with_hooks(TOKENS[:1], fwd_hooks=[hook], remove_batch_dim=way == "batch")
        expected = None if name == "hook_embed" else model.locate(name).iteration
        assert seen == [(name, expected)]


def test_backward_hooks_and_hooks_for_good_know_their_iteration(both: Pair) -> None:
    model, name = both.model, spellings(both.model)[0]
    seen: list[Any] = []
    with model.hooks(bwd_hooks=[(name, lambda grad, hook: seen.append((hook.name, hook.iteration)))]):
        model(TOKENS, return_type="loss").backward()
    assert seen == [(name, model.locate(name).iteration)]
    seen.clear()
    model.add_hook(name, lambda value, hook: seen.append((hook.name, hook.iteration)))
    model(TOKENS)
    model.reset_hooks()
    assert seen == [(model.locate(name).canonical, model.locate(name).iteration)]


def test_the_rest_is_the_hook_points_own(both: Pair) -> None:
    model, name = both.model, spellings(both.model)[0]
    point = model.hook_dict[name]

    def keep(value: Any, hook: Any) -> None:
        hook.ctx["kept"] = value
        hook.pos_dim = 1
        assert hook.layer() == model.locate(name).place.index and hook.fwd_hooks is point.fwd_hooks

    model.run_with_hooks(TOKENS, fwd_hooks=[(name, keep)])
    assert "kept" in point.ctx and point.pos_dim == 1
    model.clear_contexts()


def test_each_point_that_a_predicate_accepts_is_shown_once(both: Pair) -> None:
    seen: list[Any] = []
    hooks = [(lambda n: n.endswith(("hook_resid_post", "hook_out")), lambda v, hook: seen.append(hook.name))]
    both.model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert len(seen) == len(set(seen)) >= len(both.model.schedule)
    before = list(seen)
    seen.clear()
    both.model.add_hook(*hooks[0])
    both.model(TOKENS)
    both.model.reset_hooks()
    assert seen == before


def test_caching_hooks_of_transformer_lens_store_under_its_names(both: Pair) -> None:
    name = spellings(both.model)[1]
    cache, forward, _ = both.model.get_caching_hooks(lambda n: n == name)
    both.model.run_with_hooks(TOKENS, fwd_hooks=forward)
    _, expected = both.model.run_with_cache(TOKENS, names_filter=[name])
    assert set(cache) == {name, both.model.locate(name).canonical} == set(expected.keys())
    assert all(torch.equal(value, expected[key]) for key, value in cache.items())


def test_a_users_hook_is_told_from_an_edit() -> None:
    model = PAIRS["native"].model
    with model.hooks(fwd_hooks=[("loop.1.hook_state_in", lambda v, hook: None)]):
        assert foreign_hooks(model) == ["loop.1.hook_state_in"]
    with loop_lens.interventions.skip(model, 1):
        assert foreign_hooks(model) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.name("reside_post", iteration=(0, 0) if "L" in m.schedule.loops else 0, layer=0),
        lambda m: m.locate(f"{m.schedule[1].prefix}.hook_reside_post"),
        lambda m: m.hook_dict["blocks.99.hook_in"],
        lambda m: loop_lens.interventions.skip(m, 99),
        lambda m: loop_lens.interventions.ablate(m, "reside_post"),
    ],
)
def test_messages_name_a_dozen_hooks_at_most(both: Pair, call: Any) -> None:
    with pytest.raises(KeyError) as caught:
        call(both.model)
    named = set(re.findall(r"[\w.]*hook_\w+", str(caught.value)))
    assert len([name for name in named if not re.search("reside|99|hook_dict", name)]) <= 12
    assert len(str(caught.value)) < 900
    if "reside" in str(caught.value):
        assert "hook_resid_post" in str(caught.value)


def test_a_warning_of_gated_hooks_names_a_dozen(both: Pair) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        both.model.run_with_cache(TOKENS, names_filter=lambda n: "attn" in n)
        both.model.run_with_hooks(TOKENS, fwd_hooks=[(lambda n: "attn" in n, lambda v, hook: None)])
    gated = [str(w.message) for w in caught if "gated-off" in str(w.message)]
    assert gated and all(len(text) < 700 for text in gated)
