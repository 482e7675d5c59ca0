"""Terms add up on every family, norm and injection, and are transformer-lens' where that is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformer_lens.tools.analysis.direct_logit_attribution import direct_logit_attribution

import loop_lens
from loop_lens import attribute
from tests.interventions.models import MODELS, opened, prompts, wrapped
from tests.oracles.twin import untied_twin
from tests.oracles.unrolled import MODELS as DECODERS
from tests.oracles.unrolled import decoder


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_terms_sum_to_the_logit_on_every_family(name: str, through: bool, heads: bool) -> None:
    model = opened(name)
    tokens, _ = prompts(model)
    logits = model(tokens).detach()
    found = attribute(model, tokens, target=3, pos=4, heads=heads, through_injection=through)
    assert found.terms.shape == (len(found.labels), 2)
    assert relative(found.total, logits[:, 4, 3]) < 1e-4
    assert torch.allclose(found.terms.sum(0), found.total)
    pair = attribute(model, tokens, target=(3, 5), heads=heads, through_injection=through)
    assert relative(pair.total, logits[:, -1, 3] - logits[:, -1, 5]) < 1e-4
    kinds = {component.kind for component in pair.components}  # type: ignore[union-attr]
    assert {"mlp", "head" if heads else "attn"} <= kinds
    assert ("injection" in kinds) == (model.body.injects and not through)


@pytest.mark.parametrize("norm", ["pre", "sandwich", "post_branch", "post_residual"])
@pytest.mark.parametrize("injection", ["none", "add", "linear", "diagonal"])
@pytest.mark.parametrize("loop_norm", [False, True])
@pytest.mark.parametrize("recurrences", [1, 4, 32])
def test_every_norm_and_injection(norm: str, injection: str, loop_norm: bool, recurrences: int) -> None:
    start = "prelude" if injection == "none" else "noise"
    model = wrapped(
        block_norm=norm,
        injection=injection,
        initial_state=start,
        loop_norm=loop_norm,
        recurrences=recurrences,
    )
    tokens, _ = prompts(model, n=1)
    logits = model(tokens)[0, -1].detach()
    for through in (False, True):
        found = attribute(model, tokens, target=7, through_injection=through)
        assert abs(float(found.total - logits[7])) < 1e-4 * max(1.0, abs(float(logits[7])))
        site = f"loop.{recurrences - 1}.hook_state_out"
        _, cache = model.run_with_cache(tokens, names_filter=site)
        direction = torch.randn(model.cfg.d_model)
        found = attribute(model, tokens, target=direction, site=site, pos=2, through_injection=through)
        value = float((cache[site][0, 2] @ direction).detach())
        assert abs(float(found.total) - value) < 1e-4 * max(1.0, float(cache[site][0, 2].norm().detach()))


@pytest.mark.parametrize("name", [n for n in DECODERS if n != "gemma2"])
def test_looped_decoders(name: str) -> None:
    model = loop_lens.loopify(decoder(name), layers=[2, 3], times=3)
    tokens, _ = prompts(model)
    logits = model(tokens).detach()
    found = attribute(model, tokens, target=(3, 5))
    assert relative(found.total, logits[:, -1, 3] - logits[:, -1, 5]) < 1e-4


def test_a_soft_cap_is_left_out() -> None:
    model = loop_lens.loopify(decoder("gemma2"), layers=[2, 3], times=3)
    tokens, _ = prompts(model)
    _, cache = model.run_with_cache(tokens, names_filter="unembed.hook_in")
    before_cap = (cache["unembed.hook_in"] @ model.W_U)[:, -1, 3].detach()
    assert relative(attribute(model, tokens, target=3).total, before_cap) < 1e-5


def test_transformer_lens_own_on_the_untied_pre_norm_twin() -> None:
    model, twin = untied_twin()
    tokens, _ = prompts(model, n=1)
    ours = attribute(model, tokens, target=(3, 5))
    twin.enable_compatibility_mode(disable_warnings=True)  # it wants the final norm folded
    scores: dict[str, float] = {}
    with torch.no_grad():
        for unit in ("component", "head"):
            theirs = direct_logit_attribution(twin, tokens, 3, 5, unit=unit)
            scores |= dict(zip(theirs.labels, theirs.attribution.flatten().tolist(), strict=True))
    seen = 0
    for component, term in zip(ours.components, ours.terms.tolist(), strict=True):
        assert not isinstance(component, str)
        if component.segment is None:
            assert component.kind == "embedding" and term == pytest.approx(scores["embed"], abs=1e-5)
            continue
        assert component.layer is not None
        firing = model.schedule.find(component.segment, component.iteration, component.layer).index
        key = f"L{firing}H{component.head}" if component.kind == "head" else f"{firing}_mlp_out"
        assert term == pytest.approx(scores[key], abs=1e-5)
        seen += 1
    assert seen == len(model.schedule) * 4


def test_the_loops_that_plain_decomposition_gets_wrong() -> None:
    model = opened("ouro")
    tokens, _ = prompts(model, n=1)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    site = "loop.1.blocks.0.hook_resid_pre"
    direction = torch.randn(model.cfg.d_model)
    found = attribute(model, tokens, target=direction, site=site)
    assert float(found.total) == pytest.approx(float(cache[site][0, -1] @ direction), rel=1e-4)
    plain = cache["embed.hook_out"][0, -1] + sum(
        cache[f"{f.prefix}.{out}"][0, -1]
        for f in list(model.schedule)[: model.schedule.find("loop", 1, 0).index]
        for out in ("hook_attn_out", "hook_mlp_out")
    )
    assert abs(float(plain @ direction) - float(found.total)) > 0.05 * abs(float(found.total))
    lens_there = loop_lens.lens(model, tokens, sites=[site], keep_logits=True)
    assert lens_there.logits is not None
    read = attribute(model, tokens, target=5, site=site)
    assert float(read.total) == pytest.approx(float(lens_there.logits[0, 0, -1, 5]), rel=1e-4)
    assert logits.shape[0] == 1


def test_groups_tables_and_pictures() -> None:
    model = opened("huginn")
    tokens, _ = prompts(model, n=1)
    found = attribute(model, tokens, target=3)
    for by in ("iteration", "layer", "kind", "firing"):
        grouped = found.group(by)  # type: ignore[arg-type]
        assert grouped.terms.sum() == pytest.approx(float(found.total), rel=1e-4)
        assert grouped.total == found.total and len(set(grouped.labels)) == len(grouped.labels)
    by_iteration = found.group("iteration")
    index = [i for i, c in enumerate(found.components) if getattr(c, "iteration", None) == 1]
    one = by_iteration.terms[by_iteration.labels.index("loop 1")]
    assert float(one) == pytest.approx(float(found.terms[index].sum()), abs=1e-6)
    with pytest.raises(ValueError, match="grouped already"):
        by_iteration.group("layer")
    table = found.to_dataframe()
    assert list(table.columns) == ["label", "kind", "segment", "iteration", "layer", "head", "term"]
    assert len(found.plot(top=10).axes[0].patches) == 10


def test_bad_requests_and_nothing_left_behind() -> None:
    model = wrapped()
    before = {id(m): len(m._forward_hooks) for m in model.original_model.modules()}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"target": "w1 w2"}, "2 tokens"),
        ({"target": 99}, "token 99"),
        ({"target": torch.randn(24)}, "needs a site"),
        ({"target": torch.randn(3), "site": "loop.0.hook_state_out"}, "direction has shape"),
        ({"target": 3, "pos": 9}, "position 9"),
        ({"target": 3, "site": "loop.0.blocks.0.attn.hook_z"}, "not a stream"),
        ({"target": (1, 2, 3)}, "one token or a pair"),
    ]
    for options, says in cases:
        with pytest.raises(ValueError, match=says):
            attribute(model, "w1 w2 w3", **options)
    assert {id(m): len(m._forward_hooks) for m in model.original_model.modules()} == before
    assert not any(point.fwd_hooks for point in model.registry.existing())
    assert all(p.grad is None for p in model.original_model.parameters())
