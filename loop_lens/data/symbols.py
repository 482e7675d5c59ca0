"""Tokenizers of the synthetic tasks: one token a word, words between spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

PAD = "<pad>"


def symbol_tokenizer(words: Sequence[str]) -> Any:
    """A tokenizer of a closed vocabulary without BOS; token i is word i, padding comes last.

    Text with any other word is an error rather than an unknown token.
    """
    vocabulary = {word: i for i, word in enumerate([*words, PAD])}
    inner: Any = Tokenizer(WordLevel(vocabulary))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, eos_token=PAD)
