"""What the model's own forward takes: padding told by a mask changes nothing, garbage is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from tests.interventions.models import opened
from tests.prompts.models import chatting

NAMES = [
    "huginn",
    "ouro",
    "retrofit_llama",
    "hrm_text",
    "looped_llama",
    "looped_gpt2",
    "damped_llama",
    "no_prelude",
]
ROWS = [[6, 7, 8, 9, 10, 11], [12, 13, 14]]


def padded(side: str, rows: list[list[int]] = ROWS) -> BatchEncoding:
    wide = max(map(len, rows))
    fill = [[0] * (wide - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    left = side == "left"
    return BatchEncoding(
        {
            "input_ids": [f + r if left else r + f for f, r in zip(fill, rows, strict=True)],
            "attention_mask": [f + o if left else o + f for f, o in zip(fill, ones, strict=True)],
        },
        tensor_type="pt",
    )


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_padding_that_a_mask_tells_changes_no_token(name: str) -> None:
    model = opened(name)
    alone = [model(torch.tensor([row]))[0] for row in ROWS]
    for side, real in (("left", slice(3, None)), ("right", slice(3))):
        encoding = padded(side)
        pattern = model.names("pattern")[0]
        cached, cache = model.run_with_cache(encoding, names_filter=pattern)
        for logits in (model(encoding), cached, model.run_with_hooks(encoding, fwd_hooks=[])):
            assert torch.allclose(logits[0], alone[0], atol=1e-5)
            assert torch.allclose(logits[1, real], alone[1], atol=1e-5)
        if side == "left":
            assert cache[pattern][1, :, 3:, :3].abs().max() == 0
        said = model.generate(encoding, max_new_tokens=2, do_sample=False, stop_at_eos=False, verbose=False)
        for i, row in enumerate(ROWS):
            own = model.generate(
                torch.tensor([row]), max_new_tokens=2, do_sample=False, stop_at_eos=False, verbose=False
            )
            assert torch.equal(said[i, -len(own[0]) :], own[0])


@torch.no_grad()
def test_a_mapping_without_padding_is_its_ids() -> None:
    model = chatting()
    text = "w6 w7 w8"
    expected = model(text)
    forms: list[Any] = [
        model.tokenizer(text),
        model.tokenizer(text, return_tensors="pt"),
        model.tokenizer([text], return_tensors="np"),
        [2, 6, 7, 8],
        np.array([[2, 6, 7, 8]]),
        [[2, 6, 7, 8]],
        [text],
    ]
    for form in forms:
        assert torch.equal(model(form), expected)
    both = model(["w6 w7 w8", "w9"])
    ragged = model(model.tokenizer(["w6 w7 w8", "w9"]))
    assert torch.allclose(ragged[0], both[0], atol=1e-5)
    assert torch.allclose(ragged[1, :2], both[1, :2], atol=1e-5)


@pytest.mark.parametrize("call", ["forward", "run_with_cache", "run_with_hooks", "generate"])
def test_what_is_neither_text_nor_tokens_is_refused_in_a_sentence(call: str) -> None:
    model = chatting()
    run = getattr(model, call)
    messages = [{"role": "user", "content": "w6"}]
    wrong: list[tuple[Any, type[Exception], str]] = [
        (None, TypeError, "input must be .* got None"),
        (1.5, TypeError, "got a float"),
        ({"words": 1}, TypeError, "input has the columns words"),
        (messages, TypeError, "not chat messages: model.tokenizer.apply_chat_template"),
        (torch.ones(2, 3), TypeError, r"got a torch.float32 tensor \[2, 3\]"),
        (torch.ones(1, 2, 3, dtype=torch.long), TypeError, "a int64 tensor"),
        (torch.ones(2, 3, dtype=torch.bool), TypeError, "a bool tensor"),
        ([], ValueError, "input is empty"),
        (torch.tensor([[2, 48]]), ValueError, "has the id 48, and the vocabulary has 0-47"),
        ({"input_ids": [2, -1]}, ValueError, "has the id -1"),
        (torch.full((1, 17), 6), ValueError, "17 tokens and the model's context 16"),
        (" ".join(["w6"] * 17), ValueError, "18 tokens and the model's context 16"),
    ]
    for given, error, says in wrong:
        with pytest.raises(error, match=says) as raised:
            run(given)
        assert "\n" not in str(raised.value)
    assert not any(point.fwd_hooks for point in model.hook_points())


def test_text_is_cut_only_where_asked() -> None:
    model = chatting()
    text = " ".join(["w6"] * 17)
    assert model.to_tokens(text, truncate=True).shape == (1, 16)
    assert model.to_tokens(text, truncate=False).shape == (1, 18)
    model.cfg.n_ctx = 18
    assert model(text).shape[1] == 18
