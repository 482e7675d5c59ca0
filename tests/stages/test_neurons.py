"""Prediction and suppression neurons against numpy, with weights made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from loop_lens.measuring.run import schedule_of
from loop_lens.stages import NeuronFractions, directions, prediction_neurons
from tests.interventions.models import FAMILIES, opened, wrapped
from tests.stages.models import feed_forward


def moments(effects: Any) -> tuple[Any, Any]:
    """Pearson kurtosis and skew of each row, as scipy.stats defines them (biased)."""
    centred = effects - effects.mean(1, keepdims=True)
    z = centred / np.sqrt((centred**2).mean(1, keepdims=True))
    return (z**4).mean(1), (z**3).mean(1)


def array(parameter: Any) -> Any:
    """A parameter in float64."""
    return parameter.detach().double().numpy()


def effects(w_out: Any, w_u: Any, gain: Any, *, branch: Any = 1.0, centre: bool = False, unit: bool) -> Any:
    """Effects [neuron token] of w_out [neuron d_model] on w_u [token d_model], written out."""
    through = (w_out - w_out.mean(1, keepdims=True) if centre else w_out) * branch
    tokens = w_u * gain
    if centre:
        tokens = tokens - tokens.mean(1, keepdims=True)
    tokens = tokens - tokens.mean(0)
    if unit:
        tokens = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    return through @ tokens.T


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("name", [*FAMILIES, "looped_llama", "looped_gpt2"])
def test_each_family_by_hand(name: str, unit: bool) -> None:
    model = opened(name)
    found = prediction_neurons(model, unit_tokens=unit)
    inside: Any = model.original_model
    with torch.no_grad():
        w_u = array(inside.lm_head.weight)
    for b in range(model.schedule.n_blocks):
        block: Any = model.body.blocks[b]
        centre, branch = False, 1.0
        if name == "looped_gpt2":
            w_out, gain, centre = array(block.mlp.c_proj.weight), array(inside.transformer.ln_f.weight), True
        else:
            w_out = array(block.mlp.down_proj.weight).T
            gain = 1.0 if name == "hrm_text" else array(inside.model.norm.weight)
            if hasattr(block, "mlp_post_norm"):
                branch = array(block.mlp_post_norm.weight)
        kurtosis, skew = moments(effects(w_out, w_u, gain, branch=branch, centre=centre, unit=unit))
        own = found.block == b
        assert found.kurtosis[own].tolist() == pytest.approx(kurtosis.tolist(), rel=1e-4)
        assert found.skew[own].tolist() == pytest.approx(skew.tolist(), rel=1e-3, abs=1e-4)
    firing = model.schedule[model.schedule.visits[-1][0]]
    assert found.blocks[-1] == (firing.segment, firing.layer)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2"])
def test_a_feed_forward_model_by_hand(name: str) -> None:
    model = feed_forward(name)
    inside: Any = model.original_model
    found = prediction_neurons(model)
    for b in range(model.cfg.n_layers):
        branch, centre = 1.0, False
        if name == "gpt2":
            block = inside.transformer.h[b]
            w_out, gain, centre = array(block.mlp.c_proj.weight), array(inside.transformer.ln_f.weight), True
        else:
            block = inside.model.layers[b]
            w_out, gain = array(block.mlp.down_proj.weight).T, array(inside.model.norm.weight)
            if name in ("gemma2", "olmo2"):
                branch = array(block.post_feedforward_layernorm.weight)
            if name == "gemma2":  # its norms multiply by one more than their weight
                gain, branch = gain + 1, branch + 1
        w_u = array(inside.lm_head.weight)
        kurtosis, skew = moments(effects(w_out, w_u, gain, branch=branch, centre=centre, unit=True))
        own = found.block == b
        assert found.kurtosis[own].tolist() == pytest.approx(kurtosis.tolist(), rel=1e-4)
        assert found.skew[own].tolist() == pytest.approx(skew.tolist(), rel=1e-3, abs=1e-4)
    assert len(found.blocks) == len(schedule_of(model))


def handmade() -> Any:
    """A model whose neurons 0-4 of the loop's layer 1 promote a token each, and 5-6 suppress one."""
    model = wrapped(prelude_layers=1, core_layers=2, coda_layers=0)
    w_u = model.original_model.lm_head.weight
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        w_u.copy_(0.01 * torch.randn(w_u.shape, generator=generator))
        for token in range(7):
            w_u[token, token] = 10.0
        out = model.original_model.model.core[1].mlp.down_proj.weight
        out.copy_(torch.randn(out.shape, generator=generator))
        for neuron in range(7):
            out[:, neuron] = 0
            out[neuron, neuron] = 3e5 if neuron < 5 else -1e-5  # how long they are does not matter
    return model


def test_neurons_made_by_hand_are_found() -> None:
    model = handmade()
    found = prediction_neurons(model, unit_tokens=False)
    table = found.neurons_to_dataframe()
    table = table[table["block"] == 2]
    assert table["neuron"].tolist() == list(range(len(table)))
    assert table["kind"].tolist()[:7] == ["prediction"] * 5 + ["suppression"] * 2
    expected = (found.kurtosis[found.block == 2] > 10).sum()
    summary = found.to_dataframe()
    assert summary[["segment", "layer"]].to_numpy().tolist() == [["prelude", 0], ["loop", 0], ["loop", 1]]
    n = summary["neurons"][2]
    assert summary["prediction"][2] + summary["suppression"][2] == pytest.approx(int(expected) / n)
    assert found.threshold == 10
    none = prediction_neurons(model, unit_tokens=False, threshold=1e6)
    assert none.prediction.tolist() == none.suppression.tolist() == [0, 0, 0]


def test_blocks_of_tokens_and_neurons_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("huginn")
    whole = prediction_neurons(model)
    monkeypatch.setattr(directions, "TOKENS", 37)
    monkeypatch.setattr(directions, "NEURONS", 10)
    parts = prediction_neurons(model)
    assert torch.allclose(parts.kurtosis, whole.kurtosis, rtol=1e-5)
    assert torch.allclose(parts.skew, whole.skew, rtol=1e-4, atol=1e-5)


def test_the_number_of_iterations_and_folding_change_nothing() -> None:
    model = opened("retrofit_llama")
    before, unembedding = prediction_neurons(model), model.W_U.detach().clone()
    model.set_recurrences(7)
    assert torch.equal(prediction_neurons(model).kurtosis, before.kurtosis)
    model.enable_compatibility_mode()
    assert not torch.equal(model.W_U, unembedding)  # the final norm is in it now
    folded = prediction_neurons(model)
    assert torch.allclose(folded.kurtosis, before.kurtosis, rtol=1e-4)
    assert torch.allclose(folded.skew, before.skew, rtol=1e-3, atol=1e-4)
    assert not any(point.fwd_hooks for point in model.hook_points())


def test_neurons_without_effects_are_neither() -> None:
    model = handmade()
    with torch.no_grad():
        model.original_model.model.core[0].mlp.down_proj.weight.zero_()
    found = prediction_neurons(model)
    assert found.kurtosis[found.block == 1].isnan().all()
    assert float(found.prediction[1]) == float(found.suppression[1]) == 0
    with torch.no_grad():
        model.original_model.model.core[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        prediction_neurons(model)


def test_disk_and_plot(tmp_path: Path) -> None:
    found = prediction_neurons(opened("ouro"))
    found.save(tmp_path / "found")
    again = NeuronFractions.load(tmp_path / "found")
    pd.testing.assert_frame_equal(again.to_dataframe(), found.to_dataframe())
    assert torch.equal(again.kurtosis, found.kurtosis)
    lines = found.plot(against={"plain": prediction_neurons(feed_forward("llama"))}).axes[0].lines
    assert [line.get_label() for line in lines] == [
        "prediction", "suppression", "prediction (plain)", "suppression (plain)"
    ]  # fmt: skip


def test_a_model_without_such_neurons_says_so() -> None:
    model = feed_forward("llama")
    del model.blocks[3].mlp._modules["out"]
    with pytest.raises(ValueError, match=r"blocks\.blocks\.3 has no MLP"):
        prediction_neurons(model)
