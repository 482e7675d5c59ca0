"""Retrofits against the base model with layers left out, run by transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import loop_lens
from loop_lens.training import retrofit, train
from tests.training.toy import Copying, quick

IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [0, 6, 2, 2, 1, 5]])
SPLIT: dict[str, Any] = {"prelude": [0], "core": [2, 3], "coda": [5]}
BASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama biased": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "llama scaled": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "olmo2": {},
}


def base(name: str, **fields: Any) -> Any:
    """A small random model whose norms and biases are not those of initialisation."""
    given = {
        "vocab_size": 7,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": None,
        "initializer_range": 0.3,
    }
    config = AutoConfig.for_model(name.split()[0], **{**given, **BASES.get(name, {}), **fields})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def without_layers(model: Any, kept: list[int]) -> Tensor:
    """Logits of transformers' own model with these layers alone."""
    dropped = copy.deepcopy(model)
    dropped.model.layers = nn.ModuleList(dropped.model.layers[i] for i in kept)
    dropped.config.num_hidden_layers = len(kept)
    with torch.no_grad():
        return dropped(IDS, use_cache=False).logits


@pytest.mark.parametrize("injection", ["linear", "none"])
@pytest.mark.parametrize("name", BASES)
def test_at_one_iteration_it_is_the_base_model_without_the_layers_left_out(name: str, injection: str) -> None:
    model = base(name)
    looped = retrofit(model, recurrences=1, injection=injection, **SPLIT)
    with torch.no_grad():
        torch.testing.assert_close(
            looped(IDS).logits, without_layers(model, [0, 2, 3, 5]), atol=2e-5, rtol=1e-4
        )
    if name == "llama":
        assert torch.equal(looped(IDS).logits, without_layers(model, [0, 2, 3, 5]))


def test_more_iterations_run_the_core_again() -> None:
    model = base("llama")
    looped = retrofit(model, recurrences=3, **SPLIT)
    with torch.no_grad():
        expected = without_layers(model, [0, 2, 3, 2, 3, 2, 3, 5])
        torch.testing.assert_close(looped(IDS).logits, expected, atol=2e-5, rtol=1e-4)


def test_weights_are_copies_and_ties_hold() -> None:
    model = base("llama tied")
    before = model.model.layers[2].mlp.up_proj.weight.clone()
    looped = retrofit(model, recurrences=2, **SPLIT)
    assert looped.lm_head.weight is looped.model.embed_tokens.weight
    with torch.no_grad():
        looped.model.core[0].mlp.up_proj.weight.zero_()
    assert torch.equal(model.model.layers[2].mlp.up_proj.weight, before)


def test_it_trains_saves_and_opens(tmp_path: Path) -> None:
    looped = retrofit(base("llama"), recurrences=2, **SPLIT)
    trained = train(looped, Copying(), quick(4, lr=1e-3), folder=tmp_path).model
    opened = loop_lens.boot(tmp_path / "model")
    assert torch.equal(opened(IDS), trained(IDS).logits)


def test_what_cannot_be_retrofitted_is_refused() -> None:
    with pytest.raises(ValueError, match="layers 0-5"):
        retrofit(base("llama"), recurrences=2)
    with pytest.raises(ValueError, match="core is empty"):
        retrofit(base("llama"), recurrences=2, core=[], prelude=[0], coda=[1])
    with pytest.raises(ValueError, match="choose 'linear' or 'none'"):
        retrofit(base("llama"), recurrences=2, injection="add", **SPLIT)
    with pytest.raises(ValueError, match="window of 4"):
        retrofit(base("mistral", sliding_window=4), recurrences=2, **SPLIT)
    with pytest.raises(ValueError, match="'gpt_neox'"):
        retrofit(base("gpt_neox"), recurrences=2, **SPLIT)
