"""The one reader of prompts, and of single tokens."""

from loop_lens.prompts.forms import count_prompts
from loop_lens.prompts.reader import Batch, batches_of, read_prompts, read_together
from loop_lens.prompts.tokens import Tokens, token_ids, words_of

__all__ = [
    "Batch",
    "Tokens",
    "batches_of",
    "count_prompts",
    "read_prompts",
    "read_together",
    "token_ids",
    "words_of",
]
