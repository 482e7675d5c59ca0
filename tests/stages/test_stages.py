"""Stages while the model runs: against the cache, with padding, merged, and in three groupings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from loop_lens.measuring.moments import DivergedError
from loop_lens.measuring.run import measure, schedule_of
from loop_lens.stages import Stages, StagesProbe, stages
from tests.interventions.models import FAMILIES, MODELS, opened, prompts, wrapped
from tests.stages.models import feed_forward
from tests.stages.second_opinion import entropy, squared_shares


def by_hand(pattern: Any, resid: Any, tau: float, token: int) -> dict[str, float]:
    """The metrics of one prompt at one firing, in float64."""
    (n, width), columns = resid.shape, pattern.mean(1)
    shares = squared_shares(resid)
    return {
        "colsum_concentration": np.mean([1 - entropy(p) / math.log(n) for p in columns]),
        "sink_rate": np.mean(columns[:, token] >= tau),
        "mixing_score": entropy(pattern).mean(),
        "matrix_entropy": entropy(shares),
        "relative_matrix_entropy": entropy(shares) / math.log(min(n, width)),
        "anisotropy": shares.max(),
        "first_norm": np.linalg.norm(resid[0]),
        "norm": np.linalg.norm(resid[1:], axis=1).mean(),
    }


@torch.no_grad()
@pytest.mark.parametrize("name", [*MODELS, "ff llama", "ff gpt2"])
def test_against_the_cache(name: str) -> None:
    model: Any = feed_forward(name[3:]) if name.startswith("ff") else opened(name)
    tokens = torch.randint(1, model.cfg.d_vocab, (2, 7), generator=torch.Generator().manual_seed(3))
    tau, token = 0.25, 1
    found = stages(model, tokens, sink_tau=tau, sink_token=token)
    _, cache = model.run_with_cache(tokens)
    schedule = schedule_of(model)
    assert len(found.firings) == len(schedule) == model.cfg.n_layers
    assert found.heads is not None
    for i in range(len(schedule)):
        patterns = cache[f"blocks.{i}.attn.hook_pattern"].double().numpy()
        streams = cache[f"blocks.{i}.hook_out"].double().numpy()
        each = [by_hand(*pair, tau, token) for pair in zip(patterns, streams, strict=True)]
        for metric in found.metrics:
            values = [prompt[metric] for prompt in each]
            mean, spread = found.mean(metric)[i], found.std(metric, over="prompts")[i]
            assert float(mean) == pytest.approx(float(np.mean(values)), rel=1e-5, abs=1e-6), metric
            assert float(spread) == pytest.approx(float(np.std(values)), rel=1e-3, abs=1e-5), metric
        expected = entropy(patterns).mean((0, 2))
        assert found.heads.mean("mixing_score")[i].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
        expected = patterns.mean(2)[..., token].mean(0)
        assert found.heads.mean("sink")[i].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    at = [(f.segment, f.iteration, f.layer, f.block) for f in schedule]
    assert list(found.firings) == at


def test_uniform_attention_and_a_first_token_alone() -> None:
    model = wrapped()
    with torch.no_grad():
        for name, parameter in model.original_model.named_parameters():
            if "q_proj" in name:
                parameter.zero_()
    found = stages(model, torch.randint(1, model.cfg.d_vocab, (1, 64)))
    mixing = np.mean([math.log(i + 1) for i in range(64)])
    assert found.mean("colsum_concentration").tolist() == pytest.approx(
        [0.097] * len(found.firings), abs=5e-4
    )
    assert found.mean("mixing_score").tolist() == pytest.approx([mixing] * len(found.firings), rel=1e-5)
    assert found.mean("sink_rate").tolist() == [0] * len(found.firings)


@pytest.mark.parametrize("name", [*FAMILIES, "looped_gpt2", "ff llama"])
def test_padding_changes_nothing_and_parts_merge(name: str) -> None:
    model: Any = feed_forward("llama") if name == "ff llama" else opened(name)
    generator = torch.Generator().manual_seed(1)
    each = [torch.randint(1, model.cfg.d_vocab, (n,), generator=generator) for n in (3, 9, 2, 5)]
    together = stages(model, each, batch_size=4)
    alone = [stages(model, [tokens]) for tokens in each]
    merged = alone[0].merge(alone[1]).merge(alone[2]).merge(alone[3])
    for one, other in ((together.moments, merged.moments), (together.heads, merged.heads)):
        assert one is not None and other is not None
        assert torch.equal(one.count, other.count) and one.axes == other.axes
        for metric in one.metrics:
            for over in ("values", "prompts"):
                mean, expected = one.mean(metric, over=over), other.mean(metric, over=over)
                assert torch.allclose(mean, expected, rtol=1e-6, atol=1e-6)
        assert torch.allclose(one.prompt_squares, other.prompt_squares, rtol=5e-6, atol=5e-6)
    i = together.metrics.index("norm")
    assert together.moments.count[i].tolist() == [3 + 9 + 2 + 5 - 4] * len(together.firings)
    assert together.moments.prompts.unique().tolist() == [4]
    with pytest.raises(ValueError, match="their tau differ"):
        together.merge(stages(model, each, sink_tau=0.5))


@pytest.fixture(scope="module")
def looped() -> Stages:
    model = wrapped(prelude_layers=1, core_layers=2, coda_layers=1, recurrences=3)
    return stages(model, ["w1 w2 w3", "w4 w5 w6 w7"])


def test_the_three_groupings(looped: Stages) -> None:
    depth, *rest = looped.curves("matrix_entropy")
    assert not rest and depth.at.tolist() == list(range(1, 9))
    assert torch.equal(depth.mean, looped.mean("matrix_entropy"))

    mean = looped.mean("matrix_entropy").tolist()
    lines = looped.curves("matrix_entropy", by="recurrence")
    assert [line.label for line in lines] == [
        "prelude", "recurrence 0", "recurrence 1", "recurrence 2", "coda"
    ]  # fmt: skip
    assert [line.at.tolist() for line in lines] == [[25], [50, 75], [50, 75], [50, 75], [100]]
    assert [line.mean.tolist() for line in lines] == [mean[:1], mean[1:3], mean[3:5], mean[5:7], mean[7:]]
    lines = looped.curves("matrix_entropy", by="recurrence", span="block")
    assert [line.at.tolist() for line in lines] == [[50, 100]] * 3

    lines = looped.curves("matrix_entropy", by="layer")
    assert [line.label for line in lines] == [
        "prelude layer 0",
        "loop layer 0",
        "loop layer 1",
        "coda layer 0",
    ]
    assert lines[1].at.tolist() == [0, 1, 2] and lines[1].mean.tolist() == mean[1:7:2]


def test_nested_loops_recur_with_the_outer_one() -> None:
    model = opened("hrm_text")
    found = stages(model, prompts(model)[0])
    assert found.recurrences == model.schedule.loops["H"].times
    whole = len(found.firings) // found.recurrences
    for line in found.curves("norm", by="recurrence"):
        assert line.at.tolist() == pytest.approx([100 * (k + 1) / whole for k in range(whole)])
    layers = found.curves("norm", by="layer")
    assert len(layers) == model.schedule.n_blocks
    assert [len(line.at) for line in layers] == [len(v) for v in model.schedule.visits]


def test_a_feed_forward_model_is_one_recurrence() -> None:
    found = stages(feed_forward("llama"), torch.tensor([[1, 2, 3]]))
    (line,) = found.curves("mixing_score", by="recurrence")
    assert line.at.tolist() == pytest.approx([100 * (k + 1) / 6 for k in range(6)])
    assert found.recurrences == 0 and torch.equal(found.percent(), found.percent(span="block"))


def test_tables(looped: Stages) -> None:
    table = looped.to_dataframe()
    assert table["depth"].tolist() == list(range(1, 9))
    assert table["segment"].tolist() == ["prelude"] + ["loop"] * 6 + ["coda"]
    assert table["percent"].tolist() == [25, 50, 75, 50, 75, 50, 75, 100]
    assert table["mixing_score"].tolist() == looped.mean("mixing_score").tolist()
    by = looped.to_dataframe(by="recurrence", span="block")
    assert by["depth"].tolist() == [1, 8, 2, 3, 4, 5, 6, 7]
    assert by["percent"].isna().tolist() == [True] * 2 + [False] * 6
    assert looped.to_dataframe(by="layer")["depth"].tolist() == [1, 2, 4, 6, 3, 5, 7, 8]
    heads = looped.heads_to_dataframe()
    assert looped.heads is not None
    n = len(looped.heads.axes["head"])
    assert heads["depth"].tolist() == [d for d in range(1, 9) for _ in range(n)]
    assert heads["mixing_score"].tolist() == looped.heads.mean("mixing_score").flatten().tolist()
    assert heads.groupby("depth")["mixing_score"].mean().tolist() == pytest.approx(
        table["mixing_score"].tolist()
    )


def test_plots_overlay_a_reference(looped: Stages) -> None:
    other = stages(feed_forward("llama"), torch.tensor([[1, 2, 3]]))
    axes = looped.plot("norm", against=other).axes[0]
    assert axes.lines[-1].get_linestyle() == "--"
    assert axes.lines[-1].get_ydata().tolist() == other.mean("norm").tolist()
    axes = looped.plot("norm", "recurrence", against={"plain": other}).axes[0]
    assert [line.get_label() for line in axes.lines if line.get_label()[0] != "_"] == [
        "prelude", "recurrence 0", "recurrence 1", "recurrence 2", "coda", "plain"
    ]  # fmt: skip
    axes = looped.plot("norm", "layer", against=other).axes[0]
    assert sum(line.get_linestyle() == "--" for line in axes.lines) == 6
    assert len(looped.plot("mixing_score", "recurrence", span="block").axes[0].lines) == 3


def test_it_comes_back_from_disk(looped: Stages, tmp_path: Path) -> None:
    without = stages(wrapped(), ["w1 w2 w3"], patterns=False)
    for found in (looped, without, stages(opened("hrm_text"), torch.tensor([[1, 2, 3]]))):
        found.save(tmp_path / "found")
        again = Stages.load(tmp_path / "found")
        assert again.firings == found.firings and again.tau == found.tau
        pd.testing.assert_frame_equal(again.to_dataframe(), found.to_dataframe())
        found.to_parquet(tmp_path / "found.parquet")
        assert pd.read_parquet(tmp_path / "found.parquet")["norm"].tolist() == found.mean("norm").tolist()
    assert "mixing_score" not in without.metrics
    with pytest.raises(ValueError, match="attention was not measured"):
        without.heads_to_dataframe()
    with pytest.raises(ValueError, match="their metrics differ"):
        without.merge(stages(wrapped(), ["w1 w2 w3"]))


def test_the_first_firing_that_diverges_is_named() -> None:
    model = wrapped(injection="linear", initial_state="noise", recurrences=4)

    def spoil(value: Tensor, hook: Any) -> Tensor:
        return value * float("nan")

    for hook, place in (("resid_post", "loop.2.blocks.1"), ("pattern", "loop.2.blocks.1")):
        name = model.name(hook, iteration=2, layer=1)
        with (
            model.hooks(fwd_hooks=[(name, spoil)]),
            pytest.raises(DivergedError, match=place.replace(".", r"\.")),
        ):
            stages(model, ["w1 w2 w3"])


def test_bad_requests(looped: Stages) -> None:
    model = wrapped()
    with pytest.raises(ValueError, match="prompt 1 has one token"):
        stages(model, [torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 5])])
    with pytest.raises(ValueError, match=r"prompt 0 has 2 tokens, so sink_token=2 does not exist.*0-1"):
        stages(model, [torch.tensor([1, 2])], sink_token=2)
    with pytest.raises(ValueError, match="0 or more, not -1"):
        stages(model, ["w1 w2"], sink_token=-1)
    with pytest.raises(ValueError, match="never computes pattern"):
        stages(feed_forward("opt"), torch.tensor([[1, 2, 3]]))
    assert (
        stages(feed_forward("opt"), torch.tensor([[1, 2, 3]]), patterns=False).mean("norm").isfinite().all()
    )
    with pytest.raises(ValueError, match="metric 'speed' is unknown"):
        looped.plot("speed")
    with pytest.raises(ValueError, match="by='time' is unknown"):
        looped.plot("norm", "time")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="by='time' is unknown"):
        looped.to_dataframe(by="time")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="span='loop' is unknown"):
        looped.percent(span="loop")  # type: ignore[arg-type]


def test_other_probes_share_the_run() -> None:
    model = wrapped()
    tokens = torch.tensor([[1, 2, 3]])
    one, other = StagesProbe(model), StagesProbe(model, sink_token=1)
    measure(model, tokens, [one, other])
    assert torch.equal(one.result().moments.total, stages(model, tokens).moments.total)
    assert torch.equal(other.result().moments.total, stages(model, tokens, sink_token=1).moments.total)


@pytest.mark.parametrize("whole", [np.int64, np.array, torch.tensor])
def test_whole_numbers_of_any_library(whole: Any, tmp_path: Path) -> None:
    model = opened("ouro")
    tokens = torch.tensor([[1, 2, 3, 4]])
    expected = stages(model, tokens, sink_token=1, progress=False)
    found = stages(model, tokens, sink_token=whole(1), sink_tau=np.float64(0.3), progress=False)
    assert type(found.sink_token) is int and type(found.tau) is float
    found.save(tmp_path / "stages.safetensors")
    pd.testing.assert_frame_equal(found.to_dataframe(), expected.to_dataframe())
    with pytest.raises(ValueError, match="sink_token must be a whole number"):
        stages(model, tokens, sink_token=0.5, progress=False)  # type: ignore[arg-type]
