"""CG on the normal equations; the suites that it inherits are in test_solvers.py."""

from __future__ import annotations

import pytest
import torch

from bilevel.linalg.cg import CG
from bilevel.linalg.normal import NormalCG
from bilevel.linalg.operator import Dense, Operator
from bilevel.solution import Result
from tests.conformance import nonsymmetric, randn, relative_error, spd


def rank_deficient(size=12, rank=8):
    """Not symmetric, singular values in [0.5, 1] and zero."""
    left, right = (torch.linalg.qr(randn(size, rank, seed=k))[0] for k in range(2))
    return left @ torch.diag(torch.linspace(0.5, 1, rank, dtype=torch.float64)) @ right.mT


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_iterates_are_those_of_cg_on_the_normal_equations(steps):
    matrix, b = nonsymmetric(15), randn(15)
    expected = CG(max_steps=steps).solve(Dense(matrix.mT @ matrix), matrix.mT @ b)
    found = NormalCG(max_steps=steps).solve(Dense(matrix, symmetric=False), b)
    assert found.result is Result.STEPS_DONE
    assert relative_error(found.value, expected.value) <= 1e-10


def test_two_products_a_step():
    class Counted(Operator):
        products = 0

        def matvec(self, v):
            self.products += 1
            return matrix @ v

        def rmatvec(self, v):
            self.products += 1
            return matrix.mT @ v

    matrix, b = nonsymmetric(15), randn(15)
    counted = Counted((), 15, torch.float64, torch.device("cpu"), symmetric=False)
    NormalCG(max_steps=5).solve(counted, b)
    assert counted.products == 2 * 5 + 2  # A^T b at the start, and the true residual


def test_singular_consistent_gives_the_minimum_norm_solution():
    """FACTS 11."""
    matrix = rank_deficient()
    b = matrix @ randn(12)
    found = NormalCG(rtol=1e-12).solve(Dense(matrix, symmetric=False), b)
    assert found.result is Result.CONVERGED
    assert relative_error(found.value, torch.linalg.pinv(matrix) @ b) <= 1e-10


def test_singular_inconsistent_gives_the_least_squares_solution_and_says_so():
    """FACTS 11."""
    matrix, b = rank_deficient(), randn(12)
    found = NormalCG(rtol=1e-10).solve(Dense(matrix, symmetric=False), b)
    assert not found.result.ok
    # The gradient stops at rounding level; the singular values lie within a factor of two.
    assert relative_error(found.value, torch.linalg.pinv(matrix) @ b) <= 1e-8


def test_the_condition_number_is_squared():
    matrix, b = spd(60, 100.0), randn(60)
    plain = CG(rtol=1e-8).solve(Dense(matrix), b)
    normal = NormalCG(rtol=1e-8).solve(Dense(matrix), b)
    assert normal.result is Result.CONVERGED
    assert normal.stats["num_steps"] > 2 * plain.stats["num_steps"]


def test_one_poisoned_problem_leaves_the_others_bit_identical():
    """FACTS 19."""
    matrices, b = nonsymmetric(20, batch=(3,)), randn(3, 20)
    clean = NormalCG(rtol=1e-9).solve(Dense(matrices, symmetric=False), b)
    b[1, 3] = torch.inf
    poisoned = NormalCG(rtol=1e-9).solve(Dense(matrices, symmetric=False), b)
    assert poisoned.stats["result"].tolist() == [0, int(Result.NONFINITE), 0]
    assert torch.equal(poisoned.value[[0, 2]], clean.value[[0, 2]])


def test_nan_in_a_product_stops_at_once():
    """FACTS 12."""
    broken = torch.full((4, 4), torch.nan, dtype=torch.float64)
    found = NormalCG(max_steps=50).solve(Dense(broken, symmetric=False), randn(4))
    assert found.result is Result.NONFINITE
    assert found.stats["num_steps"] <= 1
