"""The estimate of evolution strategies, written out."""

from __future__ import annotations

import pytest
import torch

import bilevel as bl
from bilevel.linalg.noise import normal
from tests.conformance import relative_error

CPU = torch.device("cpu")


@pytest.mark.parametrize("sigma", [0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 3])
def test_it_is_the_mean_over_antithetic_pairs(sigma, seed):
    """Of a solution that is linear, ``y = a + 2 b``, so that each slope is exact: the draws of no two are the same."""
    a, b = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cotangent, samples = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 4
    fit = bl.argmin(
        lambda y: (y - a - 2 * b).square().sum(),
        torch.zeros(3, dtype=torch.float64),
        solver=bl.NewtonCG(gtol=1e-13),
        hypergrad=bl.EvolutionStrategies(samples, sigma, seed=seed),
    )
    found = torch.autograd.grad(fit.value @ cotangent, (a, b))
    first = seed * samples
    draws = [(normal((3,), 2 * n, CPU), normal((3,), 2 * n + 1, CPU)) for n in range(first, first + samples)]
    slopes = [(one + 2 * two) @ cotangent for one, two in draws]
    for index, grad in enumerate(found):
        truth = sum(slope * draw[index] for slope, draw in zip(slopes, draws, strict=True)) / samples
        assert relative_error(grad, truth) <= 1e-9
