"""Whole numbers of any library, and requests for nothing, at every entry of interventions and lenses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import loop_lens
from loop_lens.interventions import (
    LogitDiff,
    PathNode,
    ablate,
    add_noise,
    edit,
    freeze,
    path_patch,
    reorder,
    skip,
    steer,
    transplant,
)
from loop_lens.lenses import exit_curve, find_exits, fit_jacobian_lens, fit_tuned_lens
from tests.interventions.models import difference, opened, prompts

ONE: dict[str, Any] = {
    "numpy": np.int64,
    "array": np.array,
    "tensor": torch.tensor,
    "pandas": lambda n: pd.Series([n]).iloc[0],
}
SEVERAL: dict[str, Any] = {
    "array": np.array,
    "tensor": torch.tensor,
    "series": pd.Series,
    "index": pd.Index,
    "tuple": tuple,
}
MODEL = opened("ouro")
CLEAN, CORRUPTED = prompts(MODEL)


def run(surgery: Any) -> Tensor:
    with surgery, torch.no_grad():
        return MODEL(CLEAN)


def swept(metric: Any = difference, **options: Any) -> Any:
    return loop_lens.patch_sweep(MODEL, CLEAN, CORRUPTED, metric, **options)


def off(value: Tensor, view: Any) -> Tensor:
    return 0 * value


WITH_ONE: dict[str, Callable[[Any], Tensor]] = {
    "edit": lambda n: run(edit(MODEL, "mlp_out", off, iterations=n(1), layers=n(0), positions=[n(3)])),
    "ablate": lambda n: run(ablate(MODEL, "z", heads=[n(1)])),
    "add_noise": lambda n: run(add_noise(MODEL, 0.1, seed=n(3), iterations=n(1))),
    "freeze": lambda n: run(freeze(MODEL, "pattern", at=n(1))),
    "skip": lambda n: run(skip(MODEL, n(1))),
    "transplant": lambda n: run(transplant(MODEL, "mlp_out", source=n(0), to=n(1))),
    "reorder": lambda n: run(reorder(MODEL, [n(1), n(0)])),
    "steer": lambda n: run(steer(MODEL, torch.ones(MODEL.cfg.d_model), iterations=[n(0)])),
    "path_patch": lambda n: (
        path_patch(
            MODEL, CLEAN, CORRUPTED, difference, senders=PathNode("z", n(0), n(0), n(1)), progress=False
        ).values
    ),
    "integrated": lambda n: swept(site="resid_post", method="integrated", steps=n(2), layers=n(0)).values,
    "metric": lambda n: swept(LogitDiff(n(3), n(5), position=n(-1)), site="resid_post", layers=n(0)).values,
    "lens": lambda n: loop_lens.lens(MODEL, CLEAN, positions=[n(-1)], top_k=n(2), targets=n(3)).top_probs,
    "attribute": lambda n: loop_lens.attribute(MODEL, CLEAN, target=(n(3), n(4)), pos=n(2)).terms,
    "tuned": lambda n: torch.cat(
        [
            p.flatten()
            for p in fit_tuned_lens(
                MODEL, CLEAN, rank=n(2), steps=n(2), batch_size=n(2), seq_len=n(5), seed=n(1), progress=False
            ).parameters()
        ]
    ),
    "jacobian": lambda n: torch.stack(
        list(
            fit_jacobian_lens(
                MODEL, CLEAN, skip_first=n(1), dim_batch=n(24), factorised=True, progress=False
            ).matrices.values()
        )
    ),
    "find_exits": lambda n: find_exits(MODEL, CLEAN, rule="argmax", threshold=n(2)).iterations,
}


@pytest.mark.parametrize("entry", WITH_ONE)
def test_one_whole_number(entry: str) -> None:
    ask = WITH_ONE[entry]
    expected = ask(int)
    for form in ONE.values():
        assert torch.equal(ask(form), expected)


WITH_SEVERAL: dict[str, Callable[[Any], Tensor]] = {
    "edit": lambda s: (
        run(edit(MODEL, "mlp_out", off, iterations=s([0, 1]), layers=s([0]), positions=s([1, 2])))
        if s is not tuple
        else run(edit(MODEL, "mlp_out", off, iterations=[0, 1], layers=[0], positions=(1, 2)))
    ),
    "reorder": lambda s: run(reorder(MODEL, s([1, 0]))),
    "lens": lambda s: loop_lens.lens(MODEL, CLEAN, positions=s([1, -1]), targets=s([3, 4])).target_probs,
    "metric": lambda s: swept(LogitDiff(s([3, 4]), s([5, 6])), site="resid_post", layers=0).values,
    "exit_curve": lambda s: exit_curve(MODEL, CLEAN, rule="kl", thresholds=s([1, 2])).iterations,
}


@pytest.mark.parametrize("entry", WITH_SEVERAL)
def test_several_whole_numbers(entry: str) -> None:
    ask = WITH_SEVERAL[entry]
    expected = ask(list)
    for form in SEVERAL.values():
        assert torch.equal(ask(form), expected)


def test_labels_are_pythons_own_numbers() -> None:
    places: dict[str, Any] = {axis: np.array([1]) for axis in ("iterations", "layers", "positions", "heads")}
    result = swept(site="z", over=("iteration", "layer", "position", "head"), **places)
    for axis, labels in result.labels.items():
        assert type(labels[0][0] if axis == "position" else labels[0]) is int
    node = PathNode("z", iteration=np.int64(1), layer=torch.tensor(0), head=np.int64(2))  # type: ignore[arg-type]
    assert node == PathNode("z", iteration=1, layer=0, head=2) and len({node, PathNode("z", 1, 0, 2)}) == 1
    assert run(edit(MODEL, "z", off, positions=3, heads=1)).equal(
        run(edit(MODEL, "z", off, positions=[3], heads=[1]))
    )  # type: ignore[arg-type]


NOTHING: dict[str, Callable[[], Any]] = {
    "positions is empty": lambda: edit(MODEL, "z", off, positions=[]),
    "heads is empty": lambda: ablate(MODEL, "z", heads=np.array([], dtype=int)),  # type: ignore[arg-type]
    "chooses no iteration": lambda: skip(MODEL, []),
    "chooses no layer": lambda: edit(MODEL, "z", off, layers=slice(2, 1)),
    "order is empty": lambda: run(reorder(MODEL, [])),
    "clean is empty": lambda: loop_lens.patch_sweep(MODEL, [], [], difference, site="z"),
    "prompts is empty": lambda: loop_lens.lens(MODEL, CLEAN[:0]),
    "prompts is empty: there": lambda: loop_lens.attribute(MODEL, [], target=3),
    "prompts is": lambda: fit_tuned_lens(MODEL, CLEAN[:0]),
    "one token or a pair": lambda: loop_lens.attribute(MODEL, CLEAN, target=()),  # type: ignore[arg-type]
    "thresholds is empty": lambda: exit_curve(MODEL, CLEAN, rule="kl", thresholds=[]),
    "steps must be a whole number of at least 1": lambda: fit_tuned_lens(MODEL, CLEAN, steps=0),
    "batch_size must be a whole number of at least 1": lambda: fit_tuned_lens(MODEL, CLEAN, batch_size=0),
    "dim_batch must be a whole number of at least 1": lambda: fit_jacobian_lens(MODEL, CLEAN, dim_batch=0),
    "skip_first must be a whole number of at least 0": lambda: fit_jacobian_lens(MODEL, CLEAN, skip_first=-1),
    "one of positions must be a whole number": lambda: edit(MODEL, "z", off, positions=[1.0]),  # type: ignore[list-item]
    "is no whole number": lambda: edit(MODEL, "z", off, heads=[True]),
    "seed must be a whole number": lambda: add_noise(MODEL, 0.1, seed=0.5),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("says", NOTHING)
def test_a_request_for_nothing_is_told(says: str) -> None:
    with pytest.raises(ValueError, match=says):
        NOTHING[says]()
