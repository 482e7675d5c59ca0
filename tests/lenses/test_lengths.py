"""Prompts of any lengths read as each alone, merge, and come back from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import loop_lens
from loop_lens import attribute
from loop_lens.lenses import (
    EXIT_RULES,
    Attribution,
    ExitCurve,
    ExitResult,
    LensResult,
    exit_curve,
    find_exits,
    fit_jacobian_lens,
    fit_tuned_lens,
)
from tests.interventions.models import FAMILIES, opened, prompts, wrapped

TEXTS = ["w1 w2 w3 w4 w5", "w7 w8", "w9 w10 w11 w12"]


def ragged(model: Any) -> list[torch.Tensor]:
    tokens, _ = prompts(model, n=3)
    return [tokens[0], tokens[1, :4], tokens[2, :6]]


@pytest.mark.parametrize("kind", ["logit", "coda"])
@pytest.mark.parametrize("positions", [None, [-1, -2], [5, 0]])
@pytest.mark.parametrize("name", [*FAMILIES, "looped_llama", "looped_gpt2"])
def test_a_lens_reads_each_prompt_as_alone(name: str, positions: Any, kind: Any) -> None:
    model = opened(name)
    each = ragged(model)
    together = loop_lens.lens(model, each, kind=kind, positions=positions, targets=[3, 5], keep_logits=True)
    assert together.logits is not None
    for b, tokens in enumerate(each):
        there = together.positions[b] >= 0
        own = None if positions is None else [p for p in positions if p < len(tokens)]
        alone = loop_lens.lens(model, tokens, kind=kind, positions=own, targets=[3, 5], keep_logits=True)
        assert alone.logits is not None
        assert together.positions[b][there].tolist() == alone.positions[0].tolist()
        assert (together.logits[:, b, there] - alone.logits[:, 0]).abs().max() < 1e-5
        assert (together.kl[:, b, there] - alone.kl[:, 0]).abs().max() < 1e-5
        assert together.kl[:, b, ~there].isnan().all() and (together.top_ids[:, b, ~there] == -1).all()
    table = together.to_dataframe()
    assert len(table) == len(together.sites) * int((together.positions >= 0).sum()) * 2
    assert table.kl.notna().all()


@pytest.mark.parametrize("name", [*FAMILIES, "looped_llama"])
def test_attribution_of_each_prompt_as_alone(name: str) -> None:
    model = opened(name)
    each = ragged(model)
    for pos in (-1, 2):
        together = attribute(model, each, target=(3, 5), pos=pos)
        for b, tokens in enumerate(each):
            alone = attribute(model, tokens, target=(3, 5), pos=pos)
            assert (together.terms[:, b] - alone.terms).abs().max() < 1e-5
    with pytest.raises(ValueError, match="position 5 does not exist in prompt 1: it has 0-3"):
        attribute(model, each, target=3, pos=5)


@torch.no_grad()
@pytest.mark.parametrize("rule", EXIT_RULES)
def test_exits_of_each_prompt_as_alone(rule: str) -> None:
    model = opened("ouro")
    each = ragged(model)
    threshold = {"argmax": 1.0, "gate": 0.6}.get(rule, 0.3)
    together = find_exits(model, each, rule=rule, threshold=threshold)
    curve = exit_curve(model, each, rule=rule, thresholds=[threshold])
    agreeing = right = n_labels = 0
    for b, tokens in enumerate(each):
        alone = find_exits(model, tokens, rule=rule, threshold=threshold)
        n = len(tokens)
        assert torch.allclose(together.scores[:, b, :n], alone.scores[:, 0], atol=1e-5)
        for field in ("iterations", "exited", "tokens", "full"):
            assert torch.equal(getattr(together, field)[b, :n], getattr(alone, field)[0])
        assert not together.mask[b, n:].any()
        agreeing += int((alone.tokens == alone.full).sum())
        right += int((alone.tokens[0, :-1] == tokens[1:]).sum())
        n_labels += n - 1
    assert together.agreement == pytest.approx(agreeing / 17)
    assert curve.n_tokens == 17 and curve.agreeing.tolist() == [agreeing]
    assert curve.n_labels == n_labels and curve.right.tolist() == [right]
    assert len(together.to_dataframe()) == 17


def made(what: str, model: Any, given: Any) -> Any:
    """A result of some prompts."""
    if what == "lens":
        return loop_lens.lens(model, given, targets=["w3", "w4"], keep_logits=True)
    if what == "attribution":
        return attribute(model, given, target=("w3", "w4"))
    if what == "exits":
        return find_exits(model, given, rule="latent", threshold=0.3)
    return exit_curve(model, given, rule="latent", thresholds=[0.01, 0.3])


RESULTS = {"lens": LensResult, "attribution": Attribution, "exits": ExitResult, "curve": ExitCurve}


@pytest.mark.parametrize("what", RESULTS)
def test_results_come_back_from_disk_and_merge(what: str, tmp_path: Path) -> None:
    model = wrapped(injection="linear", initial_state="noise")
    whole = made(what, model, TEXTS)
    whole.save(tmp_path / "result.safetensors")
    again = RESULTS[what].load(tmp_path / "result.safetensors")
    pd.testing.assert_frame_equal(again.to_dataframe(), whole.to_dataframe())
    whole.to_parquet(tmp_path / "result.parquet")
    assert len(pd.read_parquet(tmp_path / "result.parquet")) == len(whole.to_dataframe())
    parts = [made(what, model, [text]) for text in TEXTS]
    for merged in (parts[0].merge(parts[1]).merge(parts[2]), parts[0].merge(made(what, model, TEXTS[1:]))):
        pd.testing.assert_frame_equal(merged.to_dataframe(), whole.to_dataframe(), rtol=1e-4, atol=1e-5)
    if what != "curve":
        assert merged.plot() if hasattr(merged, "plot") else True


def test_merging_wants_the_same_question() -> None:
    model = wrapped()
    with pytest.raises(ValueError, match="their targets differ"):
        loop_lens.lens(model, "w1 w2", targets="w3").merge(loop_lens.lens(model, "w1 w2", targets="w4"))
    with pytest.raises(ValueError, match="their components differ"):
        attribute(model, "w1", target=3).merge(attribute(model, "w1", target=3, heads=False))


FORMS: list[Any] = [
    "w1 w2 w3 w4 w5 w6 w7 w8",
    [{"text": "w1 w2 w3 w4 w5 w6 w7 w8"}],
    [{"input_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9]}, {"input_ids": [2, 3, 4]}],
    {"input_ids": [[1, 2, 3, 4, 5], [3, 4, 5, 0, 0]], "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]},
]


@pytest.mark.parametrize("given", FORMS, ids=["text", "rows of text", "rows of ids", "a tokenizer's output"])
def test_lenses_are_fitted_on_prompts_of_any_form(given: Any) -> None:
    model = wrapped(injection="linear", initial_state="noise")
    read = [tokens.tolist() for tokens in loop_lens.prompts.read_prompts(model, given)]
    tuned = fit_tuned_lens(model, given, rank=0, steps=2, seq_len=4, progress=False)
    assert (tuned.report.tuned_kl <= tuned.report.logit_kl + 1e-6).all()
    fitted = fit_jacobian_lens(model, given, factorised=True, dim_batch=24, progress=False)
    same = fit_jacobian_lens(model, read, factorised=True, dim_batch=24, progress=False)
    assert fitted.n_prompts == len(read)
    assert all(torch.equal(fitted.matrices[key], same.matrices[key]) for key in same.matrices)
