"""Synthetic tasks: answers by walking the structure, splits, seeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from loop_lens.data import IGNORED, AdditionTask, CompositionTask, HopsTask, Task

TASKS: dict[str, Callable[[], Task]] = {
    "hops": HopsTask,
    "hops, several queries": lambda: HopsTask(queries=(8, 4, 2)),
    "addition": AdditionTask,
    "composition": CompositionTask,
}


@pytest.fixture(params=list(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(task: Task, n: int = 64, **options: object) -> list[tuple[list[str], dict[int, str]]]:
    """Each sequence as words, and what its labels say by position."""
    batch = task.batch(n, **{"level": 3, "generator": seeded(), **options})  # type: ignore[arg-type]
    word = task.tokenizer.convert_ids_to_tokens
    return [
        (word(ids.tolist()), {i: word(int(x)) for i, x in enumerate(labels) if x != IGNORED})
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True)
    ]


def structure(words: list[str]) -> str:
    """What the split is about: the mapping, the terms or the permutations, whatever their order on paper."""
    if "->" in words:
        return " ".join(sorted(f"{a}{b}" for a, b in zip(words[:16:2], words[1:16:2], strict=True)))
    return " ".join(words[: words.index("=" if "=" in words else "?")])


@pytest.mark.parametrize("level", [1, 2, 6, 9])
@pytest.mark.parametrize("queries", [(), (8, 4)])
def test_hops_by_walking(level: int, queries: tuple[int, ...]) -> None:
    for words, labels in rows(HopsTask(queries=queries), level=level):
        successor = dict(zip(words[:16:2], words[1:16:2], strict=True))
        assert len(successor) == 8
        expected: dict[int, str] = {}
        for i in range(16, len(words)):
            if words[i] == "?":
                at = words[i + 1]
            elif words[i] == "->":
                at = successor[at]
                expected[i] = at
        assert labels == expected
        several = queries[level - 1] if level <= len(queries) else 1
        assert words.count("?") == several and words.count("->") == level * several


def test_every_map_is_one_cycle() -> None:
    for words, _ in rows(HopsTask()):
        successor = dict(zip(words[:16:2], words[1:16:2], strict=True))
        walk = ["a"]
        while (following := successor[walk[-1]]) != "a":
            walk.append(following)
        assert len(walk) == 8


@pytest.mark.parametrize("modulus", [2, 10])
def test_addition_by_adding(modulus: int) -> None:
    for words, labels in rows(AdditionTask(modulus=modulus), level=5):
        terms = [int(x) for x in words[:6]]
        assert words[6:] == ["=", *["_"] * 6]
        assert labels == {7 + i: str(sum(terms[: i + 1]) % modulus) for i in range(6)}


def test_composition_by_applying() -> None:
    for words, labels in rows(CompositionTask(), level=4):
        factors = [words[6 * i + 1 : 6 * i + 6] for i in range(4)]
        assert all(sorted(factor) == list("abcde") for factor in factors)
        at = words[words.index("?") + 1]
        for i, factor in enumerate(factors):
            at = factor["abcde".index(at)]
            assert labels[26 + i] == at
        assert len(labels) == 4


def test_no_structure_is_in_both_splits(task: Task) -> None:
    # 630 of the 5,040 cycles are for testing: 2,000 draws see nearly all, were there leaks.
    train = {structure(words) for words, _ in rows(task, 2000, split="train")}
    test = {structure(words) for words, _ in rows(task, 2000, split="test")}
    assert train and test and not train & test


def test_every_structure_is_in_a_split_and_all_answers_occur() -> None:
    train = {structure(words) for words, _ in rows(AdditionTask(), 4000, level=1, split="train")}
    test = {structure(words) for words, _ in rows(AdditionTask(), 4000, level=1, split="test")}
    assert len(train) + len(test) == 100 and 5 <= len(test) <= 25


def test_the_generator_alone_decides(task: Task) -> None:
    one, two, other = (task.batch(16, level=2, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one.input_ids, two.input_ids) and torch.equal(one.labels, two.labels)
    assert not torch.equal(one.input_ids, other.input_ids)


def test_batches_go_on(task: Task) -> None:
    generator = seeded()
    one, two = (task.batch(16, level=2, generator=generator) for _ in range(2))
    assert not torch.equal(one.input_ids, two.input_ids)


def test_guessing_is_at_chance(task: Task) -> None:
    batch = task.batch(4000, level=2, generator=seeded(), split="test")
    asked = batch.labels[batch.labels != IGNORED]
    commonest = asked.bincount().max() / len(asked)
    assert commonest.item() == pytest.approx(task.chance(2), abs=0.02)


def test_the_vocabulary_is_the_tokenizers(task: Task) -> None:
    assert task.vocab_size == len(task.tokenizer) == len(task.tokenizer.get_vocab())
    batch = task.batch(8, level=2, generator=seeded())
    for ids in batch.input_ids:
        assert task.tokenizer(task.tokenizer.decode(ids))["input_ids"] == ids.tolist()
    assert task.tokenizer.bos_token is None


def test_a_prompt_reads_as_the_task() -> None:
    task = HopsTask()
    assert task.prompt([2, 0, 1, 4, 5, 6, 7, 3], 3, 2) == "a c b a c b d e e f f g g h h d ? d -> ->"


def test_unknown_words_are_refused() -> None:
    with pytest.raises(Exception, match="vocabulary"):
        HopsTask().tokenizer("a z")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: HopsTask().batch(1, level=0, generator=seeded()), "level 0"),
        (lambda: HopsTask().batch(1, level=1, generator=seeded(), split="dev"), "'train' or 'test'"),  # type: ignore[arg-type]
        (lambda: HopsTask(queries=(9,)), "between 1 and 8"),
        (lambda: AdditionTask(modulus=1), "at least 2"),
        (lambda: CompositionTask(symbols=27), "2 and 26"),
    ],
)
def test_bad_input(call: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
