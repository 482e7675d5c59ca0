"""Weights that transformer-lens has processed are saved as the model that runs, or not at all."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import loop_lens
from loop_lens import HookedLoopedTransformer
from tests.interventions.models import opened, wrapped
from tests.oracles.unrolled import MODELS as DECODERS
from tests.oracles.unrolled import decoder

TOKENS = torch.tensor([[1, 5, 3, 9, 2], [4, 4, 8, 1, 0]])


def processed(name: str) -> tuple[HookedLoopedTransformer, Any]:
    """A model after weight processing, and its state dict before."""
    if name == "tied":
        model = wrapped(injection="none", initial_state="prelude", tie_word_embeddings=True)
    elif name in DECODERS:
        model = loop_lens.loopify(decoder(name), layers=[2, 3], times=2)
    else:
        model = opened(name)
    before = copy.deepcopy(model.state_dict())
    model.enable_compatibility_mode(disable_warnings=True)
    return model, before


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["tied", "no_prelude", "retrofit_llama", *(n for n in DECODERS if n != "olmo2")]
)
def test_what_is_saved_after_processing_is_what_runs(name: str, tmp_path: Path) -> None:
    model, before = processed(name)
    logits = model(TOKENS).log_softmax(-1)
    try:
        model.save_pretrained(tmp_path / "saved")
    except ValueError as error:
        assert "after enable_compatibility_mode()" in str(error)
        assert not (tmp_path / "saved").exists()
        for refused in (model.state_dict, model.native_state, lambda: model.load_state_dict(before)):
            with pytest.raises(ValueError, match="save and load before it"):
                refused()
        assert torch.equal(model(TOKENS).log_softmax(-1), logits)
        assert name in ("tied", "qwen2", "gemma2", "gpt2", "gptj", "gpt_neox", "opt")
    else:
        assert (loop_lens.boot(tmp_path / "saved")(TOKENS).log_softmax(-1) - logits).abs().max() < 1e-5


def test_names_alone_leave_saving_as_it_was(tmp_path: Path) -> None:
    model = loop_lens.loopify(decoder("gpt2"), layers=[2, 3], times=2)
    model.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loop_lens.boot(tmp_path)(TOKENS), model(TOKENS))
