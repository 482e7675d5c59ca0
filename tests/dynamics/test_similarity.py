"""Pair maps against loops over the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from loop_lens import UnknownNameError
from loop_lens.dynamics import FiringSimilarity, firing_similarity
from loop_lens.measuring.moments import DivergedError
from tests.dynamics.test_attention import TEXTS, measured
from tests.interventions.models import opened, prompts, wrapped
from tests.interventions.test_paths import linear_loop
from tests.oracles.unrolled import decoder


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["huginn", "ouro", "retrofit_olmo", "hrm_text", "looped_mistral", "looped_gpt2"]
)
def test_against_the_cache(name: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model)
    found = firing_similarity(model, tokens)
    by_head = firing_similarity(model, tokens, per_head=True)
    _, cache = model.run_with_cache(tokens)
    n, heads = len(model.schedule), range(model.cfg.n_heads)
    assert found.depths == tuple(range(n))
    for a, b in ((0, 1), (1, n - 1), (n - 2, 2)):
        x, y = cache[f"blocks.{a}.attn.hook_pattern"], cache[f"blocks.{b}.attn.hook_pattern"]
        values = [measured(x[:, head], y[:, head]) for head in heads]
        for metric in values[0]:
            each = [value[metric] for value in values]
            assert by_head.mean(metric)[:, a, b].tolist() == pytest.approx(each, rel=1e-4, abs=1e-6)
            assert float(found.mean(metric)[a, b]) == pytest.approx(np.mean(each), rel=1e-4, abs=1e-6)
        x, y = cache[f"blocks.{a}.hook_resid_post"], cache[f"blocks.{b}.hook_resid_post"]
        cosine = torch.cosine_similarity(x, y, dim=-1)
        assert float(found.mean("cosine")[a, b]) == pytest.approx(float(cosine.mean()), abs=1e-5)
        spread = float(cosine.double().std(correction=0))
        assert float(found.std("cosine")[a, b]) == pytest.approx(spread, abs=1e-4)
    for metric in found.metrics:
        values = found.mean(metric)
        assert torch.equal(values, values.T) or torch.allclose(values, values.T, atol=1e-6)
        assert torch.allclose(
            values.diagonal(), torch.full((n,), float(metric == "cosine")).double(), atol=1e-6
        )


def test_patterns_that_differ_by_little_are_told_apart() -> None:
    model = linear_loop()
    d = model.cfg.d_model
    with torch.no_grad():
        model.original_model.model.injection.adapter.weight[:, :d] = 0.3 * torch.eye(d)
        for name, parameter in model.original_model.named_parameters():
            if "core" in name and "down_proj" in name:
                parameter.zero_()
    model.set_recurrences(14)
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    found = firing_similarity(model, tokens, iteration=slice(0, None), metrics=("frobenius",), per_head=True)
    _, cache = model.run_with_cache(tokens)
    patterns = cache.over_iterations("pattern", layer=0)[:, 0].double()
    for t in range(6, 14):
        exact = (patterns[t] - patterns[t - 1]).norm(dim=(-2, -1))
        # Down to where neighbours differ by the rounding of float32.
        assert torch.allclose(found.mean("frobenius")[:, t, t - 1], exact, rtol=1e-2, atol=3e-8)
    assert float(found.mean("frobenius")[:, 9, 8].max()) < 1e-4


def test_a_choice_of_firings() -> None:
    model = wrapped(injection="linear", initial_state="noise", recurrences=5)
    whole = firing_similarity(model, TEXTS)
    chosen = firing_similarity(model, TEXTS, segment="loop", iteration=[1, 4], layer=1)
    assert (chosen.segments, chosen.iterations, chosen.layers) == (("loop", "loop"), (1, 4), (1, 1))
    a, b = chosen.depths
    for metric in chosen.metrics:
        assert float(chosen.mean(metric)[0, 1]) == pytest.approx(float(whole.mean(metric)[a, b]), rel=1e-6)
    last = firing_similarity(model, TEXTS, iteration=slice(-2, None), metrics=("cosine",))
    assert last.iterations == (3, 3, 4, 4) and last.attention is None and last.boundaries == [0, 2]
    nested = firing_similarity(opened("hrm_text"), torch.tensor([[1, 2, 3]]), segment="L", iteration=(1, 0))
    assert nested.iterations == ((1, 0), (1, 0))


def test_a_feed_forward_model() -> None:
    net = decoder("llama")
    model = build_bridge_from_module(net, "LlamaForCausalLM", hf_config=net.config, tokenizer=None)
    tokens = torch.tensor([[1, 2, 3, 4]])
    found = firing_similarity(model, tokens)
    assert found.segments == ("blocks",) * 6 and found.iterations == (None,) * 6
    _, cache = model.run_with_cache(tokens)
    gap = cache["pattern", 0] - cache["pattern", 5]
    assert float(found.mean("frobenius")[0, 5]) == pytest.approx(
        float(gap.norm(dim=(-2, -1)).mean()), rel=1e-5
    )


def test_padding_changes_nothing_and_parts_merge(tmp_path: Path) -> None:
    model = opened("huginn")
    generator = torch.Generator().manual_seed(1)
    each = [torch.randint(1, model.cfg.d_vocab, (n,), generator=generator) for n in (3, 9, 5)]
    together = firing_similarity(model, each, batch_size=3)
    alone = [firing_similarity(model, [p]) for p in each]
    merged = alone[0].merge(alone[1]).merge(alone[2])
    for metric in together.metrics:
        for over in ("values", "prompts"):
            a, b = together.mean(metric, over=over), merged.mean(metric, over=over)
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    halves = firing_similarity(model, each[:1]).merge(firing_similarity(model, each[1:], batch_size=1))
    for metric in together.metrics:
        assert torch.allclose(merged.mean(metric), halves.mean(metric), rtol=1e-6, atol=1e-6)
    together.save(tmp_path / "maps")
    again = FiringSimilarity.load(tmp_path / "maps")
    assert again.to_dataframe().equals(together.to_dataframe())
    together.to_parquet(tmp_path / "maps.parquet")
    with pytest.raises(ValueError, match="metrics differ"):
        together.merge(firing_similarity(model, each, metrics=("total_variation",)))


def test_table_and_picture() -> None:
    model = wrapped(recurrences=3)
    found = firing_similarity(model, TEXTS, per_head=True)
    table = found.to_dataframe()
    assert len(table) == model.cfg.n_heads * len(model.schedule) ** 2
    row = table[(table["head"] == 1) & (table["depth"] == 2) & (table["other"] == 5)].iloc[0]
    first, second = model.schedule[2], model.schedule[5]
    assert (row["segment"], row["iteration"], row["layer"]) == (first.segment, first.iteration, first.layer)
    assert (row["other_iteration"], row["other_layer"]) == (second.iteration, second.layer)
    assert row["total_variation"] == float(found.mean("total_variation")[1, 2, 5])
    assert row["cosine"] == float(found.mean("cosine")[2, 5])
    starts = 1 + 3  # of the loop's iterations and the coda, behind the prelude
    assert len(found.plot("jensen_shannon", head=1).axes[0].lines) == 2 * starts
    assert np.allclose(
        found.plot("total_variation").axes[0].images[0].get_array(), found.mean("total_variation").mean(0)
    )
    with pytest.raises(ValueError, match="heads 0-2"):
        found.plot("total_variation", head=3)
    with pytest.raises(ValueError, match="per_head=True"):
        firing_similarity(model, TEXTS).plot("total_variation", head=0)


def test_bad_requests() -> None:
    model = wrapped(recurrences=4)
    with pytest.raises(ValueError, match="metric 'speed' is unknown"):
        firing_similarity(model, TEXTS, metrics=("speed",))
    with pytest.raises(ValueError, match="at least two firings"):
        firing_similarity(model, TEXTS, iteration=0, layer=0)
    with pytest.raises(UnknownNameError, match="iteration 9 does not exist: there are 0 to 3"):
        firing_similarity(model, TEXTS, iteration=9)
    with pytest.raises(ValueError, match="prompt 0 has one token"):
        firing_similarity(model, torch.tensor([[1]]))
    assert firing_similarity(model, torch.tensor([[1]]), metrics=("cosine",)).metrics == ("cosine",)
    name = model.name("resid_post", iteration=2, layer=1)
    with (
        model.hooks(fwd_hooks=[(name, lambda value, hook: value * float("nan"))]),
        pytest.raises(DivergedError, match="loop iteration 2, layer 1"),
    ):
        firing_similarity(model, TEXTS)
