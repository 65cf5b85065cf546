"""MINRES: what is particular to it; the suite that all solvers inherit is in test_solvers.py."""

from __future__ import annotations

import itertools

import pytest
import scipy.sparse.linalg
import torch

from bilevel.linalg.minres import MINRES
from bilevel.linalg.operator import Dense
from bilevel.linalg.preconditioners import Jacobi
from bilevel.solution import Result
from tests.conformance import check_linear_solver, randn, relative_error
from tests.linalg.operators import indefinite, symmetric


def test_conforms():
    check_linear_solver(MINRES())
    check_linear_solver(MINRES(rtol=1e-9, preconditioner=Jacobi()))


@pytest.mark.parametrize("condition", [10.0, 1e3, 1e5])
def test_indefinite_systems_are_solved(condition):
    matrix, b = indefinite(30, condition), randn(30)
    found = MINRES(rtol=1e-11).solve(Dense(matrix), b)
    assert found.result is Result.CONVERGED
    # The error is at most the condition number times the residual.
    assert relative_error(found.value, torch.linalg.solve(matrix, b)) <= 1.01e-11 * condition


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_every_iterate_minimises_the_residual_over_the_krylov_space(steps):
    """The definition of the method, by dense least squares over b, A b, ..., A^(k-1) b."""
    matrix, b = indefinite(12, 20.0), randn(12)
    krylov = [b]
    for _ in range(steps - 1):
        krylov.append(matrix @ krylov[-1])
    basis = torch.linalg.qr(torch.stack(krylov, -1))[0]
    best = basis @ torch.linalg.lstsq(matrix @ basis, b.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
    found = MINRES(max_steps=steps).solve(Dense(matrix), b)
    assert found.stats["num_steps"] == steps
    # The basis of powers of A loses digits as it grows.
    assert relative_error(found.value, best) <= 1e-8


def test_agrees_with_scipy_step_by_step():
    """FACTS 16: SciPy's iterates; later ones differ as the Lanczos vectors lose their orthogonality."""
    matrix, b = indefinite(25, 50.0), randn(25)
    for steps in (1, 2, 4, 8):
        expected, _ = scipy.sparse.linalg.minres(matrix.numpy(), b.numpy(), rtol=1e-16, maxiter=steps)
        found = MINRES(max_steps=steps).solve(Dense(matrix), b)
        assert relative_error(found.value, torch.from_numpy(expected)) <= 1e-10


def test_the_residual_never_grows():
    matrix, b = indefinite(40, 1e4), randn(40)
    residuals = [MINRES(max_steps=k).solve(Dense(matrix), b).stats["residual_norm"] for k in range(1, 60)]
    for before, after in itertools.pairwise(residuals):
        assert after <= before * (1 + 1e-10)


@pytest.mark.parametrize("size", [3, 10, 50])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_singular_consistent_gives_the_minimum_norm_solution(size, sign):
    """FACTS 11."""
    eigenvalues = torch.linspace(0.1, 1, size, dtype=torch.float64)
    eigenvalues[1::2] *= sign
    eigenvalues[size // 2] = 0
    matrix = symmetric(eigenvalues)
    b = matrix @ randn(size)
    found = MINRES(rtol=1e-12).solve(Dense(matrix), b)
    assert found.result is Result.CONVERGED
    truth = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10) @ b
    assert relative_error(found.value, truth) <= 1e-10


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [3, 10, 30, 100])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_singular_inconsistent_stops_near_the_least_squares_solution(size, sign, seed):
    """FACTS 11; SciPy's minres returns 3e15 with info = 0."""
    eigenvalues = 0.1 + torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    eigenvalues[1::2] *= sign
    eigenvalues[: max(1, size // 5)] = 0
    matrix, b = symmetric(eigenvalues, seed), randn(size, seed=seed + 100)
    found = MINRES(rtol=1e-10).solve(Dense(matrix), b)
    assert found.result is Result.STAGNATED
    assert found.value.norm() <= 1e3 * b.norm()
    least = b - matrix @ (torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10) @ b)
    # The estimate of ||A r|| has half of the digits, so the residual, quadratic in it, has most.
    assert (b - matrix @ found.value).norm() <= (1 + 1e-6) * least.norm()


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e12])
@pytest.mark.parametrize("small", [1e-4, 1e-8, -1e-12])
def test_a_lone_small_eigenvalue_is_no_null_vector(scale, small):
    matrix = scale * torch.diag(torch.tensor([1.0, small], dtype=torch.float64))
    found = MINRES(rtol=1e-9).solve(Dense(matrix), torch.ones(2, dtype=torch.float64))
    assert found.result is Result.CONVERGED
    assert relative_error(scale * found.value, torch.tensor([1.0, 1 / small], dtype=torch.float64)) <= 1e-8


def test_a_preconditioner_serves_indefinite_matrices_too():
    scales = torch.logspace(0, 3, 30, dtype=torch.float64).sqrt()
    matrix, b = scales.unsqueeze(-1) * indefinite(30, 5.0) * scales, randn(30)
    found = MINRES(rtol=1e-10, preconditioner=Jacobi(num_probes=60)).solve(Dense(matrix), b)
    assert found.result is Result.CONVERGED
    assert relative_error(found.value, torch.linalg.solve(matrix, b)) <= 1e-6


@pytest.mark.parametrize("rtol", [1e-10, None])
def test_one_step_says_what_it_reached(rtol):
    """FACTS 13."""
    matrix, b = indefinite(30, 1e4), randn(30)
    found = MINRES(rtol=rtol, max_steps=1).solve(Dense(matrix), b)
    assert found.result is (Result.STEPS_DONE if rtol is None else Result.MAX_STEPS)
    torch.testing.assert_close(found.stats["residual_norm"], (b - matrix @ found.value).norm())


def test_float32_reaches_its_tolerance():
    matrix, b = indefinite(30, 100.0).float(), randn(30).float()
    found = MINRES().solve(Dense(matrix), b)
    assert found.result is Result.CONVERGED
    assert (b - matrix @ found.value).norm() <= 1.1e-5 * b.norm()
