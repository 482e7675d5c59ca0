"""What holds for every schedule, name, config, set of patches and order of contexts, on draws of them.

Some hundreds are drawn in every run, 10,000 by ``pytest -m drawn``; the draws are the same every time.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import loop_lens
from loop_lens import HookedLoopedTransformer, LoopedConfig, LoopedTransformer, UnknownNameError
from loop_lens.interventions import ablate, skip, steer
from loop_lens.unrolling import Blocks, Loop, Schedule, Segments, Unroller
from tests.bridge.kinds import KINDS, TOKENS, Pair, pair
from tests.interventions.models import difference, opened, prompts
from tests.oracles.twin import VOCAB, randomize

Part = Blocks | Loop


# Schedules: what the tree says, by plain nested loops.


@st.composite
def trees(draw: st.DrawFn) -> Segments:
    """Runs of blocks and loops in loops, with names that differ."""
    letters = iter("abcdefghijklmnopqrstuvwxyz")

    def part(depth: int) -> Part:
        name = next(letters)
        if depth == 3 or draw(st.booleans()):
            return Blocks(name, draw(st.integers(0, 3)))
        inner = [loop(depth + 1) for _ in range(draw(st.integers(0, 2)))]
        return Loop(name, draw(st.integers(1, 3)), *draw(st.permutations([*inner, *own(name)])))

    def own(name: str) -> list[Part]:
        return [Blocks(name.upper(), draw(st.integers(0, 2)))] if draw(st.booleans()) else []

    def loop(depth: int) -> Part:
        name = next(letters)
        inner = [loop(depth + 1)] if depth < 3 and draw(st.booleans()) else []
        return Loop(name, draw(st.integers(1, 3)), *draw(st.permutations([*inner, *own(name)])))

    return Segments(*[part(0) for _ in range(draw(st.integers(1, 4)))])


@dataclass(frozen=True)
class Told:
    """A firing as the tree tells it."""

    prefix: str
    segment: str
    path: tuple[int, ...]
    layer: int
    run: str


def told(tree: Segments) -> list[Told]:
    def walk(part: Part, segment: str, path: tuple[int, ...], prefix: str) -> Iterator[Told]:
        if isinstance(part, Blocks):
            for layer in range(part.size):
                yield Told(
                    f"{prefix or part.name}.blocks.{layer}", segment or part.name, path, layer, part.name
                )
            return
        for t in range(part.times):
            for inner in part.body:
                here = f"{prefix}.{part.name}.{t}".lstrip(".")
                yield from walk(inner, part.name, (*path, t), here)

    return [firing for part in tree.parts for firing in walk(part, "", (), "")]


def check_schedule(tree: Segments) -> None:
    schedule, expected = Schedule(tree), told(tree)
    assert len(schedule) == len(expected)
    for index, (firing, want) in enumerate(zip(schedule, expected, strict=True)):
        iteration = None if not want.path else want.path[0] if len(want.path) == 1 else want.path
        assert (firing.index, firing.prefix, firing.segment) == (index, want.prefix, want.segment)
        assert (firing.iteration, firing.layer) == (iteration, want.layer)
        assert schedule.find(want.segment, iteration, want.layer) is firing
        flat = schedule.site(f"blocks.{index}.hook_mlp_out")
        assert (
            flat == schedule.site(f"{want.prefix}.hook_mlp_out")
            and flat.flat == f"blocks.{index}.hook_mlp_out"
        )
    assert [i for visits in schedule.visits for i in visits] == sorted(
        range(len(expected)), key=lambda i: (schedule[i].block, i)
    )
    for boundary in schedule.boundaries:
        inside = [i for i, want in enumerate(expected) if want.prefix.startswith(f"{boundary.prefix}.")]
        assert inside == list(range(boundary.first, boundary.last + 1))
        for hook in ("hook_state_in", "hook_state_out"):
            site = schedule.site(f"{boundary.prefix}.{hook}")
            assert site.at(boundary.iteration) == site
            before = len([i for i in inside if hook == "hook_state_out"]) + boundary.first
            assert site.fired_before == before
    assert str(schedule) or not len(schedule)
    changed = {name: loop.times % 3 + 1 for name, loop in schedule.loops.items()}
    again = schedule.with_times(**changed).with_times(**{n: loop.times for n, loop in schedule.loops.items()})
    assert list(again) == list(schedule)
    with pytest.raises(UnknownNameError):
        schedule.site(f"blocks.{len(schedule)}.hook_mlp_out")
    check_runtime(tree, schedule)


class Drawn(nn.Module):
    """A model that runs a tree by plain nested loops."""

    def __init__(self, tree: Segments) -> None:
        super().__init__()
        self.tree = tree
        order = dict.fromkeys((f.run, f.layer) for f in sorted(told(tree), key=lambda f: f.layer))
        self.keys = sorted(order, key=lambda key: (run_order(tree).index(key[0]), key[1]))
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in self.keys)

    def forward(self, x: Tensor) -> Tensor:
        for firing in told(self.tree):
            x = self.layers[self.keys.index((firing.run, firing.layer))](x).tanh()
        return x


def run_order(tree: Segments) -> list[str]:
    def runs(part: Part) -> Iterator[str]:
        if isinstance(part, Blocks):
            yield part.name
        else:
            for inner in part.body:
                yield from runs(inner)

    return [name for part in tree.parts for name in runs(part)]


@torch.no_grad()
def check_runtime(tree: Segments, schedule: Schedule) -> None:
    if not len(schedule):
        return
    net, x = Drawn(tree), torch.ones(1, 2)
    expected, fired = net(x), list[str]()

    def execute(run: Any, firing: Any, bare: Any, args: Any, kwargs: Any) -> Any:
        fired.append(firing.prefix)
        return bare(*args, **kwargs)

    unroller = Unroller(net, list(net.layers), schedule)
    unroller.executor = execute
    unroller.install()
    for _ in range(2):
        assert torch.equal(net(x), expected)
    assert fired == [firing.prefix for firing in told(tree)] * 2
    unroller.remove()
    assert torch.equal(net(x), expected) and len(fired) == 2 * len(schedule)


# Names: both spellings are one site, whatever is asked for; nothing else is.


@functools.cache
def kind(name: str) -> Pair:
    return pair(name)


names = st.tuples(st.sampled_from(KINDS), st.integers(0, 10**9), st.integers(0, 10**9), st.text(max_size=12))


def check_names(drawn: tuple[str, int, int, str]) -> None:
    which, at, hook, text = drawn
    model = kind(which).model
    firing = model.schedule[at % len(model.schedule)]
    within = sorted(model.registry.names[firing.block].canonical)
    own = within[hook % len(within)]
    name = model.name(own, iteration=firing.iteration, layer=firing.layer, segment=firing.segment)
    site = model.locate(name)
    assert site.name == f"{firing.prefix}.{own}" and site.flat == f"blocks.{firing.index}.{own}"
    assert model.locate(site.flat) == site and model.registry[site.flat] is model.registry[site.name]
    assert site.flat in model.hook_dict and site.name in model.hook_dict
    for wrong in (text, f"{site.name}{text}", f"{text}{site.flat}", f"blocks.{10**6 + at}.{own}"):
        if wrong in (site.name, site.flat):
            continue
        try:
            found = model.locate(wrong)
        except UnknownNameError as error:
            assert str(error)
        else:
            assert wrong in (found.name, found.flat)


# Configs of the native model: looking changes nothing, saving keeps everything, or one sentence says why not.

configs = st.fixed_dictionaries(
    {
        "block_norm": st.sampled_from(["pre", "sandwich", "post_branch", "post_residual"]),
        "qk_norm": st.sampled_from(["none", "head", "full", "head_after_rope"]),
        "injection": st.sampled_from(["none", "add", "linear", "diagonal"]),
        "initial_state": st.sampled_from(["prelude", "zeros", "noise"]),
        "prelude_layers": st.integers(0, 2),
        "core_layers": st.integers(1, 2),
        "coda_layers": st.integers(0, 2),
        "recurrences": st.integers(1, 3),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "intermediate_size": st.sampled_from([8, 24]),
        **{
            flag: st.booleans()
            for flag in (
                "gated_mlp",
                "prelude_norm",
                "loop_norm",
                "post_loop_norm",
                "state_projection",
                "exit_gate",
                "qk_bias",
                "attention_bias",
                "mlp_bias",
                "tie_word_embeddings",
            )
        },
    }
)


@torch.no_grad()
def check_config(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    try:
        config = LoopedConfig(vocab_size=VOCAB, hidden_size=16, num_attention_heads=4, **options)
        net = LoopedTransformer(config).eval()
    except ValueError as error:
        assert len(str(error)) > 20 and "\n" not in str(error)
        return
    randomize(net)
    expected = net(TOKENS).logits
    model = loop_lens.wrap(net)
    assert torch.equal(model(TOKENS), expected)
    logits, cache = model.run_with_cache(TOKENS)
    assert torch.equal(logits, expected)
    last = f"loop.{config.recurrences - 1}.hook_state_out"
    assert last in cache and cache[last].isfinite().all()
    found = loop_lens.attribute(model, TOKENS, target=3)
    assert torch.allclose(found.total, expected[:, -1, 3], rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert torch.equal(loop_lens.boot(folder)(TOKENS), expected)


# Sets of patches: a cell of a sweep is a whole forward with a hook by hand.


@functools.cache
def swept(name: str) -> tuple[HookedLoopedTransformer, Tensor, Tensor]:
    model = opened(name)
    return model, *prompts(model)


SWEPT = ("huginn", "ouro", "hrm_text", "looped_gpt2", "damped_llama", "no_prelude")
some = st.sampled_from([None, 0, 1, -1])
patches = st.fixed_dictionaries(
    {
        "name": st.sampled_from(SWEPT),
        "site": st.sampled_from(["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "q", "v", "pattern"]),
        "axes": st.permutations(["iteration", "layer", "position", "head"]).flatmap(
            lambda order: st.integers(1, 4).map(lambda n: order[:n])
        ),
        "iteration": some,
        "position": some,
        "direction": st.sampled_from(["denoising", "noising"]),
        "memory_budget": st.sampled_from([1, 50_000, 1 << 30]),
        "surgery": st.sampled_from([None, "ablate", "steer", "skip"]),
        "cell": st.integers(0, 10**9),
    }
)


@torch.no_grad()
def check_patches(drawn: dict[str, Any]) -> None:
    model, clean, corrupted = swept(drawn["name"])
    site, axes = drawn["site"], drawn["axes"]
    heads = site in ("z", "q", "v", "pattern")
    axes = [axis for axis in axes if axis != "head" or heads]
    assume(axes)
    every = model.schedule.iterations(model.schedule.innermost_loop)
    options: dict[str, Any] = {"direction": drawn["direction"], "memory_budget": drawn["memory_budget"]}
    if drawn["iteration"] is not None:
        options["iterations"] = [every[drawn["iteration"]]]
    if drawn["position"] is not None and "position" in axes:
        options["positions"] = [drawn["position"], 3]
    vector = torch.linspace(-1, 1, model.cfg.d_model)
    surgery: Any = {
        None: None,
        "ablate": ablate(model, "z", iterations=every[-1], heads=[0], positions=[2, 4]),
        "steer": steer(model, vector, iterations=every[0], layers=0),
        "skip": skip(model, every[1]),
    }[drawn["surgery"]]
    if surgery is not None:
        surgery.__enter__()
    try:
        result = loop_lens.patch_sweep(
            model, clean, corrupted, difference, site=site, over=axes, progress=False, **options
        )
        index = tuple(
            torch.unravel_index(torch.tensor(drawn["cell"] % result.values.numel()), result.values.shape)
        )
        place = {axis: result.labels[axis][int(i)] for axis, i in zip(axes, index, strict=True)}
        base, donor = (corrupted, clean) if drawn["direction"] == "denoising" else (clean, corrupted)
        its = [place["iteration"]] if "iteration" in place else options.get("iterations", every)
        layers = [place["layer"]] if "layer" in place else None
        keys = [name for t in its for name in model.names(site, iteration=[t], layer=layers)]
        _, given_values = model.run_with_cache(donor, names_filter=keys)
        p = slice(None) if "position" not in place else slice(place["position"][0], place["position"][0] + 1)
        h = slice(None) if "head" not in place else slice(place["head"], place["head"] + 1)
        where: Any = (
            (slice(None), h, p) if site == "pattern" else (slice(None), p, h) if heads else (slice(None), p)
        )

        def patch(key: str) -> Callable[..., Tensor]:
            def put(value: Tensor, hook: Any) -> Tensor:
                value[where] = given_values[key][where]
                return value

            return put

        expected = difference(model.run_with_hooks(base, fwd_hooks=[(key, patch(key)) for key in keys]))
        assert result.per_prompt is not None
        scale = max(1.0, float(expected.abs().max()))
        assert (result.per_prompt[index] - expected).abs().max() < 1e-5 * scale
    finally:
        if surgery is not None:
            surgery.__exit__(None, None, None)
    assert not any(point.fwd_hooks for point in model.registry.existing())


# Contexts in any order: what is in force is what was entered and not left, of iterations the innermost.

contexts = st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 7), min_size=1, max_size=12))


@functools.cache
def alone(which: str, in_force: frozenset[str], recurrences: int) -> Tensor:
    """Logits of a fresh model with nothing but these surgeries."""
    model = pair(which).model
    with torch.no_grad(), model.at_recurrences(recurrences):
        made = [surgeries(model)[name] for name in sorted(in_force)]
        for one in made:
            one.__enter__()
        logits = model(TOKENS)
        for one in reversed(made):
            one.__exit__(None, None, None)
    return logits


def surgeries(model: HookedLoopedTransformer) -> dict[str, Any]:
    """Surgeries of sites that each of them has alone."""
    first, *_ = model.schedule.iterations(model.schedule.innermost_loop)
    vector = torch.linspace(-1, 1, model.cfg.d_model)
    return {
        "ablate": ablate(model, "z", iterations=first, layers=0),
        "mlp": ablate(model, "mlp_out", iterations=first, layers=1),
        "steer": steer(model, vector, iterations=first, layers=0),
    }


@torch.no_grad()
def check_contexts(drawn: tuple[str, list[int]]) -> None:
    which, steps = drawn
    model = kind(which).model
    made = surgeries(model)
    order = sorted(made)
    in_force: set[str] = set()
    depths: list[tuple[int, Any]] = []
    try:
        for step in steps:
            if step < 3:  # enter or leave a surgery
                one = order[step]
                (made[one].__exit__(None, None, None) if one in in_force else made[one].__enter__())
                in_force ^= {one}
            elif step < 6:  # another number of iterations
                context = model.at_recurrences(step - 2)
                context.__enter__()
                depths.append((step - 2, context))
            elif depths:  # leave the outermost or the innermost
                _, context = depths.pop(0 if step == 6 else -1)
                context.__exit__(None, None, None)
            recurrences = depths[-1][0] if depths else 3
            assert model.recurrences == recurrences
            assert torch.equal(model(TOKENS), alone(which, frozenset(in_force), recurrences))
    finally:
        for one in in_force:
            made[one].__exit__(None, None, None)
        for _, context in depths:
            context.__exit__(None, None, None)
    assert model.recurrences == 3 and not any(point.fwd_hooks for point in model.registry.existing())


DRAWS: dict[str, tuple[Callable[[Any], None], Any, int, int]] = {
    "schedules": (check_schedule, trees(), 120, 4000),
    "names": (check_names, names, 160, 4000),
    "configs": (check_config, configs, 10, 600),
    "patches": (check_patches, patches, 12, 700),
    "contexts": (check_contexts, contexts, 12, 700),
}
"""What is checked, on what, on how many draws in every run, and on how many by ``-m drawn``: 10,000 in all."""


def draw(what: str, n: int) -> None:
    check, strategy, *_ = DRAWS[what]
    within = settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    within(given(strategy)(check))()


@pytest.mark.parametrize("what", DRAWS)
def test_some_hundreds(what: str) -> None:
    draw(what, DRAWS[what][2])


@pytest.mark.drawn
@pytest.mark.parametrize("what", DRAWS)
def test_ten_thousand(what: str) -> None:
    draw(what, DRAWS[what][3])


def test_the_counts() -> None:
    few, many = (sum(counts) for counts in itertools.islice(zip(*DRAWS.values(), strict=True), 2, 4))
    assert few >= 300 and many == 10_000
