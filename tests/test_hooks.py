"""Hooks on firings: bitwise faithful, found under both names, gone when they should be."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loop_lens
from loop_lens import HookedLoopedTransformer, LoopedTransformer
from tests.oracles.twin import small_looped

TOKENS = torch.randint(0, 46, (2, 6), generator=torch.Generator().manual_seed(1))

KINDS: dict[str, dict[str, Any]] = {
    "pre, no injection": {"injection": "none", "initial_state": "prelude"},
    "pre, linear": {"injection": "linear", "num_key_value_heads": 1},
    "sandwich, loop norm, gate": {
        "block_norm": "sandwich",
        "loop_norm": True,
        "exit_gate": True,
        "injection": "none",
        "initial_state": "prelude",
        "prelude_layers": 0,
        "coda_layers": 0,
    },
    "post branch, qk norm": {"block_norm": "post_branch", "qk_norm": "full", "injection": "linear"},
    "post residual": {"block_norm": "post_residual", "post_loop_norm": True, "qk_bias": True},
    "diagonal, zeros": {
        "injection": "diagonal",
        "initial_state": "zeros",
        "prelude_norm": True,
        "state_projection": True,
        "qk_norm": "head_after_rope",
        "gated_mlp": False,
        "hidden_act": "relu2",
    },
    "add, biases": {"injection": "add", "attention_bias": True, "mlp_bias": True, "qk_norm": "head"},
}
# transformer-lens lists these on every model of this kind and never fires them.
NEVER = ("hook_pos_embed", "rotary_emb.hook_out", "attn.hook_hidden_states")


@pytest.fixture(params=KINDS)
def looped(request: pytest.FixtureRequest) -> tuple[HookedLoopedTransformer, LoopedTransformer]:
    torch.manual_seed(0)
    bare = small_looped(**KINDS[request.param])
    return loop_lens.wrap(copy.deepcopy(bare)), bare


@pytest.fixture()
def model() -> HookedLoopedTransformer:
    torch.manual_seed(0)
    return loop_lens.wrap(small_looped())


def by_hand(model: LoopedTransformer) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Run with torch hooks written by hand: every call of every submodule of every block, in order."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for segment in ("prelude", "core", "coda"):
        for i, block in enumerate(getattr(model.model, segment)):
            for name, module in block.named_modules():
                key = f"{segment}.{i}.{name}"

                def keep(m: nn.Module, args: Any, kwargs: Any, out: Any, key: str = key) -> None:
                    value = args[0] if args else kwargs.get("hidden_states")
                    seen.setdefault(f"{key}.in", []).append(value)
                    seen.setdefault(f"{key}.out", []).append(out[0] if isinstance(out, tuple) else out)

                handles.append(module.register_forward_hook(keep, with_kwargs=True))
    logits = model(TOKENS).logits
    for handle in handles:
        handle.remove()
    return logits, seen


def test_unhooked_is_the_bare_model(looped: Any) -> None:
    model, bare = looped
    assert torch.equal(model(TOKENS), bare(TOKENS).logits)


def test_looking_changes_nothing(looped: Any) -> None:
    model, bare = looped
    seen: list[str] = []
    logits = model.run_with_hooks(
        TOKENS, fwd_hooks=[(lambda name: True, lambda v, hook: seen.append(hook.name))]
    )
    assert torch.equal(logits, bare(TOKENS).logits)
    assert len(seen) == len(set(seen)) > 20 * len(model.schedule)


def test_every_listed_hook_fires_once_or_is_known_not_to(looped: Any) -> None:
    model, _ = looped
    _, cache = model.run_with_cache(TOKENS)
    missing = [n for n in model.hook_dict if n not in cache and model._gated_hook_reason(n) is None]
    gated = ("hook_mlp_in", "hook_attn_in", "hook_result", "_input")
    assert all(name.endswith((*NEVER, *gated)) for name in missing), missing


def test_cached_sites_are_what_hand_written_hooks_see(looped: Any) -> None:
    model, bare = looped
    logits, hand = by_hand(bare)
    ours, cache = model.run_with_cache(TOKENS)
    assert torch.equal(ours, logits)
    convention = bare.config.block_norm
    heads = bare.config.num_attention_heads
    calls: dict[str, int] = {}
    for firing in model.schedule:
        where = f"{'core' if firing.segment == 'loop' else firing.segment}.{firing.layer}."
        k = calls[where] = calls.get(where, -1) + 1

        def at(name: str, where: str = where, k: int = k) -> Tensor:
            return hand[where + name][k]

        def site(name: str, prefix: str = firing.prefix) -> Tensor:
            return cache[f"{prefix}.{name}"]

        flat = {name: site(f"attn.hook_{name}").flatten(2) for name in "qkvz"}
        for name in "qkv":
            assert torch.equal(flat[name], at(f"self_attn.{name}_proj.out"))
        assert torch.equal(flat["z"], at("self_attn.o_proj.in"))
        assert site("attn.hook_z").shape[2] == heads
        assert torch.equal(site("hook_resid_pre"), at(".in"))
        assert torch.equal(site("hook_resid_post"), at(".out"))
        post = {"sandwich": True, "post_branch": True}.get(convention, False)
        assert torch.equal(site("hook_attn_out"), at("attn_post_norm.out" if post else "self_attn.out"))
        assert torch.equal(site("hook_mlp_out"), at("mlp_post_norm.out" if post else "mlp.out"))
        mid = at("mlp.in" if convention == "post_branch" else "mlp_norm.in")
        assert torch.equal(site("hook_resid_mid"), mid)
        if convention != "post_residual":
            assert torch.equal(site("hook_resid_pre") + site("hook_attn_out"), mid)
            assert torch.equal(mid + site("hook_mlp_out"), site("hook_resid_post"))
        assert torch.equal(site("mlp.hook_post"), at("mlp.down_proj.in"))
        pattern, scores = site("attn.hook_pattern"), site("attn.hook_attn_scores")
        assert torch.equal(scores.softmax(-1), pattern)
        groups = heads // bare.config.num_key_value_heads
        values = site("attn.hook_v").repeat_interleave(groups, 2)
        mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, values)
        assert (mixed - site("attn.hook_z")).abs().max() < 1e-5
        rotated = torch.einsum(
            "bqhd,bkhd->bhqk", site("attn.hook_rot_q"), site("attn.hook_rot_k").repeat_interleave(groups, 2)
        )
        if bare.config.qk_norm != "head_after_rope":
            expected = (rotated * bare.config.head_dim**-0.5).tril()
            assert (expected - scores.tril()).abs().max() < 1e-5
        if convention != "post_branch":
            x = site("hook_resid_pre")
            scale = (x.pow(2).mean(-1, keepdim=True) + bare.config.rms_norm_eps).sqrt()
            assert (site("ln1.hook_scale") - scale).abs().max() < 1e-5


def test_head_results_sum_to_the_attention_output(looped: Any) -> None:
    model, bare = looped
    before = model(TOKENS)
    model.set_use_attn_result(True)
    logits, cache = model.run_with_cache(TOKENS)
    assert (logits - before).abs().max() < 1e-4
    bias = bare.config.attention_bias
    for firing in model.schedule:
        total = cache[f"{firing.prefix}.attn.hook_result"].sum(2)
        if bias:
            total = total + model.blocks[firing.index].attn.o.original_component.bias
        assert (total - cache[f"{firing.prefix}.attn.hook_out"]).abs().max() < 1e-5


def test_own_values_change_nothing(looped: Any) -> None:
    model, _ = looped
    logits, cache = model.run_with_cache(TOKENS)
    plain = [n for n in cache if not n.endswith(("hook_scale", "hook_normalized", "hook_scores"))]
    for name in plain[:: max(1, len(plain) // 60)]:
        patched = model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda v, hook, n=name: cache[n].clone())])
        assert (patched - logits).abs().max() < 1e-6, name
        if name.endswith(("resid_pre", "resid_post", "state_in", "state_out", "injected")):
            assert torch.equal(patched, logits), name


def test_a_patch_leaves_the_past_as_it_was(looped: Any) -> None:
    model, _ = looped
    _, clean = model.run_with_cache(TOKENS)
    names = [f"blocks.{i}.hook_resid_post" for i in range(len(model.blocks))]
    for firing in list(model.schedule)[:-1]:
        for hook in ("hook_resid_pre", "attn.hook_z", "mlp.hook_post"):

            def write(value: Tensor, hook: Any) -> Tensor:
                value += torch.randn_like(value)  # in place, as transformer-lens' helpers do
                return value

            with model.hooks(fwd_hooks=[(f"{firing.prefix}.{hook}", write)]):
                _, cache = model.run_with_cache(TOKENS, names_filter=names)
            for index, name in enumerate(names):
                same = torch.equal(cache[name], clean[name])
                if index < firing.index:
                    assert same, (firing.prefix, hook, name)
                elif index == firing.index:
                    assert not same


def test_both_spellings_name_one_tensor(model: HookedLoopedTransformer) -> None:
    _, cache = model.run_with_cache(TOKENS)
    for firing in model.schedule:
        for hook in ("hook_resid_post", "attn.hook_pattern", "mlp.hook_post", "ln1.hook_scale"):
            looped = cache[f"{firing.prefix}.{hook}"]
            assert looped is cache[f"blocks.{firing.index}.{hook}"]
            assert (
                model.hook_dict[f"{firing.prefix}.{hook}"] is model.hook_dict[f"blocks.{firing.index}.{hook}"]
            )


@pytest.mark.parametrize("name", ["loop.1.blocks.0.attn.hook_z", "blocks.3.attn.hook_z"])
def test_both_spellings_are_taken_everywhere(model: HookedLoopedTransformer, name: str) -> None:
    reference = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.3.attn.hook_z", lambda v, hook: v * 0)])
    assert not torch.equal(reference, model(TOKENS))
    zero = (name, lambda v, hook: v * 0)
    assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=[zero]), reference)
    assert torch.equal(
        model.run_with_hooks(TOKENS, fwd_hooks=[(lambda n: n == name, lambda v, hook: v * 0)]), reference
    )
    with model.hooks(fwd_hooks=[zero]):
        assert torch.equal(model(TOKENS), reference)
    model.add_hook(*zero)
    assert torch.equal(model(TOKENS), reference)
    model.reset_hooks()
    model.add_perma_hook(*zero)
    model.reset_hooks()
    assert torch.equal(model(TOKENS), reference)
    model.reset_hooks(including_permanent=True)
    assert not torch.equal(model(TOKENS), reference)
    for names_filter in (name, [name], lambda n: n == name):
        _, cache = model.run_with_cache(TOKENS, names_filter=names_filter)
        assert cache[name] is cache["blocks.3.attn.hook_z"] is cache["loop.1.blocks.0.attn.hook_z"]
        assert all(n.startswith("blocks.3.attn") for n in cache)
    _, plain = model.run_with_cache(TOKENS, names_filter=[name], return_cache_object=False)
    assert name in plain
    kept, hooks, _ = model.get_caching_hooks([name])
    model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert "blocks.3.attn.hook_z" in kept


def test_a_predicate_may_ask_for_one_iteration(model: HookedLoopedTransformer) -> None:
    _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: name.startswith("loop.2."))
    places = {model.locate(name).place.iteration for name in cache}
    assert places == {2}
    assert "loop.2.hook_state_in" in cache and "loop.2.blocks.1.hook_resid_mid" in cache


def test_hook_functions_see_names_that_the_cache_holds(model: HookedLoopedTransformer) -> None:
    _, cache = model.run_with_cache(TOKENS, names_filter=model.names("resid_post"))
    seen: list[Tensor] = []
    hooks = [(name, lambda v, hook: seen.append(cache[hook.name])) for name in model.names("resid_post")]
    model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert len(seen) == len(model.blocks)


def test_over_iterations_and_grid(model: HookedLoopedTransformer) -> None:
    _, cache = model.run_with_cache(TOKENS)
    grid = cache.grid("resid_post")
    assert grid.shape == (3, 2, 2, 6, 24)
    over = cache.over_iterations("pattern", layer=1)
    assert over.shape == (3, 2, 3, 6, 6)
    for t in range(3):
        assert torch.equal(over[t], cache[f"loop.{t}.blocks.1.attn.hook_pattern"])
        for layer in range(2):
            assert torch.equal(grid[t, layer], cache[f"loop.{t}.blocks.{layer}.hook_resid_post"])
    assert cache.over_iterations("state_out").shape == (3, 2, 6, 24)
    assert cache.over_iterations("resid_pre", layer=0, segment="coda").shape == (1, 2, 6, 24)
    _, partial = model.run_with_cache(TOKENS, names_filter="blocks.2.hook_resid_post")
    with pytest.raises(KeyError, match=r"loop\.0\.blocks\.0\.hook_resid_post"):
        partial.grid("resid_post")


def test_names(model: HookedLoopedTransformer) -> None:
    assert model.name("resid_post", iteration=2, layer=1) == "loop.2.blocks.1.hook_resid_post"
    assert model.name("resid_post", segment="coda", layer=0) == "coda.blocks.0.hook_resid_post"
    assert model.name("attn.hook_pattern", iteration=0, layer=0) == "loop.0.blocks.0.attn.hook_pattern"
    assert model.name("state_in", iteration=1) == "loop.1.hook_state_in"
    assert model.name("initial_state") == "hook_initial_state"
    assert model.names("pattern", iteration=slice(1, None), layer=1) == [
        "loop.1.blocks.1.attn.hook_pattern",
        "loop.2.blocks.1.attn.hook_pattern",
    ]
    assert model.names("z", iteration=[0, 2], layer=[0]) == [
        "loop.0.blocks.0.attn.hook_z",
        "loop.2.blocks.0.attn.hook_z",
    ]
    assert len(model.names("resid_pre")) == len(model.schedule)
    assert model.names("state_out") == [f"loop.{t}.hook_state_out" for t in range(3)]
    place, hook = model.locate("blocks.4.attn.hook_pattern")
    assert place == model.schedule[4] and hook == "attn.hook_pattern"
    assert model.locate("loop.1.blocks.1.attn.hook_pattern") == (place, hook)
    boundary, hook = model.locate("loop.2.hook_state_in")
    assert (boundary.segment, boundary.iteration, hook) == ("loop", 2, "hook_state_in")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.name("resid_post", iteration=3, layer=0), "loop 0-2"),
        (lambda m: m.name("resid_post", iteration=0, layer=2), "layers 0-1"),
        (lambda m: m.name("nothing", iteration=0, layer=0), "hook_resid_post"),
        (lambda m: m.name("resid_post", segment="middle", layer=0), "prelude, loop, coda"),
        (lambda m: m.name("exit_gate", iteration=0), "hook_state_in"),
        (lambda m: m.names("z", iteration=7, layer=0), "0 to 2"),
        (lambda m: m.locate("loop.0.blocks.5.hook_resid_post"), "layers 0-1"),
        (
            lambda m: m.run_with_hooks(TOKENS, fwd_hooks=[("loop.9.blocks.0.hook_resid_pre", print)]),
            "loop 0-2",
        ),
        (lambda m: m.run_with_cache(TOKENS, names_filter="blocks.99.hook_resid_pre"), "0-7"),
        (lambda m: m.run_with_cache(TOKENS, names_filter=["loop.0.blocks.0.attn.hook_nope"]), "attn.hook_z"),
        (lambda m: m.add_hook("loop.0.hook_nope", print), "hook_state_in"),
        (lambda m: m.hook_dict["nope"], "prelude has layers 0"),
        (lambda m: m.hooks(fwd_hooks=[("nope", print)]).__enter__(), "prelude has layers 0"),
    ],
)
def test_unknown_names_raise_and_say_what_there_is(
    model: HookedLoopedTransformer, call: Any, says: str
) -> None:
    before = model(TOKENS)
    with pytest.raises(KeyError, match=says):
        call(model)
    assert torch.equal(model(TOKENS), before)
    assert not any(point.fwd_hooks for point in model.registry.existing())


def test_stopping_and_starting_cache_only_what_ran(model: HookedLoopedTransformer) -> None:
    logits, clean = model.run_with_cache(TOKENS)
    out, cache = model.run_with_cache(TOKENS, stop_at_layer=5)
    assert torch.equal(out, clean["blocks.5.hook_resid_pre"])
    assert "loop.2.hook_state_in" in cache and "loop.2.blocks.0.hook_resid_pre" not in cache
    assert "loop.2.hook_state_out" not in cache and "ln_final.hook_in" not in cache
    prelude_out = clean["hook_prelude_out"]
    resumed, cache = model.run_with_cache(
        clean["blocks.3.hook_resid_pre"], start_at_layer=3, prelude_out=prelude_out
    )
    assert (resumed - logits).abs().max() < 1e-5
    assert all(torch.equal(cache[n], clean[n]) for n in cache if n in clean and "rotary" not in n)
    assert "loop.1.hook_injected" not in cache and "loop.1.hook_state_out" in cache
    assert "hook_prelude_out" not in cache and "loop.0.hook_state_in" not in cache


def test_hooks_stay_with_their_iteration(model: HookedLoopedTransformer) -> None:
    seen: list[str] = []
    model.add_hook("loop.2.blocks.1.hook_resid_post", lambda v, hook: seen.append(hook.name))
    model.add_hook("coda.blocks.0.hook_resid_post", lambda v, hook: seen.append(hook.name))
    model(TOKENS)
    assert seen == ["blocks.6.hook_out", "blocks.7.hook_out"]
    with model.at_recurrences(5):
        seen.clear()
        model(TOKENS)
        assert seen == ["blocks.6.hook_out", "blocks.11.hook_out"]
    with model.at_recurrences(1):
        seen.clear()
        model(TOKENS)
        assert seen == ["blocks.3.hook_out"]
    seen.clear()
    model(TOKENS)
    assert seen == ["blocks.6.hook_out", "blocks.7.hook_out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["loop.1.blocks.0.attn.hook_pattern", "loop.1.hook_state_in", "hook_embed"])
def test_a_hook_that_raises_leaves_nothing_behind(
    model: HookedLoopedTransformer, error: type[BaseException], name: str
) -> None:
    clean = model(TOKENS)

    def fail(value: Tensor, hook: Any) -> None:
        raise error("stop")

    with pytest.raises(error):
        model.run_with_hooks(TOKENS, fwd_hooks=[(name, fail)])
    with pytest.raises(error), model.hooks(fwd_hooks=[(name, fail)]):
        model(TOKENS)
    assert model.body.run is None
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.registry.existing())
    assert torch.equal(model(TOKENS), clean)
    _, cache = model.run_with_cache(TOKENS, names_filter=model.names("resid_post"))
    assert len({n for n in cache if n.endswith("hook_resid_post")}) == len(model.blocks)


def test_two_threads_at_once(model: HookedLoopedTransformer) -> None:
    inputs = [torch.randint(0, 46, (1, 5 + i)) for i in range(2)]
    expected = [model(tokens) for tokens in inputs]
    found: list[list[bool]] = [[], []]
    model.add_hook("loop.1.blocks.0.hook_resid_post", lambda v, hook: None)

    def work(which: int) -> None:
        for _ in range(30):
            found[which].append(torch.equal(model(inputs[which]), expected[which]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(f) for f in found] == [30, 30] and all(all(f) for f in found)


def test_a_hook_may_run_the_model(model: HookedLoopedTransformer) -> None:
    clean, other = model(TOKENS), model(TOKENS[:, :3])
    inner: list[Tensor] = []

    def nested(value: Tensor, hook: Any) -> None:
        if value.shape[1] == 6:
            inner.append(model(TOKENS[:, :3]))

    out = model.run_with_hooks(TOKENS, fwd_hooks=[("loop.1.blocks.0.hook_resid_post", nested)])
    assert torch.equal(out, clean) and torch.equal(inner[0], other)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes(model: HookedLoopedTransformer, mode: Any) -> None:
    clean = model(TOKENS).detach()
    with mode():
        logits, cache = model.run_with_cache(TOKENS)
        assert torch.equal(logits, clean)
        assert cache["loop.2.hook_state_out"].shape == (2, 6, 24)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(hooked: bool, reentrant: bool) -> None:
    torch.manual_seed(0)
    bare = small_looped()
    model = loop_lens.wrap(copy.deepcopy(bare))
    torch_model: Any = model.original_model
    torch_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    fired: list[str] = []
    if hooked:
        for name in ("loop.1.blocks.0.attn.hook_z", "loop.2.blocks.1.hook_resid_post"):
            model.add_hook(name, lambda v, hook: fired.append(hook.name))
    embeds = bare.model.embed_tokens(TOKENS).detach().requires_grad_()
    for _ in range(2):
        bare.zero_grad()
        torch_model.zero_grad()
        bare(inputs_embeds=embeds, labels=TOKENS).loss.backward()
        torch_model(inputs_embeds=embeds, labels=TOKENS).loss.backward()
        for (name, a), b in zip(bare.named_parameters(), torch_model.parameters(), strict=True):
            if a.grad is not None:
                assert (a.grad - b.grad).abs().max() < 1e-5, name
    assert len(fired) == (4 if hooked else 0)


def test_a_copy_is_independent(model: HookedLoopedTransformer) -> None:
    model.add_hook("loop.1.blocks.0.hook_resid_post", lambda v, hook: None)
    clean = model(TOKENS)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(TOKENS), clean)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    twin.set_recurrences(5)
    assert torch.equal(model(TOKENS), clean) and len(model.blocks) == 8
    assert not torch.equal(twin(TOKENS), clean)
    a, cache = twin.run_with_cache(TOKENS)
    assert torch.equal(a, twin(TOKENS)) and "loop.4.hook_state_in" in cache


def test_patching_an_attention_pattern_reaches_the_output_under_sdpa() -> None:
    torch.manual_seed(0)
    eager = small_looped()
    sdpa = copy.deepcopy(eager)
    sdpa.set_attn_implementation("sdpa")
    uniform = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
    results = [
        loop_lens.wrap(m).run_with_hooks(
            TOKENS, fwd_hooks=[("loop.1.blocks.0.attn.hook_pattern", lambda v, hook: uniform.expand_as(v))]
        )
        for m in (eager, sdpa)
    ]
    assert (results[0] - results[1]).abs().max() < 1e-5


def test_gradients_reach_pattern_hooks_under_sdpa() -> None:
    torch.manual_seed(0)
    eager = small_looped()
    sdpa = copy.deepcopy(eager)
    sdpa.set_attn_implementation("sdpa")
    grads = []
    for m in (eager, sdpa):
        _, cache = loop_lens.wrap(m).run_with_cache(TOKENS, incl_bwd=True, return_type="loss")
        grads.append(cache["loop.1.blocks.1.attn.hook_pattern_grad"])
    assert grads[0].abs().max() > 0 and (grads[0] - grads[1]).abs().max() < 1e-6


@pytest.mark.parametrize("in_place", [False, True])
def test_a_patch_between_the_branches_reaches_the_residual_connection(looped: Any, in_place: bool) -> None:
    model, _ = looped

    def write(value: Tensor, hook: Any) -> Tensor:
        return value.mul_(0) if in_place else value * 0

    name = "loop.1.blocks.0.hook_resid_mid"
    with model.hooks(fwd_hooks=[(name, write)]):
        _, cache = model.run_with_cache(TOKENS)
    out, branch = cache["loop.1.blocks.0.hook_resid_post"], cache["loop.1.blocks.0.hook_mlp_out"]
    if model.original_model.config.block_norm != "post_residual":
        assert torch.equal(out, branch)  # nothing but the MLP's output is left
    else:
        norm = model.blocks[model.locate(name).place.index].ln2_resid.original_component
        assert torch.equal(out, norm(branch))
