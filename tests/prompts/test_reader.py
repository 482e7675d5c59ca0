"""The reader: every form is the same prompts, and what cannot be read is refused in a sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import BatchEncoding

from loop_lens.prompts import count_prompts, read_prompts, read_together, token_ids
from tests.interventions.models import opened
from tests.prompts.models import chatting

TEXTS = ["w6 w7 w8", "w9", "w10 w11 w12 w13"]
IDS = [[2, 6, 7, 8], [2, 9], [2, 10, 11, 12, 13]]
WIDE = max(map(len, IDS))
LEFT = {
    "input_ids": [[0] * (WIDE - len(row)) + row for row in IDS],
    "attention_mask": [[0] * (WIDE - len(row)) + [1] * len(row) for row in IDS],
}
RIGHT = {
    "input_ids": [row + [0] * (WIDE - len(row)) for row in IDS],
    "attention_mask": [[1] * len(row) + [0] * (WIDE - len(row)) for row in IDS],
}
SEVERAL: dict[str, Any] = {
    "texts": TEXTS,
    "a tuple of texts": tuple(TEXTS),
    "an array of texts": np.array(TEXTS),
    "tensors": [torch.tensor(row) for row in IDS],
    "tensors [1 pos]": [torch.tensor([row]) for row in IDS],
    "int32 arrays": [np.array(row, dtype=np.int32) for row in IDS],
    "lists of ids": IDS,
    "lists of numpy ids": [list(map(np.int64, row)) for row in IDS],
    "lists of 0-d tensors": [[torch.tensor(i) for i in row] for row in IDS],
    "an array of lists": np.array(IDS, dtype=object),
    "ragged encoding": BatchEncoding({"input_ids": IDS, "attention_mask": [[1] * len(row) for row in IDS]}),
    "left-padded lists": LEFT,
    "left-padded tensors": BatchEncoding({key: torch.tensor(value) for key, value in LEFT.items()}),
    "left-padded arrays": {key: np.array(value) for key, value in LEFT.items()},
    "right-padded tensors": {key: torch.tensor(value) for key, value in RIGHT.items()},
    "rows of text": [{"text": text} for text in TEXTS],
    "rows of ids": [{"input_ids": row, "label": 3} for row in IDS],
    "rows with masks": [dict(zip(LEFT, row, strict=True)) for row in zip(*LEFT.values(), strict=True)],
    "encodings": [BatchEncoding({"input_ids": [row], "attention_mask": [[1] * len(row)]}) for row in IDS],
    "a data set of text": Dataset.from_dict({"text": TEXTS}),
    "a data set of ids": Dataset.from_dict(LEFT),
    "a column of text": Dataset.from_dict({"question": TEXTS})["question"],
    "a column of ids": Dataset.from_dict({"question": IDS})["question"],
    "a column that is a list": {"text": TEXTS},
    "a frame of text": pd.DataFrame({"text": TEXTS}),
    "a frame of ids": pd.DataFrame(LEFT),
    "a series of text": pd.Series(TEXTS, index=[4, 5, 6]),
    "a series of ids": pd.Series(IDS),
    "a batch and a row": [{key: value[:2] for key, value in LEFT.items()}, IDS[2]],
}
ONE: dict[str, Any] = {
    "a text": TEXTS[0],
    "a numpy text": np.str_(TEXTS[0]),
    "a tensor": torch.tensor(IDS[0]),
    "a tensor [1 pos]": torch.tensor(IDS[:1]),
    "an array": np.array(IDS[0], dtype=np.uint8),
    "a list of ids": IDS[0],
    "a tuple of numpy ids": tuple(map(np.int32, IDS[0])),
    "a list of 0-d tensors": [torch.tensor(i) for i in IDS[0]],
    "a series of ids": pd.Series(IDS[0]),
    "an encoding": {"input_ids": IDS[0], "attention_mask": [1] * len(IDS[0])},
    "a padded encoding": {"input_ids": [0, *IDS[0]], "attention_mask": [False, True, True, True, True]},
    "a row of text": {"text": TEXTS[0]},
}


def read(prompts: Any, **options: Any) -> list[list[int]]:
    return [tokens.tolist() for tokens in read_prompts(chatting(**options), prompts)]


@pytest.mark.parametrize("form", SEVERAL)
def test_every_form_of_several_prompts(form: str) -> None:
    assert read(SEVERAL[form]) == IDS
    if not isinstance(SEVERAL[form], pd.Series):
        assert count_prompts(SEVERAL[form]) == len(IDS)


@pytest.mark.parametrize("form", ONE)
def test_every_form_of_one_prompt(form: str) -> None:
    assert read(ONE[form]) == IDS[:1]
    if not isinstance(ONE[form], pd.Series):
        assert count_prompts(ONE[form]) == 1


def test_generators_are_read_no_further_than_asked_for() -> None:
    def texts() -> Any:
        yield from TEXTS
        raise AssertionError("read too far")

    assert count_prompts(texts()) is None
    tokens = read_prompts(chatting(), texts())
    assert [next(tokens).tolist() for _ in TEXTS] == IDS
    assert read(iter(IDS[0])) == IDS[:1]


def test_text_is_what_to_tokens_makes_of_it() -> None:
    for model in (chatting(), chatting(tokens={"pad_token": "<s>"}), opened("no_prelude")):
        text = "w6 w7"
        (tokens,) = read_prompts(model, text)
        assert tokens.dtype == torch.long and torch.equal(tokens, model.to_tokens(text)[0])


def test_conversations_have_one_bos_and_ask_for_an_answer() -> None:
    asked = [{"role": "user", "content": "w6 w7"}]
    answered = [*asked, {"role": "assistant", "content": "w8"}]
    model = chatting()
    expected = [[2, 4, 6, 7, 3, 5], [2, 4, 6, 7, 3, 5, 8, 3]]
    forms: list[Any] = [
        [asked, answered],
        iter([asked, answered]),
        {"messages": [asked, answered]},
        [{"messages": asked}, {"messages": answered}],
        Dataset.from_dict({"messages": [asked, answered]}),
    ]
    for form in forms:
        assert [tokens.tolist() for tokens in read_prompts(model, form)] == expected
    assert read(asked) == expected[:1] and read({"messages": asked}) == expected[:1]
    assert count_prompts(asked) == 1 and count_prompts([asked, answered]) == 2
    whole = model.tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert whole == expected[0]
    model.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template: give its text, or set"):
        read_prompts(model, asked)
    with pytest.raises(ValueError, match="refuses prompt 0: only user and assistant speak"):
        read_prompts(chatting(), [{"role": "cat", "content": "w6"}])


def test_only_a_mask_says_what_is_padding() -> None:
    cure = "pass attention_mask beside input_ids"
    for ids in ([0, 2, 6], [2, 6, 0]):
        with pytest.raises(ValueError, match=f"prompt 1 .* pad token .*{cure}"):
            read([IDS[0], ids])
        assert read({"input_ids": ids, "attention_mask": [1, 1, 1]}) == [ids]
    assert read([2, 0, 6]) == [[2, 0, 6]]  # in the middle it is a token like others
    # A pad token that also begins texts: one is text, two are padding.
    as_bos = {"tokens": {"pad_token": "<s>"}}
    assert read([2, 6, 2], **as_bos) == [[2, 6, 2]] and read([2], **as_bos) == [[2]]
    for ids in ([2, 2, 6], [6, 2, 2]):
        with pytest.raises(ValueError, match=f"two pad tokens .*{cure}"):
            read(ids, **as_bos)
        assert read({"input_ids": ids, "attention_mask": [1, 1, 1]}, **as_bos) == [ids]


WRONG: dict[str, Any] = {
    "None": None,
    "a float": 1.5,
    "a int alone": 5,
    "a bytes": b"w6",
    "a set": {"w6"},
    "a dict_keys": {"w6": 1}.keys(),
    "a float32 tensor": torch.ones(2, 3),
    "a bool tensor": torch.ones(3, dtype=torch.bool),
    "a int64 tensor": torch.ones(1, 2, 3, dtype=torch.long),
    "a bool array": np.ones((2, 3), dtype=bool),
    "a float64 array": np.ones(3),
    "the columns words": {"words": ["w6"]},
    "chat message alone": {"role": "user", "content": "w6"},
    "neither text nor tokens but None": ["w6", None],
    "but a float": [2.5],
    "but a bool": [True, False],
    "a list that begins with a list": [[[2, 6]]],
    "a list that begins with a str": [["w6", "w7"]],
    "but a bytes": ["w6", b"w7"],
    "ids and other things": [2, "w6"],
    "chat messages and other": [{"role": "user", "content": "w6"}, "w6"],
    "but a int alone": ["w6", 2],
    "row 1 of prompts has the columns words": [{"text": "w6"}, {"words": "w7"}],
    "but a float32 tensor": [torch.tensor([2, 6]), torch.ones(2)],
    "'text' of prompts holds": {"text": [2, 6]},
    "'messages' of prompts holds": {"messages": "w6"},
    "'input_ids' of prompts holds": {"input_ids": {"input_ids": [2]}},
}


@pytest.mark.parametrize("says", WRONG)
def test_anything_else_is_refused_by_what_it_is(says: str) -> None:
    with pytest.raises(TypeError) as error:
        read(WRONG[says])
    assert says in str(error.value) and "\n" not in str(error.value)


UNFIT: list[tuple[Any, str]] = [
    ([], "no prompts"),
    (torch.empty(0, 4, dtype=torch.long), "no prompts"),
    (iter(()), "no prompts"),
    ({"text": []}, "no prompts"),
    ([IDS[0], []], "prompt 1 has no tokens"),
    (torch.tensor([]), "prompt 0 has no tokens"),
    (np.array([]), "prompt 0 has no tokens"),
    ({"input_ids": [[6, 7]], "attention_mask": [[0, 0]]}, "prompt 0 has no tokens"),
    ([2, -1], "prompt 0 has the id -1, and the vocabulary has 0-47"),
    ([IDS[0], [2, 48]], "prompt 1 has the id 48"),
    (" ".join(["w6"] * 20), "21 tokens and the model's context 16"),
    ([6] * 17, "17 tokens and the model's context 16"),
    ({"input_ids": [6, 7, 8], "attention_mask": [1, 0, 1]}, "prompt 0 has holes"),
    ({"input_ids": [6, 7, 8], "attention_mask": [1, 1]}, r"shape \(2,\) where input_ids have \(3,\)"),
    ({"input_ids": [6, 7, 8], "attention_mask": [1, 2, 1]}, "other numbers than 0"),
    ({"input_ids": IDS, "attention_mask": [[1, 1, 1, 1]]}, "fewer rows than its input_ids"),
    ({"input_ids": IDS[:1], "attention_mask": [[1] * 4, [1]]}, "more rows than its input_ids"),
    ({"input_ids": [6], "attention_mask": "1"}, "attention_mask of prompts holds a str"),
]


@pytest.mark.parametrize(("prompts", "says"), UNFIT, ids=[says for _, says in UNFIT])
def test_prompts_that_do_not_fit_the_model(prompts: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        list(read_prompts(chatting(), prompts))


def test_who_cuts_prompts_reads_any_length() -> None:
    (tokens,) = read_prompts(chatting(), " ".join(["w6"] * 20), any_length=True)
    assert len(tokens) == 21


def test_without_a_tokenizer_only_ids_are_read() -> None:
    model = opened("ouro")
    assert [t.tolist() for t in read_prompts(model, [[0, 1], [2]])] == [[0, 1], [2]]
    with pytest.raises(ValueError, match=r"no tokenizer: give prompt 0 as ids"):
        read_prompts(model, "w6")


def test_prompts_together_have_one_length_and_a_name() -> None:
    model = chatting()
    padded = {"input_ids": [[0, 2, 6], [2, 7, 0]], "attention_mask": [[0, 1, 1], [1, 1, 0]]}
    together = read_together(model, padded, "clean")
    assert together.tolist() == [[2, 6], [2, 7]]
    with pytest.raises(
        ValueError, match="the clean prompts have 2, 4, 5 tokens: give prompts of equal length"
    ):
        read_together(model, TEXTS, "clean")
    with pytest.raises(TypeError, match="clean must be text or tokens"):
        read_together(model, None, "clean")


def test_tokens_are_single_and_known() -> None:
    model = chatting()
    for given in (
        ["w6", "w7"],
        [6, 7],
        np.array([6, 7]),
        torch.tensor([6, 7]),
        [np.int64(6), torch.tensor(7)],
    ):
        assert token_ids(model, given).tolist() == [6, 7]  # type: ignore[arg-type]
    for given in ("w6", 6, np.int32(6), torch.tensor(6)):
        assert token_ids(model, given).tolist() == [6]  # type: ignore[arg-type]
    assert token_ids(model, "<unk>").tolist() == [1]
    with pytest.raises(
        ValueError, match="'Paris' is not in the vocabulary: the tokenizer reads it as '<unk>'"
    ):
        token_ids(model, "Paris")
    for given in (torch.tensor([48]), 48, [np.int64(-1)]):
        with pytest.raises(ValueError, match="does not exist: the vocabulary has tokens 0-47"):
            token_ids(model, given)  # type: ignore[arg-type]
    for wrong in (1.5, None, [True], torch.ones(2), {"w6"}):
        with pytest.raises(TypeError, match="a token is text or an id"):
            token_ids(model, wrong)  # type: ignore[arg-type]
