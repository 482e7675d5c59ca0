"""How often a forward iterates belongs to that run: threads, contexts in odd orders, interrupts, generation."""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import loop_lens
from tests.bridge.kinds import KINDS, TOKENS, Pair, pair
from tests.oracles.twin import small_looped

PACKAGE = str(Path(loop_lens.__file__).parent)


@pytest.fixture(params=KINDS)
def both(request: pytest.FixtureRequest) -> Pair:
    return pair(request.param)


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-5)


def in_threads(works: list[Any]) -> list[Any]:
    """What each of some functions gives, all run at once."""
    found: list[Any] = [None] * len(works)
    barrier = threading.Barrier(len(works))

    def run(i: int) -> None:
        barrier.wait()
        found[i] = works[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return found


def test_threads_run_numbers_of_their_own(both: Pair) -> None:
    expected = {r: both.expected(TOKENS, r) for r in (1, 2, 3, 5)}

    def work(r: int) -> Any:
        return lambda: [both.model(TOKENS, recurrences=r) for _ in range(8)]

    for r, results in zip(expected, in_threads([work(r) for r in expected]), strict=True):
        assert all(same(logits, expected[r]) for logits in results), r
    assert both.model.recurrences == 3 and same(both.model(TOKENS), expected[3])


def test_a_context_is_its_threads_own(both: Pair) -> None:
    with both.model.at_recurrences(5):
        (other,) = in_threads([lambda: (both.model.recurrences, both.model(TOKENS))])
        assert both.model.recurrences == 5
    assert other[0] == 3 and same(other[1], both.expected(TOKENS, 3))


def test_a_forward_keeps_its_number_when_the_models_own_changes(both: Pair) -> None:
    first = both.model.schedule[1].prefix
    hooks = [(f"{first}.hook_in", lambda value, hook: both.model.set_recurrences(2))]
    logits, cache = both.model.run_with_hooks(TOKENS, fwd_hooks=hooks), None
    assert same(logits, both.expected(TOKENS, 3))
    assert both.model.recurrences == 2 and same(both.model(TOKENS), both.expected(TOKENS, 2))
    with both.model.hooks(fwd_hooks=[(f"{first}.hook_in", lambda v, hook: both.model.set_recurrences(4))]):
        _, cache = both.model.run_with_cache(TOKENS)
    assert cache.over_iterations("state_out", segment=both.model.schedule.main_loop).shape[0] == 2
    assert both.model.recurrences == 4


@pytest.mark.parametrize("setting", ["config", "set_recurrences"])
def test_config_schedule_and_forward_are_one_truth(both: Pair, setting: str) -> None:
    config: Any = both.model.original_model.config
    if setting == "config" and both.kind == "native":
        config.recurrences = 1
    elif setting == "config" and both.kind == "hrm":
        config.H_cycles = 1
    else:  # an ordinary decoder's config says nothing of iterations
        both.model.set_recurrences(1)
    assert both.model.recurrences == 1 and same(both.model(TOKENS), both.expected(TOKENS, 1))
    assert both.model.cfg.n_layers == len(both.model.blocks) == len(both.model.schedule)
    _, cache = both.model.run_with_cache(TOKENS)
    last = both.model.schedule[-1]
    assert cache[f"{last.prefix}.hook_resid_post"] is cache["resid_post", len(both.model.blocks) - 1]
    if both.kind == "native":
        assert config.recurrences == 1
    if both.kind == "hrm":
        assert (config.H_cycles, config.num_hidden_layers) == (1, len(both.model.schedule))


def test_the_bare_native_model_takes_a_number_for_one_forward() -> None:
    both = pair("native")
    assert torch.equal(both.bare(TOKENS, recurrences=5).logits, both.expected(TOKENS, 5))
    assert both.bare.config.recurrences == 3
    with pytest.raises(ValueError, match="HookedLoopedTransformer"):
        both.model.original_model(TOKENS, recurrences=5)
    with pytest.raises(ValueError, match="at least 1"):
        both.bare(TOKENS, recurrences=0)


def test_all_steps_of_generation_run_the_same_number(both: Pair) -> None:
    tokens = TOKENS
    for _ in range(4):  # without a cache
        tokens = torch.cat([tokens, both.expected(tokens, 5)[:, -1:].argmax(-1)], dim=1)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False}
    assert torch.equal(both.model.generate(TOKENS, recurrences=5, **options), tokens)
    *_, last = both.model.generate_stream(TOKENS, recurrences=5, **options)
    seen: list[int] = []
    for _ in both.model.generate_stream(TOKENS, recurrences=5, max_tokens_per_yield=1, **options):
        seen.append(both.model.recurrences)
    assert len(seen) > 1 and set(seen) == {3}  # the caller's own number is left alone between steps
    assert last[0, -1] == tokens[0, -1]


def test_a_run_with_hooks_takes_names_of_its_number(both: Pair) -> None:
    with both.model.at_recurrences(5):
        deep = both.model.names("resid_post")[-1]
        n = len(both.model.schedule)
    seen: list[Tensor] = []
    logits = both.model.run_with_hooks(
        TOKENS, fwd_hooks=[(deep, lambda v, hook: seen.append(v))], recurrences=5
    )
    assert len(seen) == 1 and same(logits, both.expected(TOKENS, 5))
    _, cache = both.model.run_with_cache(TOKENS, recurrences=5)
    assert torch.allclose(cache[deep], seen[0], rtol=1e-4, atol=1e-4) and f"blocks.{n - 1}.hook_out" in cache
    assert both.model.recurrences == 3


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["enter", "leave", "set"]), st.integers(1, 9)), max_size=14))
def test_contexts_left_in_any_order(steps: list[tuple[str, int]]) -> None:
    model = _SHARED
    model.set_recurrences(3)
    base, open_contexts = 3, list[list[Any]]()  # the oracle: numbers of those not left, innermost last
    try:
        for what, n in steps:
            if what == "enter":
                context = model.at_recurrences(n)
                context.__enter__()
                open_contexts.append([context, n])
            elif what == "leave" and open_contexts:
                context, _ = open_contexts.pop(n % len(open_contexts))
                context.__exit__(None, None, None)
            elif what == "set":
                model.set_recurrences(n)
                if open_contexts:
                    open_contexts[-1][1] = n
                else:
                    base = n
            expected = open_contexts[-1][1] if open_contexts else base
            assert model.recurrences == expected and model.cfg.n_layers == 2 + 2 * expected
    finally:
        for context, _ in open_contexts:
            context.__exit__(None, None, None)
    assert model.recurrences == base == model.original_model.config.recurrences


_SHARED = loop_lens.wrap(small_looped())


def interrupted(work: Any, at: int) -> bool:
    """Run something and interrupt it at the n-th line of the package that it executes."""
    left = at

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def _forward(model: Any) -> None:
    model(TOKENS[:1, :2], recurrences=5)


def _within(model: Any) -> None:
    with model.at_recurrences(5):
        pass


def _cached(model: Any) -> None:
    model.run_with_cache(TOKENS[:1, :2], recurrences=5, names_filter="loop.4.hook_state_out")


@pytest.mark.parametrize("work", [_forward, _within, _cached])
def test_an_interrupt_leaves_the_number_as_it_was(work: Any) -> None:
    model = loop_lens.wrap(small_looped())
    expected = model(TOKENS)
    draw, at = random.Random(0), 1
    while interrupted(lambda: work(model), at):
        assert model.recurrences == 3 and model.cfg.n_layers == 8, at
        at += 1 if work is _within else draw.randint(1, 40)
    assert at > 10 and torch.equal(model(TOKENS), expected)
    assert not any(point.fwd_hooks for point in model.registry.existing())


def test_an_interrupt_while_setting_leaves_one_number_or_the_other(both: Pair) -> None:
    expected = {r: both.expected(TOKENS, r) for r in (3, 5)}
    at = 1
    while interrupted(lambda: both.model.set_recurrences(5), at):
        r = both.model.recurrences
        assert r in (3, 5) and same(both.model(TOKENS), expected[r])
        assert both.model.cfg.n_layers == len(both.model.blocks) == len(both.model.schedule)
        both.model.set_recurrences(3)
        at += 1
    assert at > 5
