"""A small looped model whose tokenizer has a BOS, a pad token of its own and a chat template."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import loop_lens
from loop_lens import HookedLoopedTransformer
from tests.oracles.twin import VOCAB, small_looped

SPECIAL = {"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3, "<user>": 4, "<assistant>": 5}
TEMPLATE = (
    "<s>{% for m in messages %}"
    "{% if m.role not in ('user', 'assistant') %}{{ raise_exception('only user and assistant speak') }}{% endif %}"
    " <{{ m.role }}> {{ m.content }} </s>{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
)


def tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """Words w6, w7, ... as tokens, with a BOS before every text."""
    words = Tokenizer(
        WordLevel(SPECIAL | {f"w{i}": i for i in range(len(SPECIAL), VOCAB)}, unk_token="<unk>")
    )
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    options = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        name_or_path="words",
        add_bos_token=True,
        chat_template=TEMPLATE,
        **options | changes,
    )


def chatting(*, tokens: dict[str, Any] | None = None, **options: Any) -> HookedLoopedTransformer:
    """The model."""
    return loop_lens.wrap(
        small_looped(max_position_embeddings=16, **options), tokenizer=tokenizer(**tokens or {})
    )
