"""Which keywords the doors of a bridge read: a forward, a run with hooks or a cache, generation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformer_lens.model_bridge import TransformerBridge
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils.generic import TransformersKwargs

from loop_lens.unrolling.keywords import keywords_of, require_keywords, takes_any

_FORWARD = {"one_zero_attention_mask", "use_past_kv_cache", "past_key_values", "cache", "return_dict"}
_generation: Any = GenerationMixin
_OPTIONS = frozenset(GenerationConfig().to_dict()) | keywords_of(_generation.generate)


def require_known(bridge: TransformerBridge, door: str, given: Iterable[str]) -> None:
    """Raise `TypeError` unless each keyword given to a method of the bridge is one that anybody reads.

    Args:
        bridge: The bridge.
        door: The method's name.
        given: Keywords that it passes on.
    """
    given = list(given)
    if not given:
        return
    model: Any = bridge.original_model
    named = keywords_of(getattr(type(bridge), door)) | keywords_of(getattr(TransformerBridge, door))
    own = getattr(model, "forward_keywords", None)
    if door in ("generate", "generate_stream", "hf_generate"):
        # What a forward takes beyond its signature would reach the first step alone.
        accepted = named | keywords_of(type(model).forward)
        if door == "hf_generate":
            accepted |= _OPTIONS | set(TransformersKwargs.__optional_keys__)
        elif unused := sorted((_OPTIONS - accepted).intersection(given)):
            raise TypeError(
                f"{door}() got an unexpected keyword argument {unused[0]!r}: hf_generate() takes it"
            )
    else:
        accepted = (
            named | _FORWARD | keywords_of(type(bridge).forward) | keywords_of(TransformerBridge.forward)
        )
        accepted |= keywords_of(type(model).forward) if own is None else own
        if own is None and takes_any(type(model).forward):
            if not _is_transformers_own(model):
                return  # its forward may read any keyword
            accepted |= set(TransformersKwargs.__optional_keys__)
        if door == "run_with_cache":
            accepted |= {"device"}
    require_keywords(given, accepted - {"args", "kwargs", "input_ids"}, f"{door}()")


def _is_transformers_own(model: Any) -> bool:
    own = (c for c in type(model).__mro__ if issubclass(c, PreTrainedModel))
    return any(c.__module__.startswith("transformers.models.") for c in own)
