"""Loop surgery does what hooks written by hand do, also in generation, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from loop_lens import HookedLoopedTransformer, UnknownNameError, patch_sweep
from loop_lens.interventions import (
    ablate,
    add_noise,
    edit,
    freeze,
    reorder,
    replace_injection,
    skip,
    steer,
    transplant,
)
from loop_lens.interventions.edits import active_edits
from tests.interventions.models import MODELS, difference, opened, prompts, wrapped

Model = HookedLoopedTransformer
Surgery = Callable[[Model], AbstractContextManager[Any]]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_transplanting_an_iteration_into_itself_changes_nothing(name: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model)
    logits, cache = model.run_with_cache(tokens, names_filter=model.names("resid_post"))
    t = model.schedule.iterations(model.schedule.innermost_loop)[1]
    for given in (None, cache):
        with transplant(model, "resid_post", source=t, to=[t], cache=given):
            assert torch.equal(model(tokens), logits)


@torch.no_grad()
@pytest.mark.parametrize("site", ["state_out", "resid_mid", "attn_out", "z", "v", "pattern"])
def test_transplants_by_hand(site: str) -> None:
    model = wrapped(injection="linear", initial_state="noise", block_norm="sandwich")
    tokens, other = prompts(model)
    between = site == "state_out"
    layers = None if between else [1]

    def name(t: int) -> str:
        return model.name(site, iteration=t, layer=None if between else 1)

    def hooks(values: dict[str, Tensor] | None, live: dict[str, Tensor]) -> list[Any]:
        def keep(value: Tensor, hook: Any) -> None:
            live["value"] = value.clone()

        def put(value: Tensor, hook: Any) -> Tensor:
            return live["value"] if values is None else values[name(0)]

        return [(name(0), keep), (name(1), put), (name(2), put)]

    by_hand = model.run_with_hooks(tokens, fwd_hooks=hooks(None, {}))
    with transplant(model, site, source=0, to=[1, 2], layers=layers):
        assert torch.equal(model(tokens), by_hand)
    with freeze(model, site, at=0, layers=layers):
        assert torch.equal(model(tokens), by_hand)
    _, cache = model.run_with_cache(other)
    by_hand = model.run_with_hooks(tokens, fwd_hooks=hooks(cache, {}))
    with transplant(model, site, source=0, to=[1, 2], layers=layers, cache=cache):
        assert torch.equal(model(tokens), by_hand)
    assert not torch.allclose(by_hand, model(tokens))


@torch.no_grad()
def test_positions_and_heads_of_a_transplant() -> None:
    model = opened("ouro")
    tokens, other = prompts(model)
    _, cache = model.run_with_cache(other)
    key = model.name("z", iteration=1, layer=0)

    def put(value: Tensor, hook: Any) -> Tensor:
        value[:, [2, 5], 1] = cache[key][:, [2, 5], 1]
        return value

    by_hand = model.run_with_hooks(tokens, fwd_hooks=[(key, put)])
    with transplant(model, "z", source=1, to=1, layers=0, cache=cache, positions=[2, 5], heads=[1]):
        assert torch.equal(model(tokens), by_hand)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_skipping_all_but_the_first_iteration_is_one_iteration(name: str) -> None:
    if name == "damped_llama":
        return  # its step size depends on the number of iterations
    model = opened(name)
    tokens, _ = prompts(model)
    loop = model.schedule.main_loop
    rest = model.schedule.iterations(loop)[1:]
    with model.at_recurrences(1):
        once = model(tokens)
    if name == "hrm_text":
        # The low-level state goes on through high-level iterations; skipped ones skip it too.
        with skip(model, rest, segment="H"):
            assert (model(tokens) - once).abs().max() < 1e-5
        return
    with skip(model, rest):
        assert (model(tokens) - once).abs().max() < 1e-5
    with reorder(model, [0]):
        assert (model(tokens) - once).abs().max() < 1e-5


@torch.no_grad()
def test_skipping_one_layer() -> None:
    model = opened("huginn")
    tokens, _ = prompts(model)
    enters = model.name("resid_pre", iteration=1, layer=0)
    leaves = model.name("resid_post", iteration=1, layer=0)
    live: list[Tensor] = []
    hooks: list[Any] = [
        (enters, lambda value, hook: live.append(value.clone())),
        (leaves, lambda value, hook: live[0]),
    ]
    by_hand = model.run_with_hooks(tokens, fwd_hooks=hooks)
    with skip(model, 1, layers=0):
        assert torch.equal(model(tokens), by_hand)


@torch.no_grad()
@pytest.mark.parametrize("name", ["huginn", "ouro", "looped_llama", "looped_gpt2", "hrm_text"])
def test_reordered_iterations_keep_their_names(name: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model)
    n = model.recurrences
    loop = model.schedule.main_loop
    plain = model(tokens)
    order = list(reversed(range(n)))
    fired: list[str] = []
    names = [f"{loop}.{t}.hook_state_out" for t in range(n)]
    hooks = [(key, lambda value, hook: fired.append(hook.name)) for key in names]
    with reorder(model, order):
        assert torch.equal(model(tokens), plain)  # shared weights: the order alone changes nothing
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert fired == [f"{loop}.{t}.hook_state_out" for t in order]
    with model.at_recurrences(n + 1):
        longer = model(tokens)
    with reorder(model, [*range(n), 0]):
        assert (model(tokens) - longer).abs().max() < 1e-5
        vector = torch.randn(model.cfg.d_model)
        with steer(model, vector, "state_out", iterations=0, segment=loop):
            twice = model(tokens)
    double = [(f"{loop}.{t}.hook_state_out", lambda value, hook: value + vector) for t in (0, n)]
    with model.at_recurrences(n + 1):
        assert (model.run_with_hooks(tokens, fwd_hooks=double) - twice).abs().max() < 1e-5
    assert torch.equal(model(tokens), plain) and model.recurrences == n


def test_reorder_refuses_what_makes_no_sense() -> None:
    model = opened("ouro")
    with pytest.raises(UnknownNameError, match="iteration 9 does not exist"), reorder(model, [9]):
        pass
    with pytest.raises(ValueError, match="empty"), reorder(model, []):
        pass
    with reorder(model, [1, 0]), pytest.raises(RuntimeError, match="another order"):
        model.set_recurrences(7)
    with pytest.raises(ZeroDivisionError), reorder(model, [0]):
        raise ZeroDivisionError
    assert model.body.order is None and model.original_model.config.recurrences == model.recurrences


@torch.no_grad()
def test_cutting_and_replacing_the_injection() -> None:
    model = opened("huginn")
    tokens, other = prompts(model)
    adapter = model.original_model.model.injection
    _, cache = model.run_with_cache(other)
    states: list[Tensor] = []

    def by_hand(make: Callable[[Tensor], Tensor], at: list[int]) -> Tensor:
        hooks: list[Any] = []
        for t in at:
            hooks.append((f"loop.{t}.hook_state_in", lambda value, hook: states.append(value.clone())))
            hooks.append((f"loop.{t}.hook_injected", lambda value, hook: make(states[-1])))
        return model.run_with_hooks(tokens, fwd_hooks=hooks)

    cases: list[tuple[Any, Tensor]] = [
        (replace_injection(model, None, [1, 2]), by_hand(lambda s: adapter(s, torch.zeros_like(s)), [1, 2])),
        (replace_injection(model, "bypass", 1), by_hand(lambda s: s, [1])),
        (
            replace_injection(model, cache["hook_prelude_out"], 2),
            by_hand(lambda s: adapter(s, cache["hook_prelude_out"]), [2]),
        ),
        (
            edit(model, "injection", lambda e, view: 2 * e, iterations=1),
            by_hand(lambda s: adapter(s, 2 * own), [1])
            if (own := _prelude_out(model, tokens)) is not None
            else None,
        ),
    ]
    for surgery, expected in cases:
        with surgery:
            assert torch.allclose(model(tokens), expected, atol=1e-6)
        assert not torch.allclose(model(tokens), expected, atol=1e-6)
    with pytest.raises(UnknownNameError, match="injected"):
        replace_injection(opened("ouro"), None)


def _prelude_out(model: Model, tokens: Tensor) -> Tensor:
    return model.run_with_cache(tokens, names_filter="hook_prelude_out")[1]["hook_prelude_out"]


@torch.no_grad()
def test_ablations() -> None:
    model = opened("ouro")
    tokens, other = prompts(model)
    _, reference = model.run_with_cache(torch.cat([tokens, other]).roll(1, 0))
    key = model.name("z", iteration=1, layer=0)

    def run(change: Callable[[Tensor], Tensor]) -> Tensor:
        return model.run_with_hooks(tokens, fwd_hooks=[(key, lambda value, hook: change(value))])

    options: dict[str, Any] = {"iterations": 1, "layers": 0}
    with ablate(model, "z", **options):
        assert torch.equal(model(tokens), run(torch.zeros_like))
    mean = reference[key].mean((0, 1), keepdim=True)
    with ablate(model, "z", "mean", reference=reference, **options):
        assert torch.equal(model(tokens), run(mean.expand_as))
    with ablate(model, "z", "resample", reference=reference, seed=4, **options):
        first = model(tokens)
        assert torch.equal(model(tokens), first)
    candidates = {
        tuple(pair): run(lambda value, pair=pair: reference[key][pair])
        for pair in ([a, b] for a in range(4) for b in range(4))
    }
    assert any(torch.equal(first, logits) for logits in candidates.values())
    with pytest.raises(ValueError, match="needs reference"):
        ablate(model, "z", "mean", **options)
    pattern = reference[model.name("pattern", iteration=1, layer=0)].mean(0, keepdim=True)
    with ablate(model, "pattern", "mean", reference=reference, **options):
        _, seen = model.run_with_cache(tokens)
    got = seen[model.name("pattern", iteration=1, layer=0)]
    assert torch.allclose(got, pattern.expand_as(got))


@torch.no_grad()
def test_noise_belongs_to_the_prompt_and_the_position() -> None:
    model = opened("huginn")
    tokens, _ = prompts(model)
    with add_noise(model, 0.5, seed=1):
        noisy, cache = model.run_with_cache(
            tokens, names_filter=["hook_initial_state", "loop.0.hook_state_in"]
        )
        shorter = model(tokens[:, :4])
        alone = model(tokens[:1])
    added = cache["loop.0.hook_state_in"] - cache["hook_initial_state"]
    assert added.std() == pytest.approx(0.5, rel=0.1) and added.mean().abs() < 0.1
    assert not torch.allclose(added[0], added[1])
    assert torch.allclose(noisy[:, :4], shorter, atol=1e-5)
    assert torch.allclose(noisy[:1], alone, atol=1e-5)
    with add_noise(model, 0.5, seed=2):
        assert not torch.allclose(model(tokens), noisy)


@torch.no_grad()
def test_stopping_early_is_a_smaller_number_of_iterations() -> None:
    model = opened("ouro")
    tokens, _ = prompts(model)
    with model.at_recurrences(2):
        assert torch.equal(model(tokens), model(tokens, recurrences=2))
        assert len(model.schedule) == 2 * len(model.body.blocks)


SURGERIES: dict[str, Surgery] = {
    "freeze pattern": lambda m: freeze(m, "pattern", at=_its(m)[0], layers=0),
    "freeze head": lambda m: freeze(m, "z", at=_its(m)[0], layers=0, heads=[1]),
    "skip": lambda m: skip(m, _its(m)[1]),
    "ablate": lambda m: ablate(m, "attn_out", iterations=_its(m)[1], layers=0, positions=[2, 7]),
    "steer": lambda m: steer(m, torch.ones(m.cfg.d_model), iterations=_its(m)[0], layers=0, positions=[8]),
    "add_noise": lambda m: add_noise(m, 0.3, iterations=_its(m)[1]),
}


def _its(model: Model) -> list[Any]:
    return list(model.schedule.iterations(model.schedule.innermost_loop))


@torch.no_grad()
@pytest.mark.parametrize("kind", SURGERIES)
@pytest.mark.parametrize("name", ["huginn", "ouro", "retrofit_llama", "hrm_text", "looped_llama"])
def test_in_generation_with_a_key_value_cache(name: str, kind: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model)
    plain = model(tokens)
    options: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "verbose": False,
        "stop_at_eos": False,
        "return_type": "tokens",
    }
    with SURGERIES[kind](model):
        step_by_step = tokens
        for _ in range(4):
            step_by_step = torch.cat([step_by_step, model(step_by_step)[:, -1:].argmax(-1)], 1)
        cached = model.generate(tokens, use_past_kv_cache=True, **options)
        changed = model(tokens)
    assert torch.equal(cached, step_by_step)
    if kind != "steer":
        assert not torch.allclose(changed, plain)
    assert torch.equal(model(tokens), plain)


@torch.no_grad()
def test_an_error_within_leaves_no_hooks_and_surgeries_nest() -> None:
    model = opened("ouro")
    tokens, _ = prompts(model)
    plain = model(tokens)
    outer = skip(model, 1)
    with pytest.raises(ZeroDivisionError), outer, ablate(model, "mlp_out", iterations=0):
        assert not torch.allclose(model(tokens), plain)
        raise ZeroDivisionError
    assert not any(point.fwd_hooks for point in model.registry.existing())
    with outer:  # may be entered again
        once = model(tokens)
        with pytest.raises(RuntimeError, match="in force already"), outer:
            pass
        assert torch.equal(model(tokens), once)
    assert torch.equal(model(tokens), plain)


def test_bad_surgery_is_told_at_once() -> None:
    model = wrapped()
    _, cache = model.run_with_cache(torch.tensor([[1, 2]]), names_filter="hook_prelude_out")
    with pytest.raises(ValueError, match="fires after"):
        transplant(model, "resid_post", source=2, to=1)
    with pytest.raises(UnknownNameError, match="the cache has no"):
        transplant(model, "resid_post", source=2, to=1, cache=cache)
    with pytest.raises(ValueError, match="is the last"):
        freeze(model, "z", at=2)
    with pytest.raises(UnknownNameError, match="iteration 8"):
        freeze(model, "z", at=8)
    with pytest.raises(ValueError, match="has no heads"):
        ablate(model, "mlp_out", heads=[0])
    with pytest.raises(ValueError, match="head 3 does not exist"):
        ablate(model, "z", heads=[3])
    with pytest.raises(ValueError, match="count from 0"):
        ablate(model, "z", positions=[-1])
    with pytest.raises(ValueError, match="unknown"):
        ablate(model, "z", "none")  # type: ignore[arg-type]
    with steer(model, torch.ones(3)), pytest.raises(ValueError, match="vector has shape"):
        model(torch.tensor([[1, 2]]))
    assert not any(point.fwd_hooks for point in model.registry.existing())


@torch.no_grad()
def test_at_a_fixed_point_late_transplants_change_little() -> None:
    # A contracting loop: small weights in the branches, and an injection that forgets the state.
    model = wrapped(injection="linear", initial_state="noise")
    trunk = model.original_model.model
    d = model.cfg.d_model
    trunk.injection.adapter.weight.copy_(torch.cat([0.4 * torch.eye(d), torch.eye(d)], 1))
    for name, parameter in model.original_model.named_parameters():
        if "core" in name and ("o_proj" in name or "down_proj" in name):
            parameter.mul_(0.1)
    model.set_recurrences(24)
    tokens, other = prompts(model)
    effects: list[float] = []
    for t in range(1, 24):
        with model.at_recurrences(t + 1):
            plain = difference(model(tokens))
            with transplant(model, "state_out", source=t - 1, to=[t]):
                effects.append(float((difference(model(tokens)) - plain).abs().max()))
    assert effects[0] > 1e-2 and effects[-1] < 1e-4 * effects[0]
    assert all(late < early for early, late in pairwise(effects[:9]))
    # The sweep agrees: what the state holds early on is forgotten by the end.
    result = patch_sweep(model, tokens, other, difference, site="state", over="iteration")
    reach = result.effect.abs()
    assert reach[0] < 1e-5 and reach[-1] > 1e-2 and reach[-1] > 10 * reach[-8]


@torch.no_grad()
def test_an_abandoned_surgery_ends_with_its_object() -> None:
    model = opened("huginn")
    tokens, _ = prompts(model)
    before = model(tokens)
    surgery = ablate(model, "z", iterations=1)
    surgery.__enter__()
    assert not torch.equal(model(tokens), before) and len(active_edits(model)) == 2
    del surgery
    assert torch.equal(model(tokens), before) and not active_edits(model)
    assert not any(point.fwd_hooks for point in model.registry.existing())


@torch.no_grad()
def test_hooks_that_were_reset_leave_no_edit_in_force() -> None:
    model = opened("huginn")
    with ablate(model, "z", iterations=1):
        model.reset_hooks()
        assert not active_edits(model)
    assert not active_edits(model)


@torch.no_grad()
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)])
def test_surgeries_are_left_in_any_order(order: tuple[int, ...]) -> None:
    model = opened("huginn")
    tokens, _ = prompts(model)

    vector = torch.linspace(-1, 1, model.cfg.d_model)
    three = [ablate(model, "z", iterations=1), steer(model, vector, iterations=0), skip(model, 2)]

    def within(chosen: list[Any]) -> Tensor:
        with ExitStack() as stack:
            for one in chosen:
                stack.enter_context(one)
            return model(tokens)

    rest = [[three[i] for i in range(3) if i not in order[: k + 1]] for k in range(3)]
    expected = [within(chosen) for chosen in rest]
    for one in three:
        one.__enter__()
    for index, logits in zip(order, expected, strict=True):
        three[index].__exit__(None, None, None)
        assert torch.equal(model(tokens), logits)
