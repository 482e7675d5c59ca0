"""Text to model: the documentation that comes with Python, and a tokenizer made from it."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from loop_lens.data.task import Split, Task, TaskBatch, require_level, require_split

END = "<|endoftext|>"
TEST_SHARE = 16
"""One document in sixteen is for testing."""
_LEFT_OUT = frozenset({"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"})
_PLAIN = str.maketrans(
    {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "-", 0x2026: "...", 0xA0: " "}
)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def standard_library_documents() -> list[str]:
    """The documentation of the running Python: its language reference by topic, and the docstrings
    of its standard library, read without importing it.

    Prose only: paragraphs are put on one line each, and those of code or tables are left out. About
    1.5 MB of English, under the licence of Python itself (PSF-2.0); it differs a little between
    versions of Python.
    """
    found = dict.fromkeys(_prose(text) for _, text in sorted(topics.items()))
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts):
            found |= dict.fromkeys(map(_prose, _docstrings(path)))
    return [text for text in found if len(text) >= 40]


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, ValueError):
        return  # a template or a sample of broken code
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED):
            text = ast.get_docstring(node)
            if text:
                yield text


def _prose(text: str) -> str:
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text.translate(_PLAIN)))
    return "\n".join(p for p in paragraphs if _is_prose(p))


def _is_prose(paragraph: str) -> bool:
    wordy = sum(c.isalpha() or c == " " for c in paragraph)
    # Sentences are 93-99% letters and spaces, code and tables mostly below 85%.
    return len(paragraph) >= 20 and ">>>" not in paragraph and wordy >= 0.88 * len(paragraph)


def train_tokenizer(documents: list[str], *, vocab_size: int = 2048) -> Any:
    """A byte-level BPE tokenizer; the same documents give the same one.

    Args:
        documents: What to learn merges from.
        vocab_size: Number of tokens, `END` and the 256 bytes included.
    """
    inner: Any = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=END, eos_token=END, pad_token=END)


class TextTask(Task):
    """Windows of text; every position is to name the next token.

    There is one level. A window starts anywhere in the stream of documents, each after an `END`,
    which is what a prompt should start with.

    Example:
        >>> documents = [f"The number {i} comes after {i - 1}, and before {i + 1}." for i in range(200)]
        >>> task = loop_lens.data.TextTask(documents, vocab_size=300, window=16)
        >>> batch = task.batch(4, generator=torch.Generator().manual_seed(0))
        >>> batch.input_ids.shape, task.vocab_size
        (torch.Size([4, 16]), 300)
    """

    name = "text"
    levels = 1

    def __init__(
        self,
        documents: list[str] | None = None,
        *,
        tokenizer: Any = None,
        vocab_size: int = 2048,
        window: int = 128,
    ) -> None:
        """Windows of some documents.

        Args:
            documents: The text; `standard_library_documents` by default. One in sixteen, chosen by a
                hash of its content, is for testing.
            tokenizer: A ``PreTrainedTokenizerFast`` with a BOS token; trained on the training
                documents by default.
            vocab_size: Of a tokenizer to train.
            window: Tokens in a sequence.

        Raises:
            ValueError: If a split has fewer tokens than a window.
        """
        documents = standard_library_documents() if documents is None else documents
        parts: dict[str, list[str]] = {"train": [], "test": []}
        for text in documents:
            parts["test" if _in_test(text) else "train"].append(text)
        self.tokenizer = tokenizer or train_tokenizer(parts["train"], vocab_size=vocab_size)
        self.vocab_size, self.window = len(self.tokenizer), window
        self.bytes = {split: sum(len(text.encode()) for text in part) for split, part in parts.items()}
        self.tokens = {split: self._joined(part) for split, part in parts.items()}
        for split, tokens in self.tokens.items():
            if len(tokens) <= window:
                raise ValueError(
                    f"the {split} split has {len(tokens)} tokens, no more than a window of {window}: give more "
                    "documents or a smaller window"
                )

    def _joined(self, documents: list[str]) -> torch.Tensor:
        encoded = self.tokenizer(documents, add_special_tokens=False)["input_ids"] if documents else []
        end = self.tokenizer.bos_token_id
        return torch.tensor([token for ids in encoded for token in (end, *ids)], dtype=torch.long)

    def batch(
        self, n: int, *, level: int = 1, generator: torch.Generator, split: Split = "train"
    ) -> TaskBatch:
        """Draw windows, uniformly."""
        require_level(level, 1, "text")
        require_split(split)
        tokens = self.tokens[split]
        first = torch.randint(len(tokens) - self.window, (n, 1), generator=generator)
        windows = tokens[first + torch.arange(self.window + 1)]
        return TaskBatch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())

    def windows(self, split: Split = "test") -> TaskBatch:
        """The whole of a split once, in windows side by side."""
        require_split(split)
        tokens = self.tokens[split]
        kept = tokens[: (len(tokens) - 1) // self.window * self.window + 1]
        return TaskBatch(kept[:-1].view(-1, self.window), kept[1:].view(-1, self.window))


def _in_test(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] % TEST_SHARE == 0
