"""The plain functions in closed form, against numpy, and with padding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loop_lens.stages import anisotropy, colsum_concentration, matrix_entropy, mixing_score, sink_rate
from tests.stages.second_opinion import entropy, squared_shares


def padded(lengths: tuple[int, ...], heads: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Causal patterns of several lengths; the same in one tensor with NaN as padding; and its mask."""
    generator = torch.Generator().manual_seed(0)
    n = max(lengths)
    mask = torch.arange(n) < torch.tensor(lengths)[:, None]
    each: list[torch.Tensor] = []
    whole = torch.full((len(lengths), heads, n, n), float("nan"))
    for i, length in enumerate(lengths):
        scores = torch.randn(heads, length, length, generator=generator)
        future = torch.ones(length, length).triu(1).bool()
        each.append(scores.masked_fill(future, -torch.inf).softmax(-1))
        whole[i, :, :length] = 0
        whole[i, :, :length, :length] = each[-1]
    return each, whole, mask


def test_padded_patterns_are_as_each_alone() -> None:
    each, whole, mask = padded((9, 3, 6), heads=4)
    for i, pattern in enumerate(each):
        for function in (colsum_concentration, mixing_score):
            found = function(whole, mask=mask[:, None])[i]
            assert torch.allclose(found, function(pattern), rtol=1e-6, atol=1e-7)
        for tau in (0.1, 0.3, 0.6):
            assert sink_rate(whole, tau, mask=mask[:, None])[i] == sink_rate(pattern, tau)


def test_attention_against_numpy() -> None:
    (pattern,), _, _ = padded((8,), heads=3)
    wide = pattern.double().numpy()
    expected = [1 - entropy(head.mean(0)) / math.log(8) for head in wide]
    assert colsum_concentration(pattern).tolist() == pytest.approx(expected, rel=1e-5)
    for tau in (0.1, 0.2, 0.3):
        expected = np.mean([head[:, 0].mean() >= tau for head in wide])
        assert float(sink_rate(pattern, tau)) == pytest.approx(expected)
    expected = [entropy(head).mean() for head in wide]
    assert mixing_score(pattern).tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.allclose(
        mixing_score(pattern.double()).float(), mixing_score(pattern.bfloat16().float()), rtol=0.02
    )


@pytest.mark.parametrize(("pos", "width"), [(64, 512), (40, 24)])
@pytest.mark.parametrize("sink", [1.0, 3000.0])
def test_the_spectrum_is_that_of_singular_values(pos: int, width: int, sink: float) -> None:
    generator = torch.Generator().manual_seed(0)
    resid = torch.randn(3, pos, width, generator=generator)
    resid[:, 0] *= sink  # as massive activations do: an entropy near 0
    for one, found, first in zip(
        resid, matrix_entropy(resid.double()), anisotropy(resid.double()), strict=True
    ):
        shares = squared_shares(one.double().numpy())
        assert float(found) == pytest.approx(float(entropy(shares)), rel=1e-9)
        assert float(first) == pytest.approx(float(shares[0]), rel=1e-12)
    assert torch.allclose(matrix_entropy(resid), matrix_entropy(resid.double()).float(), rtol=1e-6, atol=0)


def test_streams_in_closed_form() -> None:
    rank_one = torch.outer(torch.arange(1.0, 10), torch.arange(1.0, 6))
    assert float(matrix_entropy(rank_one)) == pytest.approx(0, abs=1e-6)
    assert float(anisotropy(rank_one)) == pytest.approx(1)
    rows = torch.linalg.qr(torch.randn(12, 7, generator=torch.Generator().manual_seed(0)))[0].mT
    assert float(matrix_entropy(rows)) == pytest.approx(math.log(7), rel=1e-6)
    assert float(anisotropy(rows)) == pytest.approx(1 / 7, rel=1e-5)


def test_padding_adds_no_direction() -> None:
    generator = torch.Generator().manual_seed(1)
    for length, width in ((5, 16), (9, 4)):
        resid = torch.randn(2, 11, width, generator=generator)
        mask = torch.arange(11) < torch.tensor([length, 11])[:, None]
        spoiled = resid.masked_fill(~mask.unsqueeze(-1), float("inf"))
        for function in (matrix_entropy, anisotropy):
            found = function(spoiled, mask=mask)
            alone = torch.stack([function(resid[0, :length]), function(resid[1])])
            assert torch.allclose(found, alone, rtol=1e-6)


def test_a_diverged_stream_is_nan_and_the_others_are_measured() -> None:
    resid = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(2))
    expected = matrix_entropy(resid)
    resid[1, 2, 3] = float("inf")
    for bad in (float("inf"), float("nan")):
        resid[1, 2, 3] = bad
        for function in (matrix_entropy, anisotropy):
            assert function(resid).isnan().tolist() == [False, True, False]
    assert matrix_entropy(resid)[0] == expected[0]


def test_bad_input() -> None:
    mask = torch.tensor([[True, True, False]])
    with pytest.raises(ValueError, match="3 positions"):
        mixing_score(torch.ones(1, 3, 3), mask=mask[:, :2])
    with pytest.raises(ValueError, match="two or more"):
        colsum_concentration(torch.ones(1, 3, 3), mask=torch.tensor([[True, False, False]]))
    with pytest.raises(ValueError, match="token 2 is padding"):
        sink_rate(torch.ones(1, 2, 3, 3), token=2, mask=mask[:, None])
    with pytest.raises(ValueError, match="stream of zeros"):
        anisotropy(torch.stack([torch.ones(2, 3), torch.zeros(2, 3)]))
    with pytest.raises(ValueError, match=r"\[\.\.\. pos d_model\]"):
        matrix_entropy(torch.ones(3))
