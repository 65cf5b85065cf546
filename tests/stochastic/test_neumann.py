from __future__ import annotations

from collections import Counter
from itertools import repeat

import pytest
import torch

from bilevel.problems.finite_sums import Quadratics
from bilevel.stochastic import SOBA, StocBiO
from bilevel.stochastic.neumann import NeumannSum, NeumannTerm, Point, Sample

PROBLEM = Quadratics(size=5, outer_size=4, num_samples=12)
LR, TERMS = 0.7, 6


def point():
    y, x = PROBLEM.start()
    method = SOBA(y, x, PROBLEM.inner_loss, PROBLEM.outer_loss, inner_lr=1.0, outer_lr=1.0)
    return Point(method._oracles, y.detach(), x.detach())


def test_the_sum_is_the_truncated_inverse():
    matrix, b = PROBLEM.dense("g")["A"], torch.arange(1.0, 6.0, dtype=torch.float64)
    found = NeumannSum(TERMS).invert(point(), b, Sample(None, (None,) * TERMS, None), LR)
    rest = torch.linalg.matrix_power(torch.eye(5, dtype=torch.float64) - LR * matrix, TERMS + 1)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, b - rest @ b))


def test_the_mean_of_the_random_terms_is_the_sum():
    b = torch.arange(1.0, 6.0, dtype=torch.float64)
    series = NeumannTerm(TERMS)
    terms = [series.invert(point(), b, Sample(None, (None,) * p, None), LR) for p in range(TERMS)]
    whole = NeumannSum(TERMS - 1).invert(point(), b, Sample(None, (None,) * (TERMS - 1), None), LR)
    torch.testing.assert_close(torch.stack(terms).mean(0), whole)


def test_the_random_truncation_is_uniform_and_follows_from_seed_and_step():
    def lengths(seed):
        series = NeumannTerm(TERMS, seed)
        return [len(series.draw(repeat(0), repeat(0), step).hessian) for step in range(6000)]

    drawn = lengths(0)
    counts = Counter(drawn)
    assert set(counts) == set(range(TERMS))
    # 1000 +- 29 expected of each: five standard deviations, at a fixed seed.
    assert all(abs(count - 1000) < 150 for count in counts.values())
    assert drawn == lengths(0)
    assert drawn != lengths(1)


def test_one_graph_serves_equal_batches_in_a_row():
    at = point()
    NeumannSum(TERMS).invert(at, torch.ones(5, dtype=torch.float64), Sample(None, (None,) * TERMS, None), LR)
    assert (at.oracles.gradients, at.oracles.products) == (1, TERMS)
    batches = tuple(torch.tensor([i]) for i in range(TERMS))
    other = point()
    NeumannSum(TERMS).invert(other, torch.ones(5, dtype=torch.float64), Sample(None, batches, None), LR)
    assert (other.oracles.gradients, other.oracles.products) == (TERMS, TERMS)


def test_a_series_needs_a_term():
    with pytest.raises(ValueError, match="num_terms is 0"):
        StocBiO(*PROBLEM.start(), PROBLEM.inner_loss, PROBLEM.outer_loss, inner_lr=1.0, outer_lr=1.0, num_terms=0)
