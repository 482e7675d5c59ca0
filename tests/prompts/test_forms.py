"""Every public function takes every form of prompts: a table that no new function can be left out of."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import BatchEncoding

import loop_lens
from loop_lens.dynamics import (
    attention_bound,
    attention_settling,
    convergence,
    extrapolate,
    firing_similarity,
    jacobian_spectrum,
    limit_table,
    path_independence,
    spectral_radius,
    step_geometry,
    trajectories,
)
from loop_lens.interventions import LogitDiff, PathNode, path_patch
from loop_lens.lenses import exit_curve, find_exits, fit_jacobian_lens, fit_tuned_lens
from loop_lens.measuring import Result, measure
from loop_lens.prompts import batches_of, read_prompts, read_together
from loop_lens.stages import StagesProbe, stages
from tests.prompts.models import chatting

PACKAGES = ("", ".measuring", ".interventions", ".lenses", ".dynamics", ".stages", ".training", ".prompts")
TEXTS = ["w6 w7 w8 w9", "w10 w11"]
IDS = [[2, 6, 7, 8, 9], [2, 10, 11]]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]
LEFT = {
    "input_ids": [IDS[0], [0, 0, *IDS[1]]],
    "attention_mask": [[1] * 5, [0, 0, 1, 1, 1]],
}
FORMS: dict[str, Any] = {
    "texts": TEXTS,
    "tensors": [torch.tensor(row) for row in IDS],
    "lists of ids": IDS,
    "arrays": [np.array(row) for row in IDS],
    "left-padded encoding": BatchEncoding({key: torch.tensor(value) for key, value in LEFT.items()}),
    "left-padded lists": LEFT,
    "rows of text": [{"text": text} for text in TEXTS],
    "rows with masks": [dict(zip(LEFT, row, strict=True)) for row in zip(*LEFT.values(), strict=True)],
    "a data set": Dataset.from_dict({"text": TEXTS}),
    "a column": Dataset.from_dict({"question": TEXTS})["question"],
    "a series": pd.Series(TEXTS),
}
REFUSED: dict[str, Any] = {
    "None": None,
    "a number": 1.5,
    "bytes": b"w6",
    "a mapping of something else": {"words": [1]},
    "floats": torch.ones(2, 3),
    "nothing": [],
}

QUIET: dict[str, Any] = {"progress": False}
METRIC = LogitDiff("w6", "w7")


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "attribute": lambda m, p: loop_lens.attribute(m, p, target="w6"),
    "lens": lambda m, p: loop_lens.lens(m, p, positions=[-1], **QUIET),
    "exit_curve": lambda m, p: exit_curve(m, p, rule="kl", thresholds=[0.1, 1.0]),
    "find_exits": lambda m, p: find_exits(m, p, rule="kl"),
    "convergence": lambda m, p: convergence(m, p, reference=4, **QUIET),
    "attention_bound": lambda m, p: attention_bound(m, p, **QUIET),
    "attention_settling": lambda m, p: attention_settling(m, p, **QUIET),
    "extrapolate": lambda m, p: extrapolate(m, p, recurrences=(1, 3), **QUIET),
    "firing_similarity": lambda m, p: firing_similarity(m, p, **QUIET),
    "jacobian_spectrum": lambda m, p: jacobian_spectrum(m, p, iterations=[1], positions=[-1], **QUIET),
    "limit_table": lambda m, p: _limits(m, p),
    "path_independence": lambda m, p: path_independence(m, p, **QUIET),
    "spectral_radius": lambda m, p: spectral_radius(m, p, iteration=1, steps=12),
    "step_geometry": lambda m, p: step_geometry(m, p, **QUIET),
    "trajectories": lambda m, p: trajectories(m, p, **QUIET),
    "stages": lambda m, p: stages(m, p, **QUIET),
    "fit_jacobian_lens": lambda m, p: fit_jacobian_lens(m, p, skip_first=0, **QUIET),
    "fit_tuned_lens": lambda m, p: fit_tuned_lens(m, p, steps=2, seq_len=4, **QUIET),
    "measure": lambda m, p: _measured(m, p),
    "batches_of": lambda m, p: [b.tokens for b in batches_of(m, p, 1)],
    "read_prompts": lambda m, p: list(read_prompts(m, p)),
}
PAIRS: dict[str, Callable[[Any, Any], Any]] = {
    "patch_sweep": lambda m, p: loop_lens.patch_sweep(
        m, p, p, METRIC, site="state_out", over="iteration", **QUIET
    ),
    "path_patch": lambda m, p: path_patch(m, p, p, METRIC, senders=PathNode("mlp_out", 0, 0), **QUIET),
    "read_together": lambda m, p: read_together(m, p, "clean"),
}
"""These take prompts of equal length."""
NOT_PROMPTS = {"token_ids", "words_of", "count_prompts"}
"""Single tokens, one prompt's tokens, and what only counts, for the progress bar."""


def _measured(model: Any, prompts: Any) -> Any:
    probe = StagesProbe(model)
    measure(model, prompts, [probe], **QUIET)
    return probe.result()


def _limits(m: Any, prompts: Any) -> Any:
    with m.at_recurrences(6):
        return limit_table(m, prompts, n=(5,), **QUIET)


def numbers(result: Any) -> torch.Tensor:
    """All numbers of a result."""
    if isinstance(result, Result):
        table = result.to_dataframe().select_dtypes("number")
        return torch.tensor(table.to_numpy(dtype=float))
    if isinstance(result, torch.nn.Module):
        result = list(result.state_dict().values())
    if hasattr(result, "matrices"):
        result = list(result.matrices.values()) if isinstance(result.matrices, dict) else [result.matrices]
    if isinstance(result, list | tuple):
        return torch.cat([numbers(part).flatten() for part in result])
    return torch.as_tensor(result).double()


@functools.cache
def model() -> Any:
    torch.manual_seed(0)
    return chatting()


@functools.cache
def expected(name: str) -> torch.Tensor:
    torch.manual_seed(0)
    return numbers(CALLS[name](model(), [torch.tensor(row) for row in IDS]))


def test_the_table_has_every_function_that_takes_prompts() -> None:
    taking: set[str] = set()
    names = {"prompts", "clean", "corrupted", "tokens", "texts", "others"}
    for package in PACKAGES:
        module = importlib.import_module(f"loop_lens{package}")
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing) and names & set(inspect.signature(thing).parameters):
                taking.add(name)
    assert taking == set(CALLS) | set(PAIRS) | (NOT_PROMPTS & taking)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CALLS)
def test_every_form_gives_the_numbers_of_plain_tokens(name: str, form: str) -> None:
    torch.manual_seed(0)
    found = numbers(CALLS[name](model(), FORMS[form]))
    assert torch.allclose(found, expected(name), atol=1e-5, equal_nan=True)


OTHERWISE = ("fit_jacobian_lens", "fit_tuned_lens", "trajectories", "jacobian_spectrum")
"""Means over all prompts, a projection fitted to all, and spectra labelled by position, which do not merge so."""


@pytest.mark.parametrize("name", [name for name in CALLS if name not in OTHERWISE])
def test_prompts_of_several_lengths_give_the_numbers_of_each_alone(name: str) -> None:
    torch.manual_seed(0)
    whole = CALLS[name](model(), TEXTS)
    alone = [CALLS[name](model(), text) for text in TEXTS]
    if name == "attribute":
        found, right = whole.terms.T, torch.stack([result.terms for result in alone])
    elif isinstance(whole, Result) and "prompt" in whole.to_dataframe():
        found, right = numbers(whole), torch.cat([numbers(result) for result in alone])
        column = whole.to_dataframe().select_dtypes("number").columns.tolist().index("prompt")
        found[:, column] = right[:, column] = 0  # each alone is prompt 0
        found, right = (x.flatten().nan_to_num().sort().values for x in (found, right))
    elif isinstance(whole, Result):
        found, right = numbers(whole), numbers(alone[0].merge(alone[1]))
    else:
        found, right = numbers(whole).flatten(), torch.cat([numbers(r).flatten() for r in alone])
        found, right = found.sort().values, right.sort().values
    assert torch.allclose(found, right, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_take_equal_lengths_in_every_form(name: str) -> None:
    call, one = PAIRS[name], [torch.tensor(IDS[0])]
    right = numbers(call(model(), one))
    for form in (
        TEXTS[0],
        [TEXTS[0]],
        IDS[0],
        np.array([IDS[0]]),
        {"input_ids": [IDS[0]]},
        [{"text": TEXTS[0]}],
    ):
        assert torch.allclose(numbers(call(model(), form)), right, atol=1e-5, equal_nan=True)
    with pytest.raises(ValueError, match="equal length"):
        call(model(), TEXTS)


@pytest.mark.parametrize("name", [*CALLS, *PAIRS])
def test_chat_messages_are_rendered_once(name: str) -> None:
    call = (CALLS | PAIRS)[name]
    rendered = model().tokenizer.apply_chat_template(CHATS[0], add_generation_prompt=True)
    ids = rendered["input_ids"] if not isinstance(rendered, list) else rendered
    torch.manual_seed(0)
    right = numbers(call(model(), [torch.tensor(ids)]))
    torch.manual_seed(0)
    assert torch.allclose(numbers(call(model(), CHATS[0])), right, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("form", REFUSED)
@pytest.mark.parametrize("name", [*CALLS, *PAIRS])
def test_anything_else_is_refused_with_the_reason(name: str, form: str) -> None:
    with pytest.raises((TypeError, ValueError)) as told:
        (CALLS | PAIRS)[name](model(), REFUSED[form])
    assert 20 < len(str(told.value)) < 500
