"""Lenses against the model itself, transformer-lens on the untied twin, and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.tools.analysis import JacobianLens, logit_lens

import loop_lens
from loop_lens import UnknownNameError
from loop_lens.lenses import LoopJacobianLens, TunedLens, fit_jacobian_lens, fit_tuned_lens
from tests.interventions.models import FAMILIES, MODELS, opened, prompts, wrapped
from tests.oracles.twin import untied_twin


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_last_site_reads_as_the_model(name: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model)
    logits = model(tokens)
    result = loop_lens.lens(model, tokens, keep_logits=True, top_k=3, targets=[3, 7])
    assert result.logits is not None
    assert (result.logits[-1] - logits).abs().max() < 1e-5
    assert result.kl[-1].abs().max() < 1e-5 and result.kl[0].min() > 0
    assert len(result.sites) == len(model.schedule)
    logprobs = result.logits[2].log_softmax(-1)
    assert torch.equal(result.top_ids[2], logprobs.topk(3).indices)
    assert torch.allclose(result.target_probs[2], logprobs[..., [3, 7]].exp(), atol=1e-6)
    ranks = (result.logits[2].unsqueeze(-2) > result.logits[2][..., [3, 7]].unsqueeze(-1)).sum(-1)
    assert torch.equal(result.target_ranks[2], ranks)
    entropy = torch.distributions.Categorical(logits=result.logits[2]).entropy()
    assert torch.allclose(result.entropy[2], entropy, atol=1e-5)
    final = torch.distributions.Categorical(logits=logits)
    kl = torch.distributions.kl_divergence(final, torch.distributions.Categorical(logits=result.logits[2]))
    assert torch.allclose(result.kl[2], kl, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in MODELS if n != "damped_llama"])
def test_the_coda_lens_is_the_model_at_that_many_iterations(name: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model)
    kinds = ["coda"] if "looped" in name or "anchored" in name else ["coda", "native"]
    for kind in kinds:
        result = loop_lens.lens(model, tokens, kind=kind, keep_logits=True)  # type: ignore[arg-type]
        assert result.logits is not None and len(result.sites) == model.recurrences
        for t in range(model.recurrences):
            with model.at_recurrences(t + 1):
                assert (model(tokens) - result.logits[t]).abs().max() < 1e-5


@torch.no_grad()
def test_ouro_native_lens_is_the_unembedding_of_the_normed_state() -> None:
    model = opened("ouro")
    tokens, _ = prompts(model)
    _, cache = model.run_with_cache(tokens)
    head = model.original_model.lm_head.weight
    for kind, sites in (("native", None), ("logit", "state_out")):
        result = loop_lens.lens(model, tokens, kind=kind, sites=sites, keep_logits=True)  # type: ignore[arg-type]
        assert result.logits is not None
        for t in range(model.recurrences):
            assert (result.logits[t] - cache[f"loop.{t}.hook_state_out"] @ head.T).abs().max() < 1e-5


@torch.no_grad()
def test_transformer_lens_logit_lens_on_the_untied_twin() -> None:
    model, twin = untied_twin()
    tokens, _ = prompts(model)
    ours = loop_lens.lens(model, tokens, keep_logits=True)
    assert ours.logits is not None
    assert (ours.logits[-1] - twin(tokens)).abs().max() < 1e-5
    _, cache = twin.run_with_cache(tokens)
    for i in range(len(model.schedule)):
        by_hand = twin.unembed(twin.ln_final(cache[f"blocks.{i}.hook_resid_post"]))
        assert (ours.logits[i] - by_hand).abs().max() < 1e-5
    theirs = logit_lens(twin, tokens, targets=[3])
    ranked = loop_lens.lens(model, tokens, targets=[3])
    stacked = theirs.rank_trajectory()[-len(model.schedule) :]
    assert torch.equal(stacked, ranked.target_ranks[:, :, -1, 0])


@torch.no_grad()
def test_tables_pictures_and_first_on_top() -> None:
    model = wrapped(injection="linear", initial_state="noise")
    result = loop_lens.lens(model, "w1 w2 w3", positions=[-1, 0], targets=["w3", 4])
    table = result.to_dataframe()
    assert len(table) == len(model.schedule) * 2 * 2
    assert set(table.target) == {"w3", "w4"} and set(table.position) == {3, 0}
    row = table[(table.iteration == 1) & (table.layer == 0) & (table.position == 3) & (table.target == "w4")]
    s = result.sites.index("loop.1.blocks.0.hook_resid_post")
    assert int(row["rank"].iloc[0]) == int(result.target_ranks[s, 0, 0, 1])
    best = int(result.top_ids[s, 0, 0, 0])
    again = loop_lens.lens(model, "w1 w2 w3", targets=best)
    first = again.first_on_top(0)
    assert first is not None and again.sites.index(first) <= s
    assert len(result.plot().axes[0].texts) == len(model.schedule) * 2
    assert len(result.plot("ranks").axes[0].lines) == 2
    with pytest.raises(ValueError, match="targets="):
        loop_lens.lens(model, "w1").plot("ranks")


@torch.no_grad()
def test_memory_does_not_grow_with_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    import loop_lens.lenses.readout as readout

    alive: list[int] = []
    original = readout._summarise
    import gc
    import weakref

    refs: list[Any] = []

    def watched(table: Any, site: int, logits: Tensor, *args: Any) -> Any:
        refs.append(weakref.ref(logits))
        gc.collect()
        alive.append(sum(ref() is not None for ref in refs))
        return original(table, site, logits, *args)

    monkeypatch.setattr(readout, "_summarise", watched)
    model = wrapped(injection="linear", initial_state="noise")
    model.set_recurrences(24)
    loop_lens.lens(model, torch.ones(1, 4, dtype=torch.long))
    assert len(alive) == len(model.schedule) and max(alive) <= 2


TEXT = torch.randint(1, 48, (40, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rank", [None, 4, 0])
@pytest.mark.parametrize("shared", [False, True])
def test_tuned_lens_is_never_worse_on_held_out_text(rank: int | None, shared: bool, tmp_path: Path) -> None:
    model = wrapped(injection="linear", initial_state="noise")
    before = {name: p.clone() for name, p in model.original_model.named_parameters()}
    trained = fit_tuned_lens(
        model,
        TEXT,
        rank=rank,
        shared=shared,
        steps=60,
        seq_len=12,
        learning_rate=1e-2,
        progress=False,
    )
    report = trained.report
    assert (report.tuned_kl <= report.logit_kl + 1e-6).all()
    if rank is None:
        assert (report.tuned_kl[:-1] < 0.9 * report.logit_kl[:-1]).sum() >= 3
    assert all(torch.equal(p, before[name]) for name, p in model.original_model.named_parameters())
    held = TEXT[torch.randperm(40, generator=torch.Generator().manual_seed(0))][:8]
    result = loop_lens.lens(model, held, kind=trained)
    assert torch.allclose(
        result.kl.mean((1, 2)), torch.tensor(report.tuned_kl.to_list()), rtol=1e-3, atol=1e-5
    )
    again = TunedLens.load(trained.save(tmp_path / "lens.safetensors"))
    reread = loop_lens.lens(model, held, kind=again)
    assert torch.equal(reread.kl, result.kl) and again.report.equals(report)
    same = fit_tuned_lens(
        model,
        TEXT,
        rank=rank,
        shared=shared,
        steps=60,
        seq_len=12,
        learning_rate=1e-2,
        progress=False,
    )
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), same.parameters(), strict=True))


def test_untrained_translators_are_the_logit_lens() -> None:
    model = opened("ouro")
    tokens, _ = prompts(model)
    keys = [f"{f.prefix}.hook_resid_post" for f in model.schedule]
    identity = TunedLens(keys, model.cfg.d_model, rank=2)
    a = loop_lens.lens(model, tokens, kind=identity)
    b = loop_lens.lens(model, tokens)
    assert torch.allclose(a.kl, b.kl, atol=1e-6)


WORDS = ["w1 w2 w3 w4 w5 w6", "w7 w9 w11 w13 w2 w40"]


def test_jacobian_lens_on_the_untied_twin() -> None:
    model, twin = untied_twin()
    theirs = JacobianLens.fit(
        twin, WORDS, corpus="w", skip_first_positions=0, dim_batch=8, show_progress=False
    )
    ours = fit_jacobian_lens(model, WORDS, progress=False)
    for layer, matrix in theirs.jacobians.items():
        assert torch.allclose(ours.matrices[model.schedule[layer].prefix], matrix.float(), atol=1e-4)
    tokens = model.to_tokens(WORDS[0])
    readout = theirs.readout(twin, tokens, return_full_logits=True)
    assert readout.lens_logits is not None
    result = loop_lens.lens(model, tokens, kind=ours, keep_logits=True)
    assert result.logits is not None
    for layer in range(len(model.schedule)):
        assert torch.allclose(result.logits[layer, 0], readout.lens_logits[layer], atol=1e-4)


@torch.no_grad()
def test_the_factorised_jacobian_is_exact_on_a_linear_loop(tmp_path: Path) -> None:
    from tests.interventions.test_paths import linear_loop

    model = linear_loop()
    whole = fit_jacobian_lens(model, WORDS, progress=False)
    parts = fit_jacobian_lens(model, WORDS, factorised=True, progress=False)

    for firing in model.schedule:
        at = model.locate(f"{firing.prefix}.hook_resid_post")
        assert torch.allclose(whole.matrix(at, model), parts.matrix(at, model), atol=1e-4)
    again = LoopJacobianLens.load(parts.save(tmp_path / "j.safetensors"))
    model.set_recurrences(6)  # it serves other numbers of iterations
    longer = fit_jacobian_lens(model, WORDS, progress=False)
    at = model.locate("loop.0.blocks.0.hook_resid_post")
    assert torch.allclose(longer.matrix(at, model), again.matrix(at, model), atol=1e-4)
    with pytest.raises(ValueError, match="another number of iterations"):
        loop_lens.lens(model, "w1 w2", kind=whole)
    read = loop_lens.lens(model, "w1 w2", kind=again)
    assert read.kl[-1].abs().max() < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_factorised_on_families(name: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model, n=1, length=5)
    if name == "hrm_text":
        with pytest.raises(ValueError, match="loops in loops"):
            fit_jacobian_lens(model, [tokens[0]], factorised=True, progress=False)  # type: ignore[list-item]
        return
    lens = fit_jacobian_lens(model, [tokens[0]], factorised=True, progress=False)  # type: ignore[list-item]
    result = loop_lens.lens(model, tokens, kind=lens)
    assert result.kl.isfinite().all()


REQUESTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kind": "mirror"}, ValueError, "kind 'mirror' is unknown"),
    ({"kind": "tuned"}, ValueError, "loop_lens.lenses.fit_tuned_lens"),
    ({"targets": "w1 w2"}, ValueError, "2 tokens"),
    ({"targets": 99}, ValueError, "token 99 does not exist"),
    ({"positions": [9]}, ValueError, "position 9 does not exist"),
    ({"top_k": 0}, ValueError, "top_k"),
    ({"sites": "resid"}, UnknownNameError, "does not exist"),
    ({"sites": "pattern"}, ValueError, "not a stream"),
    ({"sites": "resid_post", "kind": "coda"}, ValueError, "reads the state after an iteration"),
    ({"sites": []}, ValueError, "sites is empty"),
]


@pytest.mark.parametrize(("request_", "error", "says"), REQUESTS, ids=[r[2] for r in REQUESTS])
def test_bad_requests(request_: dict[str, Any], error: type[Exception], says: str) -> None:
    model = wrapped()
    with pytest.raises(error, match=says):
        loop_lens.lens(model, "w1 w2 w3", **request_)
    assert not any(point.fwd_hooks for point in model.registry.existing())


def test_lenses_of_other_models_and_kinds_without_meaning() -> None:
    model, other = opened("ouro"), opened("retrofit_llama")
    tokens, _ = prompts(model)
    lens = TunedLens(["loop.0.blocks.0.hook_resid_post"], model.cfg.d_model, rank=0, model_id="0123")
    with pytest.raises(ValueError, match="another model"):
        loop_lens.lens(model, tokens, kind=lens)
    lens.model_id = ""
    with pytest.raises(ValueError, match="no translator for"):
        loop_lens.lens(model, tokens, kind=lens)
    with pytest.raises(ValueError, match="has no meaning for this model"):
        loop_lens.lens(opened("looped_llama"), tokens, kind="native")
    with pytest.raises(ValueError, match="rows of"):
        fit_tuned_lens(other, torch.ones(1, 9, dtype=torch.long), progress=False)


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    model = wrapped()
    jacobian = fit_jacobian_lens(model, WORDS, factorised=True, progress=False).save(
        tmp_path / "j.safetensors"
    )
    with pytest.raises(ValueError, match="holds LoopJacobianLens, not a TunedLens"):
        TunedLens.load(jacobian)
