"""The grid of random models: what is measured, what is kept on disk, and the whole command."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from typer.testing import CliRunner

from loop_lens.dynamics import limiting_behaviour
from loop_lens.experiments.__main__ import build
from loop_lens.experiments.random_init import measures
from loop_lens.experiments.random_init.measures import (
    RandomResult,
    Settings,
    grid,
    measure_grid,
    measure_one,
    pooled,
)
from loop_lens.experiments.random_init.models import INITS, RandomModel

SMALL = Settings(recurrences=8, reference=11, prompts=2, length=5, krylov=4)


def small(**options: Any) -> RandomModel:
    return RandomModel(**{"norm": "huginn", "injection": True, "layers": 2, "width": 32, **options})


@pytest.fixture(scope="module")
def measured() -> tuple[RandomResult, Any]:
    spec = small()
    model = spec.open(SMALL.reference)
    return measure_one(spec, model, SMALL), model


@torch.no_grad()
def states_of(model: Any, tokens: Tensor) -> Tensor:
    """Every block's output, as plain hooks on the blocks see it [iteration layer token d_model]."""
    seen: list[Tensor] = []
    core = model.original_model.model.core
    handles = [
        block.register_forward_hook(lambda m, args, out: seen.append(out.flatten(0, 1))) for block in core
    ]
    model.original_model(tokens)
    for handle in handles:
        handle.remove()
    return torch.stack(seen).unflatten(0, (-1, len(handles)))


def test_curves_are_those_of_states_seen_by_plain_hooks(measured: tuple[RandomResult, Any]) -> None:
    result, model = measured
    tokens = SMALL.tokens(512)
    states = states_of(model, tokens)
    x, end = states[:8], states[-1]
    last, norm, far = x[-1], x.norm(dim=-1), (x - end).norm(dim=-1)
    nothing = torch.full_like(norm[:1], math.nan)
    step = torch.cat([nothing, (x[1:] - x[:-1]).norm(dim=-1)])
    expected = {
        "norm": norm,
        "step": step,
        "relative_step": step / norm,
        "step_cosine": torch.cat([nothing, cosine_similarity(x[1:], x[:-1], dim=-1)]),
        "distance": far,
        "relative_distance": far / norm,
        "cosine": cosine_similarity(x, end[None], dim=-1),
        "last_distance": (x - last).norm(dim=-1),
        "last_cosine": cosine_similarity(x, last[None], dim=-1),
    }
    for name, values in expected.items():
        torch.testing.assert_close(
            result.curves[name], values.mean(-1).double(), atol=1e-5, rtol=1e-4, equal_nan=True
        )
    whole = far.unflatten(-1, (2, 5)).norm(dim=-1) / norm.unflatten(-1, (2, 5)).norm(dim=-1)
    torch.testing.assert_close(
        result.curves["matrix_distance"], whole.mean(-1).double(), atol=1e-5, rtol=1e-4
    )
    for prefix, goal in (("", end), ("last_", last)):
        cosine = cosine_similarity(x[:, :1], goal[None], dim=-1).amin(1).mean(-1)
        distance = (x[:, :1] - goal).norm(dim=-1).amax(1).mean(-1)
        for name, values in (("cosine", cosine), ("distance", distance)):
            ours = result.degeneracy[f"{prefix}{name}"]
            torch.testing.assert_close(ours, values.double(), atol=1e-5, rtol=1e-4)


def test_kinds_are_algorithm_1_of_every_token(measured: tuple[RandomResult, Any]) -> None:
    result, model = measured
    with model.at_recurrences(8):
        _, cache = model.run_with_cache(SMALL.tokens(512))
        states = cache.grid("resid_post").flatten(2, 3)
    kinds = {"fixed point": 0, "orbit": 1, "slider": 2, "unknown": 3}
    wanted = torch.zeros(2, 4, dtype=torch.int64)
    for layer in range(2):
        for token in range(states.shape[2]):
            x = states[:, layer, token]
            series = torch.nn.functional.cosine_similarity(x[:-1], x[-1:], dim=-1)
            wanted[layer, kinds[limiting_behaviour(series).kind]] += 1
    assert torch.equal(result.kinds, wanted)


def test_a_model_given_other_weights_in_place_is_the_model_opened_with_them() -> None:
    spec, other = small(seed=1), small(seed=0, init="identity")
    fresh, again = spec.open(3), other.open(3)
    spec.initialise(again)
    tokens = SMALL.tokens(512)
    assert torch.equal(fresh(tokens), again(tokens))


@pytest.mark.parametrize("init", INITS)
def test_initialisations_have_the_scales_that_they_say(init: str) -> None:
    model: Any = small(width=64, init=init).open(2).original_model
    block = model.model.core[0]
    wide = 0.02 * math.sqrt(2048 / 64)
    wanted = {  # inputs of the attention, output of the MLP, embedding
        "huginn": (math.sqrt(2 / 320), math.sqrt(2 / 320) / math.sqrt(264), math.sqrt(0.4)),
        "wide": (wide, wide, 0.02),
        "scaled": (wide, wide / 2, 0.02),
        "identity": (wide, wide / 2, 0.02),
        "fan-in": (1 / 8, 1 / 16, 1.0),
        "torch": (1 / math.sqrt(192), 1 / math.sqrt(768), 1.0),
        "small": (0.02, 0.02, 0.02),
    }[init]
    weights = (block.self_attn.q_proj.weight, block.mlp.down_proj.weight, model.model.embed_tokens.weight)
    for weight, std in zip(weights, wanted, strict=True):
        assert float(weight.std()) == pytest.approx(std, rel=0.05)
    if init == "identity":
        assert torch.equal(model.model.injection.adapter.weight, 0.7 * torch.eye(64).repeat(1, 2))


def test_resuming_measures_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [small(layers=1, seed=seed) for seed in range(3)]
    first = measure_grid(models[:2], SMALL, cache=tmp_path, progress=False)
    done: list[RandomModel] = []

    def counted(spec: RandomModel, *rest: Any) -> RandomResult:
        done.append(spec)
        return measure_one(spec, *rest)

    monkeypatch.setattr(measures, "measure_one", counted)
    again = measure_grid(models, SMALL, cache=tmp_path, progress=False)
    assert done == models[2:]
    assert [each.summary() for each in again[:2]] == [each.summary() for each in first]
    assert torch.equal(again[0].curves["cosine"], first[0].curves["cosine"])
    measure_grid(models[:1], SMALL, cache=tmp_path, resume=False, progress=False)
    assert done == [models[2], models[0]]


def test_pooling_averages_seeds() -> None:
    one, two = measure_grid([small(layers=1, seed=seed) for seed in range(2)], SMALL, progress=False)
    both = pooled([one, two])[1, True, "huginn"]
    torch.testing.assert_close(both.curves["cosine"], (one.curves["cosine"] + two.curves["cosine"]) / 2)
    assert torch.equal(both.kinds, one.kinds + two.kinds)
    assert both.radius == pytest.approx((one.radius + two.radius) / 2)


def test_the_grid_is_the_papers() -> None:
    models = grid()
    assert len(models) == len(set(models)) == 3 * 2 * 3 * 3
    assert {model.layers for model in models} == {4, 12, 16}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recurrences": 4}, "at least 5 iterations"),
        ({"reference": 8}, "not beyond"),
        ({"length": 1}, "at least one of two tokens"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings(**{"recurrences": 8, "reference": 11, **options})


def test_unknown_norms_and_initialisations_are_told_with_what_exists() -> None:
    with pytest.raises(ValueError, match="choose one of pre, huginn, ouro"):
        small(norm="post")
    with pytest.raises(ValueError, match="choose one of huginn, wide"):
        small(init="zeros")


def test_the_command_writes_page_figures_tables_and_prints_verdicts(tmp_path: Path) -> None:
    out = tmp_path / "random_init"
    answer = CliRunner().invoke(build(), ["random-init", "--quick", "--out", str(out), "--no-progress"])
    assert answer.exit_code == 0, answer.output
    lines = [line for line in answer.output.splitlines() if line.startswith(("holds", "does not hold"))]
    assert len(lines) == 10
    page = out.with_suffix(".md").read_text()
    for figure in ("figure_6", "figure_29", "figure_30", "figure_31", "beyond", "steps"):
        assert f"(random_init/{figure}.png)" in page
        assert (out / f"{figure}.png").stat().st_size < 150_000
    assert "python -m loop_lens.experiments random-init --quick" in page
    assert (out / "verdicts.csv").read_text().count("\n") == 11
    assert (out / "cache" / ".gitignore").read_text() == "*\n"


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    for options, words in (
        (["--layers", "four"], "not a list of numbers"),
        (["--init", "zeros"], "choose one of"),
        (["--recurrences", "2"], "at least 5"),
        (["--seeds", "0"], "at least 1"),
    ):
        answer = CliRunner().invoke(build(), ["random-init", "--out", str(tmp_path / "x"), *options])
        assert answer.exit_code == 2
        assert words in " ".join(answer.output.replace("│", " ").split())
