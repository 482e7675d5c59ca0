"""Evaluation at several depths against one forward per depth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import loop_lens
from loop_lens.data.task import IGNORED
from loop_lens.training import Evaluation, evaluate
from loop_lens.training.draws import generator_of
from tests.training.toy import Copying, tiny

DEPTHS, LEVELS = (1, 2, 5), (1, 3)


def measured() -> Evaluation:
    model = tiny(initializer_range=0.4)
    return evaluate(model, Copying(), recurrences=[5, 1, 2], levels=LEVELS, n=10, batch_size=4, seed=3)


def test_loss_and_accuracy_are_those_of_separate_forwards() -> None:
    found, model = measured(), tiny(initializer_range=0.4).eval()
    for i, level in enumerate(LEVELS):
        batches = [
            Copying().batch(
                n, level=level, generator=generator_of(3, start, f"evaluation {level}"), split="test"
            )
            for start, n in ((0, 4), (4, 4), (8, 2))
        ]
        ids, labels = (torch.cat([getattr(b, name) for b in batches]) for name in ("input_ids", "labels"))
        for j, depth in enumerate(DEPTHS):
            model.config.recurrences = depth
            with torch.no_grad():
                logits = model(ids).logits
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
            assert found.loss[i, j].item() == pytest.approx(loss.item(), abs=1e-5)
            right, labelled = logits.argmax(-1) == labels, labels != IGNORED
            assert found.accuracy[i, j].item() == pytest.approx((right.sum() / labelled.sum()).item())
            last = cross_entropy(logits[:, -1], labels[:, -1]).item()
            assert found.loss_at[i, j, -1].item() == pytest.approx(last, abs=1e-5)
            at = (right & labelled).sum(0)[-1] / labelled.sum(0)[-1]
            assert found.accuracy_at[i, j, -1].item() == pytest.approx(at.item())
        assert torch.equal(found.labelled[i], (labels != IGNORED).sum(0))


def test_positions_without_labels_are_not_measured() -> None:
    found = measured()
    assert found.accuracy_at[0, :, :-1].isnan().all()
    table = found.to_dataframe(by_position=True)
    assert sorted(table[table["level"] == 1]["position"].unique()) == [5]
    assert sorted(table[table["level"] == 3]["position"].unique()) == [3, 4, 5]


def test_evaluation_leaves_the_model_as_it_was_and_goes_to_disk(tmp_path: Path) -> None:
    model = tiny().train()
    found = evaluate(model, Copying(), recurrences=[1, 7], levels=[2], n=3)
    assert model.training and model.config.recurrences == 3
    assert list(found.to_dataframe()["recurrences"]) == [1, 7]
    found.save(tmp_path / "evaluation.safetensors")
    loaded = Evaluation.load(tmp_path / "evaluation.safetensors")
    assert torch.equal(loaded.loss, found.loss) and loaded.levels == (2,)
    found.plot()


def test_what_cannot_be_evaluated_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(tiny(), Copying(), recurrences=[0], levels=[1])
    with pytest.raises(ValueError, match="levels"):
        evaluate(tiny(), Copying(), recurrences=[1], levels=[])
    with pytest.raises(TypeError, match="lens"):
        evaluate(loop_lens.wrap(tiny()), Copying(), recurrences=[1], levels=[1])  # type: ignore[arg-type]
