"""Distances between patterns in closed form and against numpy in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loop_lens.dynamics.distances import frobenius_rows, jensen_shannon, total_variation


def js_by_entropies(a: np.ndarray, b: np.ndarray) -> float:
    """sqrt(H((a + b) / 2) - (H(a) + H(b)) / 2), in nats."""

    def entropy(p: np.ndarray) -> float:
        kept = p[p > 0]
        return float(-(kept * np.log(kept)).sum())

    return math.sqrt(max(entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2, 0.0))


def test_closed_forms() -> None:
    a, b = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert total_variation(a, b).tolist() == [1.0, 0.0]
    assert jensen_shannon(a, b).tolist() == pytest.approx([math.sqrt(math.log(2)), 0.0], rel=1e-6)
    assert frobenius_rows(a, b).tolist() == pytest.approx([math.sqrt(2), 0.0])
    assert total_variation(a, a).tolist() == jensen_shannon(a, a).tolist() == [0.0, 0.0]


def test_against_numpy_on_masked_patterns() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 9, 9, generator=generator).masked_fill(
        ~torch.ones(9, 9).tril().bool(), -torch.inf
    )
    a, b = (2 * scores).softmax(-1)
    for query_a, query_b, tv, js, l2 in zip(
        a.flatten(0, 1).double().numpy(),
        b.flatten(0, 1).double().numpy(),
        total_variation(a, b).flatten(),
        jensen_shannon(a, b).flatten(),
        frobenius_rows(a, b).flatten(),
        strict=True,
    ):
        assert float(tv) == pytest.approx(0.5 * np.abs(query_a - query_b).sum(), abs=1e-6)
        assert float(js) == pytest.approx(js_by_entropies(query_a, query_b), abs=3e-6)
        assert float(l2) == pytest.approx(np.linalg.norm(query_a - query_b), abs=1e-6)
    assert torch.equal(jensen_shannon(a, b), jensen_shannon(b, a))


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6])
def test_jensen_shannon_of_nearly_equal_patterns(gap: float) -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.rand(4, 16, generator=generator).double().softmax(-1)
    moved = a * (1 + gap * torch.randn(4, 16, generator=generator).double())
    b = moved / moved.sum(-1, keepdim=True)
    a32, b32 = a.float(), b.float()
    # To leading order it is the root of the sum of (a - b)^2 / (8 a), which has no cancellation.
    d = a32.double() - b32.double()
    expected = (d.square() / (4 * (a32.double() + b32.double()))).sum(-1).sqrt()
    assert torch.allclose(jensen_shannon(a32, b32).double(), expected, rtol=max(gap, 1e-5))
