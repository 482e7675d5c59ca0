"""What adds up is given, and what does not is refused, however it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import loop_lens
from loop_lens.unrolling.additive import NonAdditiveStreamError
from tests.oracles.twin import small_looped
from tests.oracles.unrolled import decoder

TOKENS = torch.randint(1, 48, (2, 7), generator=torch.Generator().manual_seed(1))
ADDITIVE: dict[str, Any] = {"injection": "none", "initial_state": "prelude"}


@functools.cache
def cached(kind: str) -> Any:
    """A cache of a model whose stream is one sum, or with an injection, that is not one."""
    torch.manual_seed(0)
    if kind in ("olmo2", "gemma2", "llama"):
        model: Any = loop_lens.loopify(decoder(kind), layers=range(2, 5), times=2)
    elif kind == "injection":
        model = loop_lens.wrap(small_looped(injection="linear"))
    else:
        model = loop_lens.wrap(small_looped(block_norm=kind, **ADDITIVE))
    return model.run_with_cache(TOKENS)[1]


CALLS: dict[str, Callable[[Any], Any]] = {
    "heads by name": lambda cache: cache.stack_head_results(incl_remainder=True),
    "heads by place": lambda cache: cache.stack_head_results(-1, False, True),
    "heads, norm by place": lambda cache: cache.stack_head_results(-1, False, False, None, True),
    "neurons by place": lambda cache: cache.stack_neuron_results(2, None, None, False, True),
    "neurons, norm by place": lambda cache: cache.stack_neuron_results(2, None, None, False, False, True),
    "all": lambda cache: cache.get_full_resid_decomposition(),
    "logits of heads": lambda cache: cache.logit_attrs(cache.stack_head_results(), 3),
    "logits of some heads": lambda cache: cache.logit_attrs(
        cache.stack_head_results()[2:4, :, -1:], 3, pos_slice=(6, 7)
    ),
    "logits of neurons": lambda cache: cache.logit_attrs(cache.stack_neuron_results(2), 3),
}


@torch.no_grad()
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["olmo2", "gemma2", "sandwich", "post_branch", "injection"])
def test_shares_that_do_not_add_up_are_refused(kind: str, call: str) -> None:
    with pytest.raises(NonAdditiveStreamError, match="in this model"):
        CALLS[call](cached(kind))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "pre"])
def test_shares_that_add_up(kind: str) -> None:
    cache = cached(kind)
    last = cache[f"blocks.{len(cache.model.blocks) - 1}.hook_resid_post"]
    assert (cache.get_full_resid_decomposition().sum(0) - last).abs().max() < 1e-4
    for call in CALLS.values():
        assert call(cache).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"injection": "linear"}, {"injection": "add"}, {"injection": "diagonal"}, ADDITIVE]
)
def test_logits_of_accumulated_streams(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model: Any = loop_lens.wrap(small_looped(**options))
    _, cache = model.run_with_cache(TOKENS)
    if model.body.non_additive_because:
        with pytest.raises(NonAdditiveStreamError):  # the final norm's weights are not in the unembedding yet
            cache.logit_attrs(cache.accumulated_resid(), 3)
    model.enable_compatibility_mode(disable_warnings=True)
    logits, cache = model.run_with_cache(TOKENS)
    stack = cache.accumulated_resid()
    assert (cache.logit_attrs(stack, 3)[-1] - logits[..., 3]).abs().max() < 1e-5
    late = cache.logit_attrs(stack[:, :, 4:], 3, incorrect_tokens=5, pos_slice=(4, None))[-1]
    assert (late - (logits[:, 4:, 3] - logits[:, 4:, 5])).abs().max() < 1e-5
    if model.body.non_additive_because:
        with pytest.raises(NonAdditiveStreamError):
            cache.logit_attrs(stack[1:] - stack[:-1], 3)
