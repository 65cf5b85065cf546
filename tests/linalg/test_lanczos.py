"""The curvature that CG and MINRES saw, against dense eigenvalues."""

from __future__ import annotations

import pytest
import torch

from bilevel.linalg.cg import CG
from bilevel.linalg.lanczos import Lanczos
from bilevel.linalg.minres import MINRES
from bilevel.linalg.operator import Dense
from bilevel.linalg.preconditioners import Jacobi
from bilevel.solution import Result
from tests.conformance import randn, spd

SOLVERS = [CG, MINRES]


def extremes(solver, matrix, b):
    return solver.solve(Dense(matrix), b).state.lanczos.extremes()


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_steps_see_the_whole_spectrum(solver):
    """After n steps the Lanczos matrix is similar to A."""
    matrices = torch.stack([spd(6, 5.0, seed=k) * 10.0**k for k in range(3)])
    solved = solver(max_steps=6).solve(Dense(matrices), randn(3, 6))
    for found, matrix in zip(solved.state.lanczos.ritz_values(), matrices, strict=True):
        # The first eigenvalues carry the rounding of the larger ones.
        torch.testing.assert_close(torch.from_numpy(found), torch.linalg.eigvalsh(matrix), rtol=1e-8, atol=0)
    low, high = solved.state.lanczos.extremes()
    torch.testing.assert_close(low, torch.linalg.eigvalsh(matrices)[:, 0], rtol=1e-8, atol=0)
    torch.testing.assert_close(high, torch.linalg.eigvalsh(matrices)[:, -1], rtol=1e-8, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_few_steps_are_the_projection_on_the_krylov_space(solver):
    matrix, b, steps = spd(20, 1e3), randn(20), 5
    krylov = [b]
    for _ in range(steps - 1):
        krylov.append(matrix @ krylov[-1])
    basis = torch.linalg.qr(torch.stack(krylov, -1))[0]
    expected = torch.linalg.eigvalsh(basis.mT @ matrix @ basis)
    found = torch.from_numpy(solver(max_steps=steps).solve(Dense(matrix), b).state.lanczos.ritz_values()[0])
    # The basis of powers of A loses digits as it grows.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_they_lie_inside_of_the_spectrum(solver):
    matrix, b = spd(30, 1e4), randn(30)
    low, high = extremes(solver(max_steps=8), matrix, b)
    true = torch.linalg.eigvalsh(matrix)
    assert true[0] * (1 - 1e-10) <= low < high <= true[-1] * (1 + 1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(5))
def test_an_indefinite_matrix_shows_a_negative_value(solver, seed):
    basis = torch.linalg.qr(randn(8, 8, seed=seed))[0]
    eigenvalues = torch.tensor([-1.0, 0.5, 1, 2, 3, 4, 5, 6], dtype=torch.float64)
    solved = solver(rtol=1e-10).solve(Dense(basis @ torch.diag(eigenvalues) @ basis.mT), randn(8, seed=seed + 50))
    low, high = solved.state.lanczos.extremes()
    assert -1 - 1e-10 <= low < 0 < high <= 6 + 1e-10
    if solver is MINRES:
        assert solved.result is Result.CONVERGED
        torch.testing.assert_close(low, torch.tensor(-1.0, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_with_a_preconditioner_they_are_those_of_the_preconditioned_operator(solver):
    matrix = torch.diag(torch.logspace(0, 4, 12, dtype=torch.float64))
    low, high = extremes(solver(rtol=1e-8, preconditioner=Jacobi(1)), matrix, randn(12))
    # One probe finds a diagonal matrix exactly; its entries below a thousandth of the largest are lifted to that.
    torch.testing.assert_close(low, torch.tensor(0.1, dtype=torch.float64), rtol=1e-8, atol=0)
    torch.testing.assert_close(high, torch.tensor(1.0, dtype=torch.float64), rtol=1e-8, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_problems_that_made_no_step_have_none(solver):
    matrices, b = spd(5, batch=(3,)), randn(3, 5)
    b[1] = 0
    low, high = extremes(solver(), matrices, b)
    assert torch.isnan(low).tolist() == torch.isnan(high).tolist() == [False, True, False]
    low, high = extremes(solver(), matrices, torch.zeros_like(b))
    assert low.shape == high.shape == (3,)
    assert torch.isnan(low).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_problem_ends_with_its_own_steps(solver):
    """One with a single eigenvalue beside one with many: the finished one adds nothing."""
    matrices = torch.stack([3 * torch.eye(15, dtype=torch.float64), spd(15, 100.0)])
    solved = solver(rtol=1e-10).solve(Dense(matrices), randn(2, 15))
    values = solved.state.lanczos.ritz_values()
    assert len(values[0]) == 1
    assert values[0][0] == pytest.approx(3, rel=1e-12)
    assert len(values[1]) >= 10


def test_a_nonfinite_product_ends_the_matrix():
    lanczos = Lanczos(torch.zeros((), dtype=torch.float64))
    for value in (2.0, float("nan")):
        entry = torch.tensor(value, dtype=torch.float64)
        lanczos.append(entry, torch.ones_like(entry), torch.tensor(True))
    assert [float(end) for end in lanczos.extremes()] == [2.0, 2.0]
