"""Suites of operators and linear solvers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..linalg.operator import Dense, Operator
from ..linalg.solve import LinearSolver, LinearState
from ..solution import Result
from .data import nonsymmetric, randn, relative_error, spd
from .suite import Suite


def _product(matrix: Tensor, v: Tensor) -> Tensor:
    return (matrix @ v.unsqueeze(-1)).squeeze(-1)


class OperatorTests(Suite[tuple[Operator, Tensor]]):
    """Tests of an operator: `make` returns it with its dense float64 matrices, ``[*batch, n, n]``."""

    tolerance = 1e-12

    def test_products_are_those_of_the_matrix(self) -> None:
        operator, truth = self.make()
        v = randn(*truth.shape[:-1], seed=3)
        expected, transposed = _product(truth, v), _product(truth.mT, v)
        assert relative_error(operator @ v, expected) <= self.tolerance
        assert relative_error(operator.rmatvec(v), transposed) <= self.tolerance
        assert relative_error(operator.T @ v, transposed) <= self.tolerance
        assert relative_error(operator.T.T @ v, expected) <= self.tolerance
        assert operator.T.symmetric == operator.symmetric

    def test_both_products_are_of_one_matrix(self) -> None:
        """``<u, A v> = <A^T u, v>``."""
        operator, truth = self.make()
        u, v = randn(*truth.shape[:-1], seed=2), randn(*truth.shape[:-1], seed=3)
        left, right = (u * (operator @ v)).sum(), (v * operator.rmatvec(u)).sum()
        assert abs(left - right) <= self.tolerance * u.norm() * (operator @ v).norm()

    def test_it_is_linear(self) -> None:
        operator, truth = self.make()
        u, v = randn(*truth.shape[:-1], seed=2), randn(*truth.shape[:-1], seed=3)
        combined = operator @ (3 * u + v)
        assert relative_error(3 * (operator @ u) + (operator @ v), combined) <= self.tolerance

    def test_exports(self) -> None:
        operator, truth = self.make()
        assert relative_error(operator.to_dense(), truth) <= self.tolerance
        assert relative_error(operator.T.to_dense(), truth.mT) <= self.tolerance
        v = randn(*truth.shape[:-1], seed=3)
        exported, flat = operator.to_scipy(), v.reshape(-1).numpy()
        assert relative_error(torch.from_numpy(exported @ flat).view_as(v), _product(truth, v)) <= self.tolerance
        assert relative_error(torch.from_numpy(exported.T @ flat).view_as(v), _product(truth.mT, v)) <= self.tolerance

    def test_shapes(self) -> None:
        operator, truth = self.make()
        assert operator.shape == truth.shape
        with pytest.raises(ValueError, match="cannot multiply"):
            operator @ randn(*truth.shape[:-1])[..., :-1]


class LinearSolverTests(Suite[LinearSolver]):
    """Tests of a solver of symmetric positive definite systems, at least: `make` returns it with a tight tolerance.

    Systems of 12 unknowns and condition 100, three at once and one alone.
    """

    matrix, b = spd(12, batch=(3,)), randn(3, 12)

    @property
    def truth(self) -> Tensor:
        x: Tensor = torch.linalg.solve(self.matrix, self.b.unsqueeze(-1)).squeeze(-1)
        return x

    def test_each_system_of_a_batch_is_solved(self) -> None:
        found = self.make().solve(Dense(self.matrix), self.b)
        assert found.result is Result.CONVERGED
        assert relative_error(found.value, self.truth) <= self.tolerance

    def test_the_report_is_true(self) -> None:
        found = self.make().solve(Dense(self.matrix), self.b)
        true_residual = (self.b - _product(self.matrix, found.value)).norm(dim=-1)
        torch.testing.assert_close(found.stats["residual_norm"], true_residual, rtol=1e-3, atol=1e-14)
        assert {"num_steps", "residual_norm", "result"} <= set(found.stats)
        assert {tuple(stat.shape) for stat in found.stats.values()} == {(3,)}

    def test_one_system_alone(self) -> None:
        found = self.make().solve(Dense(self.matrix[1]), self.b[1])
        assert found.stats["num_steps"].shape == ()
        assert relative_error(found.value, self.truth[1]) <= self.tolerance

    def test_the_same_settings_give_the_same_answer(self) -> None:
        first, second = (self.make().solve(Dense(self.matrix), self.b).value for _ in range(2))
        assert torch.equal(first, second)

    def test_warm_start(self) -> None:
        solver = self.make()
        cold = solver.solve(Dense(self.matrix), self.b)
        assert isinstance(cold.state, LinearState), "a later solve starts from the state of the solution"
        assert cold.state.x0 is not None
        assert torch.equal(cold.state.x0, cold.value)
        warm = solver.solve(Dense(self.matrix), self.b, LinearState(self.truth + 1e-8 * randn(3, 12, seed=4)))
        assert warm.result is Result.CONVERGED
        assert relative_error(warm.value, self.truth) <= self.tolerance
        assert (warm.stats["num_steps"] <= cold.stats["num_steps"]).all()

    def test_nothing_to_solve_is_zero_wherever_it_starts(self) -> None:
        nothing = torch.zeros(3, 12, dtype=torch.float64, device="cpu")
        for state in (None, LinearState(self.truth)):
            zero = self.make().solve(Dense(self.matrix), nothing, state)
            assert zero.result is Result.CONVERGED
            assert not zero.value.any()

    def test_a_tiny_right_hand_side_in_float32(self) -> None:
        tiny = self.make().solve(Dense(self.matrix.float()), (1e-25 * self.b).float())
        assert relative_error(tiny.value.double() * 1e25, self.truth) <= 1e-2

    def test_bad_numbers_are_told(self) -> None:
        for bad in (torch.nan, torch.inf):
            poisoned = self.b.clone()
            poisoned[0, 0] = bad
            assert self.make().solve(Dense(self.matrix), poisoned).result is Result.NONFINITE


class NonsymmetricSolverTests(Suite[LinearSolver]):
    """Tests of a solver that solves systems with A, not with its symmetric part or its transpose."""

    def test_systems_with_a_and_with_its_transpose(self) -> None:
        matrix, b = nonsymmetric(12, batch=(3,)), randn(3, 12)
        truth = torch.linalg.solve(matrix, b.unsqueeze(-1)).squeeze(-1)
        found = self.make().solve(Dense(matrix, symmetric=False), b)
        assert found.result is Result.CONVERGED
        assert relative_error(found.value, truth) <= self.tolerance
        alone = self.make().solve(Dense(matrix[1], symmetric=False).T, b[1])
        assert relative_error(alone.value, torch.linalg.solve(matrix[1].mT, b[1])) <= self.tolerance
