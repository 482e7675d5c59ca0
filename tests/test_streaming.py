"""Prompts of any shape, padding, hooks that go away, and results that come back from disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from loop_lens.dynamics import Convergence, convergence
from loop_lens.measuring.moments import Collector, DivergedError, Moments
from loop_lens.measuring.probe import Probe
from loop_lens.measuring.results import Result
from loop_lens.measuring.run import measure, schedule_of
from loop_lens.prompts.reader import Batch, batches_of, read_prompts
from loop_lens.unrolling.sites import Site
from tests.interventions.models import opened, wrapped
from tests.oracles.unrolled import decoder

TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9 w10"]


class Recorder(Probe):
    """Keeps what it sees."""

    def __init__(self, *hooks: str) -> None:
        self.hooks = hooks
        self.batches: list[Batch] = []
        self.seen: list[Site] = []
        self.values: list[Tensor] = []
        self.references: list[Mapping[Site, Tensor]] = []

    def wants(self, site: Site) -> bool:
        return site.segment != "coda"

    def begin(self, batch: Batch, reference: Mapping[Site, Tensor]) -> None:
        self.batches.append(batch)
        self.references.append(reference)

    def see(self, site: Site, value: Tensor) -> None:
        self.seen.append(site)
        self.values.append(value)


def test_every_form_of_prompts_is_the_same_prompts() -> None:
    model = wrapped()
    expected = [model.to_tokens(text)[0].tolist() for text in TEXTS]
    ids = [torch.tensor(tokens) for tokens in expected]
    longest = max(map(len, expected))
    padded = {
        "input_ids": [[9] * (longest - len(t)) + t for t in expected],
        "attention_mask": [[0] * (longest - len(t)) + [1] * len(t) for t in expected],
    }
    forms = (
        TEXTS,
        iter(TEXTS),
        ids,
        expected,
        Dataset.from_dict({"text": TEXTS}),
        Dataset.from_dict({"input_ids": expected}),
        Dataset.from_dict(padded),
        Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
    )
    for form in forms:
        assert [p.tolist() for p in read_prompts(model, form)] == expected
    assert [p.tolist() for p in read_prompts(model, TEXTS[0])] == expected[:1]
    assert [p.tolist() for p in read_prompts(model, torch.tensor([[1, 2], [3, 4]]))] == [[1, 2], [3, 4]]


def test_prompts_of_similar_length_are_padded_together() -> None:
    model = wrapped()
    batches = list(batches_of(model, TEXTS, 2))
    assert [b.index for b in batches] == [(1, 0), (2,)]
    assert batches[0].mask.sum(-1).tolist() == batches[0].lengths.tolist() == [3, 4]
    assert batches[0].tokens.shape == (2, 4)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "no prompts"),
        ([torch.tensor([0.5])], TypeError, "neither text nor tokens"),
        ([[]], ValueError, "has no tokens"),
        ([{"words": "w1"}], TypeError, "columns words: give one called 'text', 'input_ids'"),
    ],
)
def test_bad_prompts(prompts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list(batches_of(wrapped(), prompts, 2))
    with pytest.raises(ValueError, match="at least 1"):
        list(batches_of(wrapped(), TEXTS, 0))


def test_a_probe_sees_every_firing_in_order_and_the_last_states_of_the_reference() -> None:
    model = wrapped(injection="linear", initial_state="noise")
    tokens = torch.tensor([[1, 2, 3]])
    probe = Recorder("resid_post", "pattern")
    measure(model, tokens, [probe], reference=model.recurrences + 2)
    firings = [f.index for f in model.schedule if f.segment != "coda"]
    assert [site.place.index for site in probe.seen if site.short == "resid_post"] == firings  # type: ignore[union-attr]
    _, cache = model.run_with_cache(tokens)
    values = dict(zip(probe.seen, probe.values, strict=True))
    for i in firings:
        for hook in ("hook_resid_post", "attn.hook_pattern"):
            name = f"blocks.{i}.{hook}"
            assert torch.equal(values[model.locate(name)], cache[name])
    with model.at_recurrences(model.recurrences + 2):
        _, later = model.run_with_cache(tokens)
        last = model.locate(model.name("resid_post", iteration=model.recurrences - 1, layer=1))
        assert torch.equal(probe.references[0][last], later[last.flat])
        assert last.at(1) not in probe.references[0]


def test_a_probe_sees_what_lies_between_blocks_and_may_refer_to_any_iteration() -> None:
    class Between(Recorder):
        def refers_to(self, site: Site, *, last: bool) -> bool:
            return site.short == "state_out" and site.iteration == 1

    for name in ("huginn", "hrm_text", "looped_llama"):
        model = opened(name)
        tokens = torch.tensor([[1, 2, 3]])
        hooks = [hook.removeprefix("hook_") for hook in model.schedule.hooks_between]
        probe = Between(*hooks)
        measure(model, tokens, [probe], reference=model.recurrences + 1)
        _, cache = model.run_with_cache(tokens, names_filter=list(model.schedule.sites))
        assert {site.name for site in probe.seen} == set(model.schedule.sites)
        for site, value in zip(probe.seen, probe.values, strict=True):
            assert torch.equal(value, cache[site.name]), site.name
        for site, value in probe.references[0].items():
            assert torch.equal(value, cache[site.name]), site.name
        alone = Recorder(hooks[0])
        measure(model, tokens, [alone])
        assert alone.seen and all(
            torch.equal(v, cache[s.name]) for s, v in zip(alone.seen, alone.values, strict=True)
        )


def test_a_feed_forward_model_is_measured_on_the_same_axes() -> None:
    plain: TransformerBridge = build_bridge_from_module(
        decoder("llama"), "LlamaForCausalLM", hf_config=decoder("llama").config, tokenizer=None
    )
    probe = Recorder("resid_post")
    tokens = torch.tensor([[1, 2, 3]])
    measure(plain, tokens, [probe])
    assert [site.layer for site in probe.seen] == list(range(plain.cfg.n_layers))
    assert str(schedule_of(plain)).startswith("blocks")
    with pytest.raises(ValueError, match="no loop"):
        measure(plain, tokens, [probe], reference=4)


def test_padding_changes_nothing() -> None:
    model = opened("huginn")
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, model.cfg.d_vocab, (n,), generator=generator) for n in (3, 9, 5)]
    together = convergence(model, prompts, reference=6, batch_size=3)
    alone = [convergence(model, [p], reference=6) for p in prompts]
    merged = alone[0].merge(alone[1]).merge(alone[2])
    for metric in together.metrics:
        for over in ("values", "prompts"):
            a, b = together.mean(metric, over=over), merged.mean(metric, over=over)
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
            a, b = together.std(metric, over=over), merged.std(metric, over=over)
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)


def test_the_first_iteration_that_diverges_is_named_and_hooks_are_gone() -> None:
    model = wrapped(injection="linear", initial_state="noise", recurrences=4)
    name = model.name("resid_post", iteration=2, layer=1)

    def blow_up(value: Tensor, hook: Any) -> Tensor:
        return value * float("nan")

    with (
        model.hooks(fwd_hooks=[(name, blow_up)]),
        pytest.raises(DivergedError, match="iteration 2, layer 1"),
    ):
        convergence(model, TEXTS)
    assert not any(point.fwd_hooks for point in model.hook_points())


def test_an_architecture_without_patterns_says_so() -> None:
    model = wrapped()

    class Blind(Recorder):
        def wants(self, site: Site) -> bool:
            return site.fired_before == 0

    probe = Blind("attn.hook_hidden_states")
    with pytest.raises(ValueError, match=r"never computes attn\.hook_hidden_states"):
        measure(model, TEXTS, [probe])
    assert not any(point.fwd_hooks for point in model.hook_points())


def test_interventions_are_measured_too() -> None:
    model = wrapped(injection="linear", initial_state="noise", recurrences=4)
    name = model.name("resid_post", iteration=2, layer=0)
    plain = convergence(model, TEXTS)
    with model.hooks(fwd_hooks=[(name, lambda value, hook: value * 2)]):
        doubled = convergence(model, TEXTS)
    ratio = doubled.mean("norm") / plain.mean("norm")
    assert float(ratio[2, 0]) == pytest.approx(2.0)
    assert torch.allclose(ratio[:2], torch.ones(2, 2, dtype=torch.float64))


def test_results_come_back_from_disk(tmp_path: Path) -> None:
    for model in (wrapped(), opened("hrm_text")):
        found = convergence(model, torch.tensor([[1, 2, 3]]), reference=model.recurrences + 1)
        found.save(tmp_path / "found.safetensors")
        again = Convergence.load(tmp_path / "found.safetensors")
        assert again.reference == found.reference and again.iterations == found.iterations
        assert torch.equal(again.moments.total, found.moments.total)
        pd.testing.assert_frame_equal(again.to_dataframe(), found.to_dataframe())
        found.to_parquet(tmp_path / "found.parquet")
        table = pd.read_parquet(tmp_path / "found.parquet")
        assert table["norm"].tolist() == found.to_dataframe()["norm"].tolist()
    with pytest.raises(ValueError, match="holds Convergence, not a Moments"):
        Moments.load(tmp_path / "found.safetensors")


@dataclass(frozen=True)
class Mixed(Result):
    """One field of each kind."""

    tensor: Tensor
    tensors: dict[str, Tensor]
    nested: Moments
    plain: tuple[Any, ...]

    def to_dataframe(self) -> pd.DataFrame:
        return pd.DataFrame()


def test_every_kind_of_field_is_saved(tmp_path: Path) -> None:
    collector = Collector(["a"], {"cell": (0, (1, 2))})
    mixed = Mixed(torch.arange(3), {"x": torch.ones(2)}, collector.moments(), (1, None, (2, "three")))
    mixed.save(tmp_path / "mixed")
    again = Mixed.load(tmp_path / "mixed")
    assert torch.equal(again.tensor, mixed.tensor) and torch.equal(again.tensors["x"], torch.ones(2))
    assert again.plain == mixed.plain and again.nested.axes == mixed.nested.axes


def test_moments_against_plain_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, 5, generator=generator)  # metric prompt pos
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    spoiled = values.masked_fill(~mask, float("nan"))
    collector = Collector(["a", "b"], {"cell": (0, 1)})
    for rows in (slice(0, 2), slice(2, 3)):
        collector.begin(len(mask[rows]))
        collector.put(slice(0, 2), (1,), spoiled[:, rows], mask[rows])
        collector.end()
    found = collector.moments()
    for i, metric in enumerate(("a", "b")):
        kept = values[i][mask].double()
        means = torch.tensor([values[i, p][mask[p]].double().mean() for p in range(3)])
        assert float(found.mean(metric)[1]) == pytest.approx(float(kept.mean()))
        assert float(found.std(metric)[1]) == pytest.approx(float(kept.std(correction=0)))
        assert float(found.mean(metric, over="prompts")[1]) == pytest.approx(float(means.mean()))
        assert float(found.std(metric, over="prompts")[1]) == pytest.approx(float(means.std(correction=0)))
        assert found.mean(metric)[0].isnan()
