"""Proposition 4.2 against matrices written out in full, and where it does not apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import loop_lens
from loop_lens.dynamics import AttentionBound, attention_bound
from loop_lens.dynamics.scores import head_norms
from loop_lens.measuring.moments import DivergedError
from tests.dynamics.test_attention import TEXTS
from tests.interventions.models import MODELS, opened, prompts, wrapped
from tests.oracles.unrolled import decoder

NORMED = ("retrofit_olmo",)
DECODERS = ("qwen2", "gemma2", "phi", "gptj", "gpt_neox", "opt")


def looped(name: str) -> Any:
    if name in MODELS:
        return opened(name)
    return loop_lens.loopify(decoder(name), layers=[2, 3], times=4)


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in (*MODELS, *DECODERS) if n not in NORMED])
def test_attention_moves_no_further_than_proven(name: str) -> None:
    model = looped(name)
    tokens, _ = prompts(model)
    found = attention_bound(model, tokens)
    assert found.holds() and found.holds("row_ratio")
    assert found.rotary == (name not in ("looped_gpt2", "opt"))
    assert float(found.worst["ratio"][1:].min()) > 1e-6  # the bound is not vacuous either
    if not found.rotary:
        assert torch.equal(found.worst["ratio"][1:], found.worst["stated_ratio"][1:])


def written_out(model: Any, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
    """W_Q and W_K [d_model (+ 1 for biases), d_head] of a native model's head, from its own projections."""
    attn = model.original_model.model.core[layer].self_attn
    d = attn.head_dim
    group = head // attn.num_key_value_groups
    found: list[np.ndarray] = []
    for projection, at in ((attn.q_proj, head), (attn.k_proj, group)):
        rows = slice(at * d, (at + 1) * d)
        w = projection.weight[rows].T.double().numpy()
        if projection.bias is not None:
            w = np.vstack([w, projection.bias[rows].double().numpy()])
        found.append(w)
    return found[0], found[1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["huginn", "retrofit_llama", "ouro"])
def test_against_whole_matrices(name: str) -> None:
    model = opened(name)
    tokens, _ = prompts(model, n=1)
    found = attention_bound(model, tokens)
    _, cache = model.run_with_cache(tokens)
    layer, i = 1, 2
    x, y = (
        cache[model.name("attn.hook_in", iteration=t, layer=layer)][0].double().numpy() for t in (i, i - 1)
    )
    a, b = (cache[model.name("pattern", iteration=t, layer=layer)][0].double().numpy() for t in (i, i - 1))
    gap, gaps = np.linalg.norm(x - y), np.linalg.norm(x - y, axis=1)
    scale = model.cfg.d_head**-0.5
    for head in range(model.cfg.n_heads):
        w_q, w_k = written_out(model, layer, head)
        inputs = [np.hstack([z, np.ones((len(z), len(w_q) - z.shape[1]))]) for z in (x, y)]
        kappa = np.linalg.svd(w_q @ w_k.T, compute_uv=False)[0]
        product = np.linalg.norm(w_q, 2) * np.linalg.norm(w_k, 2)
        spectral = max(np.linalg.norm(z, 2) for z in inputs)
        whole = max(np.linalg.norm(z) for z in inputs)
        longest = max(np.linalg.norm(z, axis=1).max() for z in inputs)
        expected = {
            "measured": np.linalg.norm(a[head] - b[head]),
            "bound": 0.5 * 2 * whole * product * scale * gap,
            "stated_bound": 0.5 * 2 * spectral * kappa * scale * gap,
            "row_measured": 0.5 * np.abs(a[head] - b[head]).sum(-1).max(),
            "row_bound": 0.5 * 2 * longest * product * scale * gaps.max(),
        }
        assert float(found.kappa[layer, head]) == pytest.approx(kappa, rel=1e-6)
        assert float(found.kappa_product[layer, head]) == pytest.approx(product, rel=1e-6)
        for metric, value in expected.items():
            assert float(found.mean(metric)[i, layer, head]) == pytest.approx(float(value), rel=1e-4), metric
        ratio = expected["measured"] / expected["bound"]
        assert float(found.worst["ratio"][i, layer, head]) == pytest.approx(float(ratio), rel=1e-4)


@torch.no_grad()
def test_as_printed_it_fails_under_rotary_embeddings() -> None:
    model = wrapped(injection="linear", initial_state="noise", num_attention_heads=3)
    d = model.cfg.d_head
    for block in model.original_model.model.core:
        # Queries in one half of the turned planes, keys in the other: W_Q W_K^T = 0.
        block.self_attn.q_proj.weight.view(3, d, -1)[:, d // 2 :] = 0
        block.self_attn.k_proj.weight.view(3, d, -1)[:, : d // 2] = 0
    found = attention_bound(model, TEXTS)
    assert float(found.kappa.max()) < 1e-6 < float(found.kappa_product.min())
    assert float(found.mean("measured")[1:].min()) > 1e-3
    assert found.holds() and not found.holds("stated_ratio")


@torch.no_grad()
def test_an_identity_of_the_projections_has_a_known_norm() -> None:
    model = wrapped(num_attention_heads=3, num_key_value_heads=1, qk_bias=True)
    attn = model.original_model.model.core[0].self_attn
    d = model.cfg.d_head
    for k in range(3):
        attn.q_proj.weight[k * d : (k + 1) * d] = (k + 1) * torch.eye(d, 24)
    attn.k_proj.weight.copy_(2 * torch.eye(d, 24))
    attn.q_proj.bias.zero_()
    attn.k_proj.bias.zero_()
    firing = model.schedule.find("loop", 0, 0)
    kappa, product, *_ = head_norms(model.blocks[firing.index].attn)
    assert kappa.tolist() == pytest.approx([2, 4, 6]) and product.tolist() == pytest.approx([2, 4, 6])


def test_where_it_does_not_apply_it_says_so() -> None:
    for model in (opened("retrofit_olmo"), wrapped(qk_norm="head"), wrapped(qk_norm="head_after_rope")):
        with pytest.raises(ValueError, match="norms its queries and keys"):
            attention_bound(model, torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match="has no W_Q and W_K"):
        head_norms(torch.nn.Linear(2, 2))
    model = wrapped(recurrences=4)
    with pytest.raises(ValueError, match="at least 2 iterations"), model.at_recurrences(1):
        attention_bound(model, TEXTS)
    with pytest.raises(ValueError, match="prompt 0 has one token"):
        attention_bound(model, torch.tensor([[1]]))
    with pytest.raises(ValueError, match="ratio 'speed' is unknown"):
        attention_bound(model, TEXTS).holds("speed")
    for t in (0, 2):
        name = model.name("resid_pre", iteration=t, layer=1)
        with (
            model.hooks(fwd_hooks=[(name, lambda value, hook: value * float("nan"))]),
            pytest.raises(DivergedError, match=f"iteration {t}, layer 1"),
        ):
            attention_bound(model, TEXTS)


def test_nothing_moves_where_the_state_stands_still() -> None:
    model = wrapped(injection="linear", initial_state="zeros", recurrences=4)
    with torch.no_grad():
        model.original_model.model.injection.adapter.weight[:, :24] = 0  # every iteration is the first
    found = attention_bound(model, TEXTS)
    assert not found.mean("measured")[1:].any() and not found.worst["ratio"][1:].any() and found.holds()


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_padding_changes_nothing_and_parts_merge(tmp_path: Path) -> None:
    model = opened("huginn")
    generator = torch.Generator().manual_seed(1)
    each = [torch.randint(1, model.cfg.d_vocab, (n,), generator=generator) for n in (3, 9, 5)]
    together = attention_bound(model, each, batch_size=3)
    alone = [attention_bound(model, [p]) for p in each]
    merged = alone[0].merge(alone[1]).merge(alone[2])
    for metric in together.moments.metrics:
        assert same(together.mean(metric), merged.mean(metric)), metric
    for ratio, worst in together.worst.items():
        assert torch.allclose(worst, merged.worst[ratio], rtol=1e-4, equal_nan=True)
    together.save(tmp_path / "bound")
    again = AttentionBound.load(tmp_path / "bound")
    assert again.to_dataframe().equals(together.to_dataframe())
    assert len(together.plot().axes[0].lines) == together.kappa.shape[0] + 1
    with pytest.raises(ValueError, match="kappa"):
        together.merge(attention_bound(opened("ouro"), torch.tensor([[1, 2, 3]])))
