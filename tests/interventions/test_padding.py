"""Padding of a reference run counts for nothing, and what is nested per prompt is no target for all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import loop_lens
from loop_lens.interventions import LogitDiff, Rank, ablate
from tests.prompts.models import chatting

TEXTS = ["w7 w8 w9 w10 w11 w12", "w20", "w13 w14 w7"]


def padded(model: Any, side: str) -> dict[str, Any]:
    return model.tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side=side)


FORMS = {
    "texts": lambda model: TEXTS,
    "tuple": lambda model: tuple(TEXTS),
    "right": lambda model: padded(model, "right"),
    "left": lambda model: padded(model, "left"),
    "mask": lambda model: padded(model, "right")["input_ids"],
}


@torch.no_grad()
@pytest.mark.parametrize("site", ["mlp_out", "z", "pattern", "state_out"])
@pytest.mark.parametrize("form", FORMS)
def test_a_mean_is_over_tokens(form: str, site: str) -> None:
    model = chatting()
    given = FORMS[form](model)
    options = {"attention_mask": padded(model, "right")["attention_mask"]} if form == "mask" else {}
    _, reference = model.run_with_cache(given, **options)
    layer = None if site == "state_out" else 0
    key = model.name(site, iteration=1, layer=layer)
    alone = [model.run_with_cache(text)[1][key][0] for text in TEXTS]
    with ablate(model, site, "mean", reference=reference, iterations=1, layers=layer):
        _, cache = model.run_with_cache("w9 w9 w9 w9 w9 w9")
    if site == "pattern":
        if form == "left":
            return  # positions of prompts do not line up
        for query in range(7):
            rows = [p[:, query] for p in alone if p.shape[1] > query]
            wide = [torch.nn.functional.pad(row, (0, 7 - row.shape[-1])) for row in rows]
            assert torch.allclose(cache[key][0, :, query], torch.stack(wide).mean(0), atol=1e-5)
        return
    assert torch.allclose(cache[key], torch.cat(alone).mean(0).expand_as(cache[key]), atol=1e-5)


@torch.no_grad()
def test_a_part_of_a_cache_has_its_part_of_the_mask() -> None:
    model = chatting()
    _, cache = model.run_with_cache(TEXTS)
    key = model.name("mlp_out", iteration=1, layer=0)
    alone = model.run_with_cache(TEXTS[1])[1][key].mean((0, 1))
    with ablate(model, "mlp_out", "mean", reference=cache.apply_slice_to_batch_dim(slice(1, 2)), layers=0):
        assert torch.allclose(model.run_with_cache("w9")[1][key][0, 0], alone, atol=1e-5)


@torch.no_grad()
def test_a_cache_without_its_batch_dimension_is_one_prompt() -> None:
    model = chatting()
    _, cache = model.run_with_cache(TEXTS[0])
    _, flat = model.run_with_cache(TEXTS[0], remove_batch_dim=True)
    logits = []
    for reference in (cache, flat):
        for how in ("mean", "resample"):
            with ablate(model, "mlp_out", how, reference=reference):
                logits.append(model("w9 w9"))
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[3])


def test_resampling_wants_prompts_of_equal_length() -> None:
    model = chatting()
    _, reference = model.run_with_cache(TEXTS)
    with pytest.raises(ValueError, match="prompts differ in length"):
        ablate(model, "mlp_out", "resample", reference=reference)


@pytest.mark.parametrize("nested", [[[7, 8], [9, 10]], [[7], [9]]])
@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_targets_of_each_prompt_are_no_targets_of_all(nested: Any, kind: Any) -> None:
    model, tokens = chatting(), kind(nested)
    with pytest.raises(ValueError, match="are nested"):
        loop_lens.lens(model, ["w7 w8", "w9"], targets=tokens)
    for metric in (Rank(tokens), LogitDiff(7, tokens)):
        with pytest.raises(ValueError, match="are nested"):
            metric.bind(model)
    row = loop_lens.lens(model, "w7 w8", targets=kind([[7, 8]]))
    assert row.targets.tolist() == [7, 8]
