"""Suites that every operator, linear solver and inner solver inherits: add its factory to the lists that use them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bilevel import Result
from bilevel.inner.minimize import InnerSolver
from bilevel.linalg.operator import Dense, Operator
from bilevel.linalg.solve import LinearSolver, LinearState
from bilevel.problem import Problem
from bilevel.problems import Quadratics


def spd(size: int, condition: float = 100.0, batch: tuple[int, ...] = (), seed: int = 0) -> Tensor:
    """Random symmetric positive definite matrices with eigenvalues in [1/condition, 1], float64."""
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(*batch, size, size, generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(gauss)
    spectrum = torch.logspace(-torch.tensor(condition).log10().item(), 0, size, dtype=torch.float64)
    return basis @ torch.diag(spectrum) @ basis.mT


def nonsymmetric(size: int, batch: tuple[int, ...] = (), seed: int = 0) -> Tensor:
    """``I - J`` with a random J of spectral norm 1/2: condition 3 at most, and Picard iterations contract."""
    gauss = randn(*batch, size, size, seed=seed)
    return torch.eye(size, dtype=torch.float64) - 0.5 * gauss / torch.linalg.matrix_norm(gauss, 2)[..., None, None]


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative_error(found: Tensor, truth: Tensor) -> float:
    return float((found.detach() - truth.detach()).norm() / truth.detach().norm())


def check_operator(operator: Operator, truth: Tensor, tolerance: float = 1e-12) -> None:
    """Products with A and A^T, linearity, shape errors and both exports, against the dense float64 truth."""
    u, v = randn(*truth.shape[:-1], seed=2), randn(*truth.shape[:-1], seed=3)
    expected, transposed = (truth @ v.unsqueeze(-1)).squeeze(-1), (truth.mT @ v.unsqueeze(-1)).squeeze(-1)
    assert relative_error(operator @ v, expected) <= tolerance
    assert relative_error(operator.rmatvec(v), transposed) <= tolerance
    assert relative_error(operator.T @ v, transposed) <= tolerance
    assert relative_error(operator.T.T @ v, expected) <= tolerance
    assert operator.T.symmetric == operator.symmetric
    # Both products are of one matrix: <u, A v> = <A^T u, v>.
    left, right = (u * (operator @ v)).sum(), (v * operator.rmatvec(u)).sum()
    assert abs(left - right) <= tolerance * u.norm() * (operator @ v).norm()
    combined = operator @ (3 * u + v)
    assert relative_error(3 * (operator @ u) + (operator @ v), combined) <= tolerance
    assert relative_error(operator.to_dense(), truth) <= tolerance
    assert relative_error(operator.T.to_dense(), truth.mT) <= tolerance
    exported, flat = operator.to_scipy(), v.reshape(-1).numpy()
    assert relative_error(torch.from_numpy(exported @ flat).view_as(v), expected) <= tolerance
    assert relative_error(torch.from_numpy(exported.T @ flat).view_as(v), transposed) <= tolerance
    assert operator.shape == truth.shape
    with pytest.raises(ValueError, match="cannot multiply"):
        operator @ v[..., :-1]


def check_linear_solver(solver: LinearSolver, tolerance: float = 1e-8) -> None:
    """Solves SPD systems, alone and batched, meeting the tolerance in each; zero, NaN, tiny inputs; warm starts."""
    matrix, b = spd(12, batch=(3,)), randn(3, 12)
    truth = torch.linalg.solve(matrix, b.unsqueeze(-1)).squeeze(-1)
    solution = solver.solve(Dense(matrix), b)
    assert solution.result is Result.CONVERGED
    assert relative_error(solution.value, truth) <= tolerance
    true_residual = (b - (matrix @ solution.value.unsqueeze(-1)).squeeze(-1)).norm(dim=-1)
    torch.testing.assert_close(solution.stats["residual_norm"], true_residual, rtol=1e-3, atol=1e-14)
    assert {tuple(stat.shape) for stat in solution.stats.values()} == {(3,)}

    alone = solver.solve(Dense(matrix[1]), b[1])
    assert alone.stats["num_steps"].shape == ()
    assert relative_error(alone.value, truth[1]) <= tolerance

    assert torch.equal(solution.state.x0, solution.value)
    warm = solver.solve(Dense(matrix), b, LinearState(truth + 1e-8 * randn(3, 12, seed=4)))
    assert warm.result is Result.CONVERGED
    assert relative_error(warm.value, truth) <= tolerance
    assert (warm.stats["num_steps"] <= solution.stats["num_steps"]).all()

    nothing = torch.zeros(3, 12, dtype=torch.float64)
    for state in (None, LinearState(truth)):
        zero = solver.solve(Dense(matrix), nothing, state)
        assert zero.result is Result.CONVERGED
        assert not zero.value.any()

    tiny = solver.solve(Dense(matrix.float()), (1e-25 * b).float())
    assert relative_error(tiny.value.double() * 1e25, truth) <= 1e-2

    for bad in (torch.nan, torch.inf):
        poisoned = b.clone()
        poisoned[0, 0] = bad
        assert solver.solve(Dense(matrix), poisoned).result is Result.NONFINITE


def check_nonsymmetric_solver(solver: LinearSolver, tolerance: float = 1e-8) -> None:
    """Solves with A, not with its symmetric part or its transpose; alone and batched."""
    matrix, b = nonsymmetric(12, batch=(3,)), randn(3, 12)
    truth = torch.linalg.solve(matrix, b.unsqueeze(-1)).squeeze(-1)
    solution = solver.solve(Dense(matrix, symmetric=False), b)
    assert solution.result is Result.CONVERGED
    assert relative_error(solution.value, truth) <= tolerance
    alone = solver.solve(Dense(matrix[1], symmetric=False).T, b[1])
    assert relative_error(alone.value, torch.linalg.solve(matrix[1].mT, b[1])) <= tolerance


def check_inner_solver(solver: InnerSolver, tolerance: float = 1e-6) -> None:
    """Minimises quadratics of condition 1 ... 100, each to its own tolerance, and repeats itself exactly."""
    quadratics = Quadratics(conditions=(1.0, 10.0, 100.0), size=6)
    problem = Problem(quadratics.inner, quadratics.init, (quadratics.hparams,))
    found = solver.minimize(problem)
    assert found.result is Result.CONVERGED
    assert relative_error(found.value, quadratics.solution(quadratics.hparams)) <= tolerance
    assert found.stats["num_steps"].shape == (3,)
    again = solver.minimize(problem)
    assert torch.equal(found.value, again.value)


class Triple(torch.autograd.Function):
    """Three times its operand, which closure conversion cannot see."""

    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad
