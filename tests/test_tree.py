"""Sums of many long vectors: in float64, whatever number of them is taken at a time."""

from __future__ import annotations

import pytest
import torch

from bilevel import tree

LONG = tree.CACHED // 3
"""Three of them are taken at a time."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, LONG), (1, 3 * LONG), (2, tree.CACHED + 5), (2, 3, 40), (3, 0)])
def test_dot_and_norm_of_many_vectors(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    exact = (a.double() * b.double()).sum(-1)
    size = a.double().square().sum(-1).sqrt()
    rounding = torch.finfo(dtype).eps * size * b.double().square().sum(-1).sqrt()
    assert ((tree.dot(a, b) - exact).abs() <= 4 * rounding).all()
    torch.testing.assert_close(tree.norm(a), size, rtol=1e-12, atol=0)


def test_a_long_vector_is_multiplied_by_many():
    a, b = torch.randn(7, LONG, generator=torch.Generator().manual_seed(0)), torch.ones(LONG)
    torch.testing.assert_close(tree.dot(a, b), a.double().sum(-1), rtol=1e-9, atol=1e-9)


def test_norms_of_many_vectors_neither_overflow_nor_vanish():
    a = torch.tensor([1e30, 1e-30, 0.0, float("nan")]).unsqueeze(-1).expand(4, LONG)
    found = tree.norm(a)
    expected = torch.tensor([1e30, 1e-30, 0.0, float("nan")]).double() * LONG**0.5
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0, equal_nan=True)
