"""``register()`` changes what transformers and transformer-lens open; importing does not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import GOLDENS

_CHECK = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformer_lens.model_bridge import TransformerBridge

stock = TransformerBridge.boot_transformers
import loop_lens
goldens = Path(sys.argv[1])
assert TransformerBridge.boot_transformers is stock
for family in ("ouro", "huginn"):
    try:
        AutoConfig.from_pretrained(goldens / family)
    except ValueError:
        continue
    raise SystemExit(f"importing loop_lens taught transformers {family}")

loop_lens.register()
once = TransformerBridge.boot_transformers
loop_lens.register()
assert TransformerBridge.boot_transformers is once
for family in ("huginn", "ouro", "retrofit_llama", "retrofit_olmo", "hrm_text"):
    expected = load_file(goldens / family / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(goldens / family)
    if "initial_state" in expected:
        model.model.initial_state = expected["initial_state"]
    assert (model(expected["input_ids"]).logits - expected["logits"]).abs().max() < 1e-5, family
    bridge = TransformerBridge.boot_transformers(str(goldens / family), device="cpu")
    assert type(bridge) is loop_lens.HookedLoopedTransformer, family
    if "initial_state" in expected:
        bridge.initial_state = expected["initial_state"]
    assert (bridge(expected["input_ids"]) - expected["logits"]).abs().max() < 1e-5, family

loop_lens.LoopedTransformer(loop_lens.LoopedConfig()).save_pretrained(sys.argv[2])
native = AutoModelForCausalLM.from_pretrained(sys.argv[2])
assert type(native) is loop_lens.LoopedTransformer
print("all well")
"""


def test_register_opens_every_family_and_importing_changes_nothing(tmp_path: object) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _CHECK, str(GOLDENS), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0 and "all well" in run.stdout, run.stderr[-2000:]


def test_other_options_of_boot_transformers_are_refused_not_dropped() -> None:
    from loop_lens.opening.registration import _boot

    with pytest.raises(ValueError, match="n_ctx"):
        _boot(str(GOLDENS / "ouro"), n_ctx=16)
