"""Weight processing happens wholly, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.weight_processing import ProcessWeights

import loop_lens
from tests.oracles.twin import small_looped
from tests.oracles.unrolled import decoder

TOKENS = torch.randint(1, 48, (2, 7), generator=torch.Generator().manual_seed(1))


def opened(name: str) -> Any:
    if name == "native":
        torch.manual_seed(0)
        return loop_lens.wrap(small_looped())
    return loop_lens.loopify(decoder(name), layers=range(2, 5), times=2)


@pytest.mark.parametrize("name", ["native", "gpt2", "phi3", "llama"])
def test_processing_alone_is_what_compatibility_mode_does(name: str) -> None:
    alone, within = opened(name), opened(name)
    before = alone(TOKENS).log_softmax(-1)
    alone.process_weights()
    within.enable_compatibility_mode(disable_warnings=True)
    assert not torch.equal(alone.W_U, opened(name).W_U)
    for logits in (alone(TOKENS), alone.run_with_cache(TOKENS)[0]):
        assert (logits.log_softmax(-1) - before).abs().max() < 1e-4
        assert (logits - within(TOKENS)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "where", [(ProcessWeights, "process_weights"), (ArchitectureAdapter, "postprocess_weights")]
)
@pytest.mark.parametrize("name", ["native", "gpt2", "phi3"])
@pytest.mark.parametrize("call", ["process_weights", "enable_compatibility_mode"])
def test_a_failure_leaves_the_model_as_it_was(
    name: str, where: tuple[Any, str], call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(name)
    list(model.blocks)
    bare, (hooked, cache) = model(TOKENS), model.run_with_cache(TOKENS)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(*where, fail)
        with pytest.raises(MemoryError, match="no memory"):
            getattr(model, call)()
    again, seen = model.run_with_cache(TOKENS)
    assert torch.equal(model(TOKENS), bare) and torch.equal(again, hooked)
    assert seen.keys() == cache.keys()
    getattr(model, call)()
    assert (model(TOKENS).log_softmax(-1) - bare.log_softmax(-1)).abs().max() < 1e-4


def test_processing_that_is_not_sound_is_refused() -> None:
    model = loop_lens.wrap(small_looped(loop_norm=True))
    with pytest.raises(ValueError, match="not sound for this model"):
        model.process_weights()
