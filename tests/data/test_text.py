"""Text as a task: windows, splits, the tokenizer, and what is taken from Python's documentation."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch

from loop_lens.data import TextTask
from loop_lens.data import text as text_module
from loop_lens.data.text import END, standard_library_documents, train_tokenizer

DOCUMENTS = [
    f"The number {i} comes after {i - 1}. It is followed by {i + 1}, and so on." for i in range(1, 200)
]


@pytest.fixture(scope="module")
def task() -> TextTask:
    return TextTask(DOCUMENTS, vocab_size=300, window=16)


def test_labels_are_the_next_tokens(task: TextTask) -> None:
    batch = task.batch(8, generator=torch.Generator().manual_seed(0))
    assert batch.input_ids.shape == batch.labels.shape == (8, 16)
    assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
    again = task.batch(8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(batch.input_ids, again.input_ids)


def test_windows_are_pieces_of_the_documents(task: TextTask) -> None:
    batch = task.batch(8, generator=torch.Generator().manual_seed(1))
    whole = END + END.join(DOCUMENTS)
    for row in batch.input_ids:
        pieces = task.tokenizer.decode(row).split(END)
        assert all(piece in whole for piece in pieces)


def test_every_document_is_in_one_split(task: TextTask) -> None:
    parts = {
        split: [d for d in task.tokenizer.decode(tokens).split(END) if d]
        for split, tokens in task.tokens.items()
    }
    assert sorted(parts["train"] + parts["test"]) == sorted(DOCUMENTS)
    assert len(parts["train"]) > len(parts["test"]) > 0
    assert task.bytes["test"] == sum(len(d.encode()) for d in parts["test"])


def test_test_windows_cover_the_split_once(task: TextTask) -> None:
    windows = task.windows("test")
    n = windows.input_ids.numel()
    assert torch.equal(windows.input_ids.flatten(), task.tokens["test"][:n])
    assert torch.equal(windows.labels.flatten(), task.tokens["test"][1 : n + 1])
    assert len(task.tokens["test"]) - n <= task.window


def test_the_tokenizer_is_a_function_of_the_text() -> None:
    one, two = train_tokenizer(DOCUMENTS, vocab_size=300), train_tokenizer(DOCUMENTS, vocab_size=300)
    assert one.get_vocab() == two.get_vocab() and len(one) == 300
    for text in (DOCUMENTS[0], "naïve café → 你好\n\t "):
        assert one.decode(one(text)["input_ids"]) == text
    assert one.bos_token == END


def test_prose_is_taken_and_code_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    for name in ("module.py", "test/left_out.py"):
        (tmp_path / name).write_text(
            f'"""This is the documentation of the module {name.partition(".")[0].replace("/", " and ")},\n'
            'which\u2019s on two lines.\n\n>>> code(1, 2) == {3: 4}\n{}\n"""\n'
            'def f():\n    """Return nothing, whatever the arguments of the caller may be."""\n'
        )
    (tmp_path / "broken.py").write_text(
        '"""Never to be read, for it has an error in its syntax."""\ndef (:\n'
    )
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(text_module, "topics", {"x": "The first topic of all that there are, in one line."})
    assert standard_library_documents() == [
        "The first topic of all that there are, in one line.",
        "This is the documentation of the module module, which's on two lines.",
        "Return nothing, whatever the arguments of the caller may be.",
    ]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no more than a window of 128"):
        TextTask(DOCUMENTS[:20], vocab_size=300)


def test_there_is_one_level(task: TextTask) -> None:
    with pytest.raises(ValueError, match="level 2"):
        task.batch(1, level=2, generator=torch.Generator())
