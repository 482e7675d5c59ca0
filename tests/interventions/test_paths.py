"""Path patching: a linear model's paths add up; ends of the scale are plain patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loop_lens import HookedLoopedTransformer, UnknownNameError, patch_sweep
from loop_lens.interventions import PathNode, path_patch
from tests.interventions.models import difference, opened, prompts, wrapped


@torch.no_grad()
def linear_loop() -> HookedLoopedTransformer:
    """A loop that is linear to 1e-7: norms with a huge epsilon, MLPs without activation, no attention."""
    model = wrapped(
        rms_norm_eps=1e10,
        gated_mlp=False,
        hidden_act="linear",
        injection="linear",
        initial_state="zeros",
        core_layers=1,
    )
    for name, parameter in model.original_model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1e5)
        elif "o_proj" in name:
            parameter.zero_()
    model.set_recurrences(3)
    return model


@torch.no_grad()
def test_all_paths_add_up_to_the_full_patch_in_a_linear_loop() -> None:
    model = linear_loop()
    clean, corrupted = prompts(model)
    sender = PathNode("mlp_out", segment="prelude", layer=0)
    middle = [*(PathNode("mlp_out", t, 0) for t in range(3)), PathNode("mlp_out", segment="coda", layer=0)]

    def effect(**options: Any) -> float:
        found = path_patch(model, clean, corrupted, difference, senders=sender, **options)
        return found.effect[0, 0].item()

    # Every set of mediators, by inclusion and exclusion: what exactly this set passes on.
    subsets = [[m for k, m in enumerate(middle) if bits >> k & 1] for bits in range(16)]
    through = {bits: effect(mediators=subset) for bits, subset in enumerate(subsets)}
    exactly: dict[int, float] = {}
    for bits in range(16):
        inside = sum(value for other, value in exactly.items() if other & bits == other and other != bits)
        exactly[bits] = through[bits] - inside
    _, given = model.run_with_cache(clean)
    name = "prelude.blocks.0.hook_mlp_out"
    patched = model.run_with_hooks(corrupted, fwd_hooks=[(name, lambda value, hook: given[name])])
    full = (difference(patched) - difference(model(corrupted))).mean().item()
    assert sum(exactly.values()) == pytest.approx(full, abs=2e-4)
    # The path over the stream alone, in closed form: the prelude's output is injected three times.
    trunk, head = model.original_model.model, model.original_model.lm_head.weight
    _, base = model.run_with_cache(corrupted)
    delta = (given[name] - base[name])[:, -1]
    d = delta.shape[-1]
    w = trunk.injection.adapter.weight
    on_state, on_e = w[:, :d], w[:, d:]
    state = torch.zeros_like(delta)
    for _ in range(3):
        state = state @ on_state.T + delta @ on_e.T
    direct = (state @ head.T)[:, 3] - (state @ head.T)[:, 5]
    assert through[0] == pytest.approx(direct.mean().item(), abs=2e-4)
    assert abs(through[0]) > 5e-3 and len({round(v, 3) for v in exactly.values()}) > 5


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["huginn", "ouro", "retrofit_llama", "hrm_text", "looped_llama", "looped_gpt2"]
)
def test_over_all_paths_it_is_the_plain_patch(name: str) -> None:
    model = opened(name)
    clean, corrupted = prompts(model)
    its = model.schedule.iterations(model.schedule.innermost_loop)
    result = patch_sweep(model, clean, corrupted, difference, site="z", over=("iteration", "layer", "head"))
    senders = [PathNode("z", t, 0, h) for t in its[:2] for h in (0, 1)]
    paths = path_patch(model, clean, corrupted, difference, senders=senders, mediators="all")
    expected = [result.values[i, 0, h] for i in (0, 1) for h in (0, 1)]
    assert torch.allclose(paths.values[:, 0], torch.stack(expected), atol=1e-5)
    direct = path_patch(model, clean, corrupted, difference, senders=senders)
    assert (direct.effect - paths.effect).abs().max() > 0.05 * paths.effect.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", ["huginn", "ouro", "retrofit_olmo", "looped_llama"])
def test_from_head_to_head_by_hand(name: str) -> None:
    model = opened(name)
    clean, corrupted = prompts(model)
    sender, receiver = PathNode("z", 0, 0, 1), PathNode("q", 2, 0, 0)
    mediator = PathNode("mlp_out", 1, 0)
    result = path_patch(
        model, clean, corrupted, difference, senders=sender, receivers=[receiver, None], mediators=[mediator]
    )
    _, given = model.run_with_cache(clean)
    _, base = model.run_with_cache(corrupted)
    z, q = model.name("z", iteration=0, layer=0), model.name("q", iteration=2, layer=0)
    free = {model.name("attn_out", iteration=0, layer=0), model.name("mlp_out", iteration=1, layer=0)}

    def send(value: Tensor, hook: Any) -> Tensor:
        value[:, :, 1] = given[z][:, :, 1]
        return value

    seen: dict[str, Tensor] = {}
    hooks: list[Any] = [(z, send), (q, lambda value, hook: seen.update(q=value.clone()))]
    for firing in list(model.schedule)[model.schedule.find("loop", 0, 0).index :]:
        for out in ("hook_attn_out", "hook_mlp_out"):
            key = f"{firing.prefix}.{out}"
            if key not in free:
                hooks.append((key, lambda value, hook, key=key: base[key].clone()))
    held = difference(model.run_with_hooks(corrupted, fwd_hooks=hooks)).mean()
    assert result.values[0, 1] == pytest.approx(held.item(), abs=1e-5)

    def receive(value: Tensor, hook: Any) -> Tensor:
        value[:, :, 0] = seen["q"][:, :, 0]
        return value

    there = difference(model.run_with_hooks(corrupted, fwd_hooks=[(q, receive)])).mean()
    assert result.values[0, 0] == pytest.approx(there.item(), abs=1e-5)
    assert abs(result.effect[0, 1]) > 1e-4


@torch.no_grad()
def test_a_single_head_may_mediate() -> None:
    model = opened("ouro")
    clean, corrupted = prompts(model)
    sender = PathNode("mlp_out", 0, 0)
    heads = range(model.cfg.n_heads)
    one = path_patch(
        model, clean, corrupted, difference, senders=sender, mediators=[PathNode("z", 1, 0, h) for h in heads]
    )
    whole = path_patch(
        model, clean, corrupted, difference, senders=sender, mediators=[PathNode("attn_out", 1, 0)]
    )
    assert torch.allclose(one.values, whole.values, atol=1e-5)
    some = path_patch(model, clean, corrupted, difference, senders=sender, mediators=[PathNode("z", 1, 0, 0)])
    none = path_patch(model, clean, corrupted, difference, senders=sender)
    assert len({round(r.values.item(), 6) for r in (one, some, none)}) == 3


@torch.no_grad()
def test_the_table_the_picture_and_bad_requests() -> None:
    model = wrapped()
    clean, corrupted = prompts(model)
    senders = [PathNode("z", 0, 1, 2), PathNode("mlp_out", 1, 0)]
    result = path_patch(
        model, clean, corrupted, difference, senders=senders, receivers=[None, PathNode("q", 2, 0, 1)]
    )
    table = result.to_dataframe()
    assert list(table.sender) == ["t0.l1.z.h2"] * 2 + ["t1.l0.mlp_out"] * 2
    assert list(table.receiver) == ["logits", "t2.l0.q.h1"] * 2
    assert torch.allclose(torch.tensor(table.effect.to_list()).view(2, 2), result.effect)
    assert result.plot().axes[0].images[0].get_array().shape == (2, 2)

    def bad(says: str, error: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(error, match=says):
            path_patch(model, clean, corrupted, difference, **({"senders": senders} | options))

    bad("fires before", receivers=PathNode("q", 0, 0, 1), senders=PathNode("z", 1, 0))
    bad("neither attention", mediators=[PathNode("resid_post", 0, 1)])
    bad("has heads 0-2", senders=PathNode("z", 0, 0, 7))
    bad("names a head", senders=PathNode("mlp_out", 0, 0, 1))
    bad("iteration 9", UnknownNameError, senders=PathNode("z", 9, 0))
    bad("at least one", senders=[])
    assert not any(point.fwd_hooks for point in model.registry.existing())
