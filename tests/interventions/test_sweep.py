"""A sweep gives what one whole forward per cell gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformer_lens.patching as stock
from torch import Tensor

import loop_lens
from loop_lens import UnknownNameError, patch_sweep
from loop_lens.interventions import (
    KL,
    LogitDiff,
    NextTokenLoss,
    Probability,
    Rank,
    ablate,
    add_noise,
    skip,
    steer,
    transplant,
)
from loop_lens.interventions.engine import Engine
from tests.interventions.models import MODELS, by_hand, difference, opened, prompts, wrapped
from tests.oracles.twin import untied_twin

STREAM = {
    "resid_pre": stock.get_act_patch_resid_pre,
    "resid_mid": stock.get_act_patch_resid_mid,
    "attn_out": stock.get_act_patch_attn_out,
    "mlp_out": stock.get_act_patch_mlp_out,
}
HEADS = {
    "z": stock.get_act_patch_attn_head_out_by_pos,
    "q": stock.get_act_patch_attn_head_q_by_pos,
    "k": stock.get_act_patch_attn_head_k_by_pos,
    "v": stock.get_act_patch_attn_head_v_by_pos,
}


@torch.no_grad()
@pytest.mark.parametrize("site", [*STREAM, *HEADS, "pattern"])
@pytest.mark.parametrize("kv_heads", [3, 1])
def test_the_untied_twin_under_transformer_lens(site: str, kv_heads: int) -> None:
    model, twin = untied_twin(num_key_value_heads=kv_heads)
    clean, corrupted = prompts(model)
    _, cache = twin.run_with_cache(clean)

    def metric(logits: Tensor) -> Tensor:
        return difference(logits).mean()

    if site in STREAM:
        over, theirs = ("firing", "position"), STREAM[site](twin, corrupted, cache, metric)
    elif site in HEADS:
        over, theirs = ("firing", "position", "head"), HEADS[site](twin, corrupted, cache, metric)
    else:
        patch = stock.get_act_patch_attn_head_pattern_by_pos
        over, theirs = ("firing", "head", "position"), patch(twin, corrupted, cache, metric)
    ours = patch_sweep(model, clean, corrupted, metric, site=site, over=over)
    theirs = theirs[..., : ours.values.shape[-1]]
    assert ours.values.shape == theirs.shape
    assert (ours.values - theirs).abs().max() < 1e-5
    assert ours.effect.abs().max() > 0.01
    assert ours.per_prompt is None


SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern")


@torch.no_grad()
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", MODELS)
def test_every_family_against_hooks_by_hand(name: str, site: str) -> None:
    model = opened(name)
    clean, corrupted = prompts(model)
    _, given = model.run_with_cache(clean, names_filter=model.names(site))
    axes = ("iteration", "layer", "position")
    result = patch_sweep(model, clean, corrupted, difference, site=site, over=axes)
    assert result.per_prompt is not None
    worst = changed = 0.0
    for i, t in enumerate(result.labels["iteration"]):
        for j, layer in enumerate(result.labels["layer"]):
            key = model.name(site, iteration=t, layer=layer)
            for p in range(clean.shape[1]):

                def patch(value: Tensor, hook: Any, key: str = key, p: int = p) -> Tensor:
                    where = (slice(None), slice(None), p) if site == "pattern" else (slice(None), p)
                    value[where] = given[key][where]
                    return value

                expected = by_hand(model, corrupted, {key: patch})
                worst = max(worst, float((result.per_prompt[i, j, p] - expected).abs().max()))
                changed = max(changed, float((expected - result.corrupted).abs().max()))
    scale = max(1.0, abs(result.clean), abs(result.corrupted))
    assert worst < 1e-5 * scale
    assert changed > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("site", ["state", "state_out", "injected", "injection"])
@pytest.mark.parametrize(
    "name", ["huginn", "ouro", "retrofit_llama", "retrofit_olmo", "hrm_text", "no_prelude", "given_state"]
)
def test_sites_between_blocks_against_hooks_by_hand(name: str, site: str) -> None:
    model = opened(name)
    if site.startswith("inject") and name == "ouro":
        with pytest.raises(UnknownNameError, match="does not exist in this model"):
            patch_sweep(model, *prompts(model), difference, site=site, over="iteration")
        return
    clean, corrupted = prompts(model)
    _, given = model.run_with_cache(clean)
    result = patch_sweep(model, clean, corrupted, difference, site=site, over=("iteration", "position"))
    assert result.per_prompt is not None
    hook = {"state": "state_in", "injection": "injected"}.get(site, site)
    for i, t in enumerate(result.labels["iteration"]):
        key = model.name(hook, iteration=t)
        before = key.replace("hook_injected", "hook_state_in")
        for p in range(2, clean.shape[1]):
            seen: list[Tensor] = []

            def keep(value: Tensor, hook: Any, seen: list[Tensor] = seen) -> None:
                seen.append(value.clone())

            def patch(
                value: Tensor, hook: Any, key: str = key, before: str = before, p: int = p, seen: Any = seen
            ) -> Tensor:
                new = given[key]
                if site == "injection" and name == "hrm_text":
                    new = seen[0] + (given[key] - given[before])
                elif site == "injection":
                    new = model.original_model.model.injection(seen[0], given["hook_prelude_out"])
                value[:, p] = new[:, p]
                return value

            expected = by_hand(model, corrupted, {before: keep, key: patch})
            scale = max(1.0, float(expected.abs().max()))
            assert (result.per_prompt[i, p] - expected).abs().max() < 2e-5 * scale


@torch.no_grad()
def test_axes_in_any_order_and_what_is_no_axis_is_patched_at_once() -> None:
    model = opened("ouro")
    clean, corrupted = prompts(model, n=1)
    _, given = model.run_with_cache(clean)
    result = patch_sweep(model, clean, corrupted, difference, site="z", over=("head", "iteration"))
    assert result.axes == ("head", "iteration")
    for h in result.labels["head"]:
        for t in result.labels["iteration"]:

            def patch(value: Tensor, hook: Any, h: int = h) -> Tensor:
                value[:, :, h] = given[hook.name][:, :, h]
                return value

            expected = by_hand(model, corrupted, dict.fromkeys(model.names("z", iteration=t), patch))
            assert abs(result.values[h, t] - expected.mean()) < 1e-5
    one = patch_sweep(
        model, clean, corrupted, difference, site="resid_pre", over="position", positions=[-1, 3]
    )
    assert one.values.shape == (2,)
    assert [position for position, _ in one.labels["position"]] == [clean.shape[1] - 1, 3]


@torch.no_grad()
def test_noising_swaps_the_roles() -> None:
    model = opened("huginn")
    clean, corrupted = prompts(model)
    there = patch_sweep(model, clean, corrupted, difference, site="resid_post", direction="noising")
    back = patch_sweep(model, corrupted, clean, difference, site="resid_post")
    assert torch.equal(there.values, back.values)
    assert there.clean == back.corrupted and there.corrupted == back.clean
    assert torch.equal(there.effect, back.effect)


@torch.no_grad()
def test_the_budget_changes_nothing_but_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("huginn")
    sizes: list[int] = []
    original = Engine.run

    def run(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(len(batch.cells))
        return original(self, batch, *args, **kwargs)

    def swept(budget: int) -> Tensor:
        sizes.clear()
        return patch_sweep(model, *prompts(model), difference, site="resid_pre", memory_budget=budget).values

    monkeypatch.setattr(Engine, "run", run)
    one = swept(1)
    assert set(sizes) == {1}
    for budget in (100_000, 1 << 30):
        assert (swept(budget) - one).abs().max() < 1e-5
        assert max(sizes) > 1


@torch.no_grad()
def test_work_that_a_patch_cannot_change_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("retrofit_llama")
    clean, corrupted = prompts(model, length=12)
    corrupted[:, :6] = clean[:, :6]
    starts: list[tuple[int, int]] = []
    original = Engine.run

    def run(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        starts.append((batch.start, batch.offset))
        return original(self, batch, *args, **kwargs)

    monkeypatch.setattr(Engine, "run", run)
    result = patch_sweep(model, clean, corrupted, difference, site="resid_pre")
    assert result.per_prompt is not None
    assert all(offset >= 6 for _, offset in starts) and all(start >= 0 for start, _ in starts)
    assert (result.values[:, :, :6] == result.corrupted).all()


@torch.no_grad()
def test_foreign_hooks_are_respected_by_running_whole_forwards() -> None:
    model = opened("ouro")
    clean, corrupted = prompts(model)
    name = model.name("mlp_out", iteration=1, layer=0)

    def odd(value: Tensor, hook: Any) -> Tensor:
        assert value.shape[:2] == clean.shape  # would not hold in a batch of copies
        return value * torch.arange(value.shape[1])[:, None] / 3

    key = model.name("resid_pre", iteration=0, layer=1)
    _, given = model.run_with_cache(clean)
    with model.hooks(fwd_hooks=[(name, odd)]):
        result = patch_sweep(model, clean, corrupted, difference, site="resid_pre")
        assert result.per_prompt is not None
        for p in range(2, 5):

            def patch(value: Tensor, hook: Any, p: int = p) -> Tensor:
                value[:, p] = given[key][:, p]
                return value

            expected = by_hand(model, corrupted, {key: patch})
            assert (result.per_prompt[0, 1, p] - expected).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["huginn", "ouro", "hrm_text", "looped_llama", "given_state"])
@pytest.mark.parametrize("kind", ["skip", "ablate", "steer", "add_noise", "transplant"])
def test_surgery_holds_inside_sweeps(name: str, kind: str) -> None:
    model = opened(name)
    clean, corrupted = prompts(model)
    first = model.schedule.iterations(model.schedule.innermost_loop)[1]
    vector = torch.randn(model.cfg.d_model)
    _, elsewhere = model.run_with_cache(corrupted.flip(1))
    surgery = {
        "add_noise": lambda: add_noise(model, 0.5, iterations=first),
        "transplant": lambda: transplant(model, "mlp_out", source=first, to=first, cache=elsewhere),
        "skip": lambda: skip(model, first),
        "ablate": lambda: ablate(model, "z", iterations=first, layers=0, positions=[3, 5], heads=[1]),
        "steer": lambda: steer(model, vector, iterations=first, layers=0, positions=[4]),
    }[kind]()
    with surgery:
        result = patch_sweep(model, clean, corrupted, difference, site="resid_post")
        _, given = model.run_with_cache(clean)
        assert result.per_prompt is not None
        for i, t in enumerate(result.labels["iteration"]):
            key = model.name("resid_post", iteration=t, layer=0)

            def patch(value: Tensor, hook: Any, key: str = key) -> Tensor:
                value[:, 4] = given[key][:, 4]
                return value

            expected = by_hand(model, corrupted, {key: patch})
            assert (result.per_prompt[i, 0, 4] - expected).abs().max() < 1e-5 * max(1, abs(result.clean))
    plain = patch_sweep(model, clean, corrupted, difference, site="resid_post")
    assert not torch.allclose(plain.values, result.values)


@torch.no_grad()
def test_metrics_of_our_own_read_what_functions_of_logits_read() -> None:
    model = wrapped(injection="linear", initial_state="noise")
    clean, corrupted = prompts(model)
    reference = model(clean)
    pairs: list[tuple[Any, Any]] = [
        (LogitDiff("w3", [5, 6]), lambda x: x[:, -1, 3] - x[[0, 1], -1, [5, 6]]),
        (Probability("w7", position=3), lambda x: x[:, 3].softmax(-1)[:, 7]),
        (Probability(7, log=True), lambda x: x[:, -1].log_softmax(-1)[:, 7]),
        (Rank(4, position=-2), lambda x: (x[:, -2] > x[:, -2, 4:5]).sum(-1).float()),
        (
            KL(reference),
            lambda x: torch.nn.functional.kl_div(
                x[:, -1].log_softmax(-1), reference[:, -1].log_softmax(-1), log_target=True, reduction="none"
            ).sum(-1),
        ),
        (
            NextTokenLoss(clean),
            lambda x: torch.nn.functional.cross_entropy(
                x[:, :-1].transpose(1, 2), clean[:, 1:], reduction="none"
            ).mean(-1),
        ),
    ]
    for ours, by_formula in pairs:
        a = patch_sweep(model, clean, corrupted, ours, site="resid_post")
        b = patch_sweep(model, clean, corrupted, by_formula, site="resid_post")
        assert (a.values - b.values).abs().max() < 1e-5
        assert a.per_prompt is not None and a.effect.abs().max() > 0


@torch.no_grad()
def test_the_table_and_the_picture() -> None:
    model = wrapped()
    result = patch_sweep(model, "w1 w2 w3", "w1 w5 w3", LogitDiff("w3", "w4"), site="resid_post")
    table = result.to_dataframe()
    assert list(table) == ["iteration", "layer", "position", "token", "value", "effect", "recovered"]
    assert len(table) == result.values.numel()
    row = table[(table.iteration == 2) & (table.layer == 1) & (table.position == 2)].iloc[0]
    assert row.token == "w5" and row.value == pytest.approx(result.values[2, 1, 2].item())
    assert row.recovered == pytest.approx((row.value - result.corrupted) / (result.clean - result.corrupted))
    figure = result.plot()
    assert [axes.get_title() for axes in figure.axes[:3]] == ["iteration 0", "iteration 1", "iteration 2"]
    drawn = figure.axes[1].images[0].get_array()
    assert torch.allclose(torch.as_tensor(drawn.data).float(), result.effect[1])
    with pytest.raises(AttributeError):
        result.values = torch.zeros(1)  # type: ignore[misc]


@torch.no_grad()
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_keeps_what_is_done_and_leaves_no_hooks(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened("huginn")
    clean, corrupted = prompts(model)
    whole = patch_sweep(model, clean, corrupted, difference, site="z", memory_budget=30_000)
    before = model(corrupted)
    original, calls = Engine.run, [0]

    def run(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            monkeypatch.setattr(model.body, "executor", interrupted)
        return original(self, *args, **kwargs)

    def interrupted(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(Engine, "run", run)
    with pytest.raises(error) as caught:
        patch_sweep(model, clean, corrupted, difference, site="z", memory_budget=30_000)
    monkeypatch.undo()
    partial = caught.value.partial  # type: ignore[attr-defined]
    done = ~partial.values.isnan()
    assert 0 < done.sum() < done.numel()
    assert torch.equal(partial.values[done], whole.values[done])
    assert not any(point.fwd_hooks for point in model.registry.existing())
    assert torch.equal(model(corrupted), before)


@torch.no_grad()
def test_bf16() -> None:
    model = loop_lens.wrap(
        wrapped().original_model.__class__(wrapped().original_model.config).bfloat16().eval()
    )
    clean, corrupted = prompts(model)
    result = patch_sweep(model, clean, corrupted, difference, site="resid_pre")
    assert result.values.isfinite().all()
    assert result.values[-1, -1, -1] != result.corrupted


REQUESTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"corrupted": torch.ones(2, 9, dtype=torch.long)}, ValueError, "equal length"),
    ({"corrupted": torch.ones(3, 7, dtype=torch.long)}, ValueError, "pair up"),
    ({"clean": torch.ones(2, 7)}, TypeError, "text or tokens"),
    ({"metric": lambda x: x}, ValueError, "metric returned a tensor of shape"),
    ({"metric": 3}, TypeError, "function of logits"),
    ({"metric": LogitDiff(3, 999)}, ValueError, "token 999 does not exist"),
    ({"metric": LogitDiff("w3", "w3 w4")}, ValueError, "2 tokens"),
    ({"metric": Probability(3, position=20)}, ValueError, "position 20 does not exist"),
    ({"site": "residual"}, UnknownNameError, "does not exist in this model"),
    ({"site": "exit_gate"}, UnknownNameError, "does not exist in this model"),
    ({"over": "time"}, ValueError, "axis 'time' is unknown"),
    ({"over": ("layer", "layer")}, ValueError, "each axis once"),
    ({"over": ("firing", "layer")}, ValueError, "iteration and a layer already"),
    ({"over": "head"}, ValueError, "has no heads"),
    ({"site": "state", "over": "layer"}, ValueError, "between blocks"),
    ({"iterations": 9}, UnknownNameError, "iteration 9 does not exist"),
    ({"layers": [7]}, UnknownNameError, "layer 7 does not exist"),
    ({"positions": [7]}, ValueError, "position 7 does not exist"),
    ({"site": "z", "over": "head", "heads": [3]}, ValueError, "head 3 does not exist"),
    ({"segment": "prelude"}, ValueError, "outside the loop"),
    ({"segment": "middle"}, UnknownNameError, "segment 'middle' does not exist"),
    ({"direction": "backwards"}, ValueError, "direction"),
    ({"memory_budget": 0}, ValueError, "memory_budget"),
]


@pytest.mark.parametrize(("request_", "error", "says"), REQUESTS, ids=[r[2] for r in REQUESTS])
def test_bad_requests_are_told_before_any_sweeping(
    request_: dict[str, Any], error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped()

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the sweep began")

    monkeypatch.setattr(Engine, "run", never)
    clean, corrupted = prompts(model)
    good: dict[str, Any] = {"clean": clean, "corrupted": corrupted, "metric": difference, "site": "resid_pre"}
    options = good | request_
    with pytest.raises(error, match=says):
        patch_sweep(model, options.pop("clean"), options.pop("corrupted"), options.pop("metric"), **options)
    assert not any(point.fwd_hooks for point in model.registry.existing())
