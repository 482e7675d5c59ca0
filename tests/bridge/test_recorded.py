"""A cache speaks of the run that it was recorded in, whatever number of iterations the model is set to."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import loop_lens
from loop_lens import HookedLoopedTransformer
from loop_lens.interventions import ablate, transplant
from loop_lens.unrolling import UnknownNameError
from tests.bridge.kinds import KINDS, TOKENS, Pair, pair
from tests.oracles.twin import small_looped

RECORDED, NOW = (1, 3, 5), (1, 2, 4)


@pytest.fixture(params=KINDS)
def both(request: pytest.FixtureRequest) -> Pair:
    return pair(request.param)


@pytest.mark.parametrize("recorded", RECORDED)
@pytest.mark.parametrize("now", NOW)
def test_names_are_those_of_the_run(both: Pair, recorded: int, now: int) -> None:
    model = both.model
    with model.at_recurrences(recorded):
        _, cache = model.run_with_cache(TOKENS)
        every = {name: cache[name] for name in model.names("resid_post")}
        loop = model.schedule.innermost_loop
        grid, states = cache.grid("resid_post"), cache.over_iterations("state_out")
        accumulated, labels = cache.accumulated_resid(return_labels=True)
        gone = model.name("resid_post", iteration=model.schedule.iterations(loop)[-1], layer=0)
    model.set_recurrences(now)
    assert all(cache[name] is value for name, value in every.items())
    assert all(cache["resid_post", i] is value for i, value in enumerate(every.values()))
    assert cache["resid_post", -1] is list(every.values())[-1]
    assert torch.equal(cache.grid("resid_post"), grid) and torch.equal(
        cache.over_iterations("state_out"), states
    )
    again, names = cache.accumulated_resid(return_labels=True)
    assert torch.equal(again, accumulated) and names == labels
    assert gone in cache and gone in cache.apply_slice_to_batch_dim(0)
    with model.at_recurrences(7):
        deeper = model.name("resid_post", iteration=model.schedule.iterations(loop)[-1], layer=0)
        assert deeper not in cache
        with pytest.raises(KeyError):
            cache[deeper]


def test_a_value_goes_from_a_deeper_run_into_a_shallower_one() -> None:
    torch.manual_seed(0)
    model = loop_lens.wrap(small_looped())
    _, cache = model.run_with_cache(TOKENS, recurrences=6)
    with transplant(model, "state_out", source=5, to=2, cache=cache):
        logits = model(TOKENS)
    assert torch.equal(logits, model(TOKENS, recurrences=6))
    with pytest.raises(UnknownNameError, match="0 to 5"):
        transplant(model, "state_out", source=6, to=2, cache=cache)
    with transplant(model, "resid_post", source=None, to=None, segment="coda", cache=cache):
        assert torch.equal(model(TOKENS), model(TOKENS, recurrences=6))


def test_a_reference_of_another_number_of_iterations_is_read_by_iteration() -> None:
    torch.manual_seed(0)
    model = loop_lens.wrap(small_looped())
    _, reference = model.run_with_cache(TOKENS, recurrences=5)
    mean = reference["coda.blocks.0.hook_resid_post"].mean((0, 1))
    with ablate(model, "resid_post", "mean", reference=reference, segment="coda"):
        _, cache = model.run_with_cache(TOKENS)
    assert torch.allclose(cache["coda.blocks.0.hook_resid_post"][0, 0], mean, atol=1e-6)
    with pytest.raises(KeyError), model.at_recurrences(7):
        ablate(model, "resid_post", "mean", reference=reference, iterations=6)


def test_a_hook_point_has_the_name_of_the_present_number() -> None:
    torch.manual_seed(0)
    model: HookedLoopedTransformer = loop_lens.wrap(small_looped())
    seen: list[Any] = []
    model.add_hook("coda.blocks.0.hook_resid_post", lambda v, hook: seen.append(hook.name))
    for recurrences in (3, 1, 5, 3):
        model(TOKENS, recurrences=recurrences)
        with model.at_recurrences(recurrences):
            assert model.hook_dict["coda.blocks.0.hook_resid_post"].name == seen[-1]
    assert seen == [f"blocks.{1 + 2 * r}.hook_out" for r in (3, 1, 5, 3)]


def test_blocks_are_let_go_when_the_number_goes_down_except_hooked_ones() -> None:
    torch.manual_seed(0)
    model: HookedLoopedTransformer = loop_lens.wrap(small_looped(recurrences=20))
    model.run_with_cache(TOKENS)
    seen: list[Any] = []
    model.add_hook("loop.7.blocks.1.hook_resid_post", lambda v, hook: seen.append(hook.iteration))
    gone = [weakref.ref(model.blocks.opened[f"loop.{t}.blocks.0"].bridge) for t in range(3, 20)]
    point = model.hook_dict["loop.9.blocks.0.hook_resid_post"]
    with model.at_recurrences(2):
        model(TOKENS)
    assert all(block() is not None for block in gone)  # a context ends
    model.set_recurrences(3)
    gc.collect()
    assert set(model.blocks.opened) == {firing.prefix for firing in model.schedule} | {"loop.7.blocks.1"}
    assert sum(block() is not None for block in gone) <= 1  # the one whose point is held here
    with pytest.raises(RuntimeError, match="by its name again"):
        point.add_hook(print)
    model.set_recurrences(20)
    logits, cache = model.run_with_cache(TOKENS)
    assert seen == [7] and torch.equal(logits, model(TOKENS)) and "loop.19.blocks.1.hook_resid_post" in cache
