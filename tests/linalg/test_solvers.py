"""The linear solvers beside CG: all conform; then what is particular to each."""

from __future__ import annotations

import pytest
import torch

from bilevel.linalg.bicgstab import BiCGSTAB
from bilevel.linalg.cg import CG
from bilevel.linalg.direct import LU, Cholesky, LeastNorm
from bilevel.linalg.gmres import GMRES
from bilevel.linalg.identity import Identity
from bilevel.linalg.minres import MINRES
from bilevel.linalg.neumann import Neumann, largest_eigenvalue
from bilevel.linalg.normal import NormalCG
from bilevel.linalg.operator import Dense, Operator
from bilevel.linalg.scaled import Equilibrated
from bilevel.linalg.scipy import LSMR, ScipyBiCGSTAB, ScipyGMRES
from bilevel.solution import Result
from tests.conformance import (
    check_linear_solver,
    check_nonsymmetric_solver,
    nonsymmetric,
    randn,
    relative_error,
    spd,
)

SCIPY = [ScipyGMRES, ScipyBiCGSTAB, LSMR]
KRYLOV = [GMRES, BiCGSTAB, *SCIPY]
SADDLE = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
INCONSISTENT = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(
    "solver",
    [
        Neumann(rtol=1e-9, max_steps=20000),
        NormalCG(),
        Cholesky(),
        LU(),
        LeastNorm(),
        Equilibrated(Cholesky()),
        *(s() for s in KRYLOV),
    ],
    ids=repr,
)
def test_conforms(solver):
    check_linear_solver(solver)


@pytest.mark.parametrize(
    "solver", [Neumann(alpha=1.0), NormalCG(), LU(), LeastNorm(), *(s() for s in KRYLOV)], ids=repr
)
def test_nonsymmetric_matrices_are_solved(solver):
    check_nonsymmetric_solver(solver)


@pytest.mark.parametrize("solver", [MINRES(), NormalCG(), GMRES(), BiCGSTAB(), LSMR(), LU(), LeastNorm()], ids=repr)
def test_indefinite_matrices_are_solved(solver):
    b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    solution = solver.solve(Dense(SADDLE), b)
    assert solution.result is Result.CONVERGED
    torch.testing.assert_close(solution.value, torch.tensor([1.0, -2.0], dtype=torch.float64))


def test_units_of_the_unknowns_do_not_matter_to_equilibrated():
    """Unknowns that differ by twenty orders of magnitude, where Cholesky alone has lost every digit."""
    matrix, truth, units = spd(4, batch=(2,)), randn(2, 4), torch.logspace(-10, 10, 4, dtype=torch.float64)
    operator = Dense(units[:, None] * matrix * units)
    b = units * (matrix @ truth.unsqueeze(-1)).squeeze(-1)
    solution = Equilibrated(Cholesky()).solve(operator, b)
    assert solution.result is Result.CONVERGED
    torch.testing.assert_close(units * solution.value, truth, rtol=1e-9, atol=1e-12)
    assert Equilibrated(Cholesky()).solve(Dense(SADDLE), torch.ones(2, dtype=torch.float64)).result is (
        Result.NEGATIVE_CURVATURE
    )


def test_cholesky_flags_an_indefinite_matrix_of_a_batch():
    matrices, b = torch.stack([spd(2), SADDLE]), randn(2, 2)
    solution = Cholesky().solve(Dense(matrices), b)
    assert solution.stats["result"].tolist() == [0, int(Result.NEGATIVE_CURVATURE)]
    assert torch.isfinite(solution.value).all()


def test_cholesky_of_a_matrix_that_is_not_symmetric_tells_its_residual():
    matrix, b = 3 * torch.eye(4, dtype=torch.float64) + 0.3 * randn(4, 4), randn(4)
    solution = Cholesky().solve(Dense(matrix), b)
    assert solution.result is Result.STAGNATED
    residual = torch.linalg.vector_norm(matrix @ solution.value - b)
    assert float(solution.stats["residual_norm"]) == pytest.approx(float(residual), rel=1e-6)


@pytest.mark.parametrize(
    "solver", [MINRES(), NormalCG(), GMRES(), BiCGSTAB(), LSMR(), LU(), LeastNorm(), Cholesky(), Neumann()], ids=repr
)
def test_inconsistent_systems_are_never_converged(solver):
    """SciPy's minres returns 3e15 with info = 0 there."""
    solution = solver.solve(Dense(INCONSISTENT), torch.ones(3, dtype=torch.float64))
    assert not solution.result.ok


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_least_norm_of_singular_systems(dtype, tolerance):
    """Rows that depend on others up to rounding; in a batch beside a regular one, which is solved as by LU."""
    wide = randn(4, 7, seed=0).to(dtype)
    singular = torch.cat([wide, torch.tensor([[0.3], [3.0], [-1.1]], dtype=dtype) * wide[:3]])
    b = singular @ randn(7, seed=1).to(dtype)
    regular = (randn(7, 7, seed=2) + 3 * torch.eye(7)).to(dtype)
    found = LeastNorm().solve(Dense(torch.stack([singular, regular]), symmetric=False), torch.stack([b, b]))
    assert found.result is Result.CONVERGED
    truth = torch.linalg.lstsq(wide.double(), b[:4].double(), driver="gelsd").solution
    assert relative_error(found.value[0].double(), truth) <= tolerance
    assert relative_error(found.value[1], LU().solve(Dense(regular, symmetric=False), b).value) <= tolerance


@pytest.mark.parametrize("solver", KRYLOV)
def test_limit_of_steps(solver):
    matrix, b = spd(40, 1e6), randn(40)
    assert solver(rtol=1e-10, max_steps=3).solve(Dense(matrix), b).result is Result.MAX_STEPS
    assert solver(max_steps=3).solve(Dense(spd(40, 10.0)), b).result is Result.STEPS_DONE


def test_direct_solvers_refuse_to_form_large_matrices():
    class Large(Operator):
        def matvec(self, v):
            raise AssertionError("no product may be made")

    large = Large((), 10**6, torch.float32, torch.device("cpu"))
    for solver in (Cholesky(), LU()):
        with pytest.raises(ValueError, match=r"1000000 unknowns .* Use CG"):
            solver.solve(large, torch.ones(10**6))


def test_neumann_is_the_truncated_series():
    """FACTS 15."""
    matrix, b, alpha, num_terms = spd(8), randn(8), 0.5, 7
    power, total = torch.eye(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for _ in range(num_terms):
        total = total + alpha * power @ b
        power = power @ (torch.eye(8, dtype=torch.float64) - alpha * matrix)
    solution = Neumann(alpha=alpha, max_steps=num_terms).solve(Dense(matrix), b)
    assert solution.result is Result.STEPS_DONE
    assert relative_error(solution.value, total) <= 1e-12


@pytest.mark.parametrize("factor", [2.0, 2.5, 1e6])
def test_neumann_never_diverges_silently(factor):
    """FACTS 15: a default step of 1 gives relative errors of 1e9 in other libraries."""
    matrix = factor * torch.eye(5, dtype=torch.float64)
    solution = Neumann(alpha=1.0, rtol=1e-8).solve(Dense(matrix), randn(5))
    assert not solution.result.ok
    assert solution.stats["num_steps"] <= (10 if factor > 2 else 1000)


@pytest.mark.parametrize("num_terms", [1, 4, 12])
def test_neumann_with_step_one_is_the_fixed_point_adjoint(num_terms):
    """Grazzi et al. (2020): u <- J^T u + b on a map with Jacobian J, not symmetric."""
    matrix, b = nonsymmetric(8), randn(8)
    transposed = (torch.eye(8, dtype=torch.float64) - matrix).mT
    u = torch.zeros_like(b)
    for _ in range(num_terms):
        u = transposed @ u + b
    found = Neumann(alpha=1.0, max_steps=num_terms).solve(Dense(matrix, symmetric=False).T, b)
    assert relative_error(found.value, u) <= 1e-12
    # It contracts at the rate of the map: the spectral norm of J is one half.
    truth = torch.linalg.solve(matrix.mT, b)
    assert (found.value - truth).norm() <= 0.5**num_terms * truth.norm() * (1 + 1e-12)


def test_neumann_diverges_on_a_map_that_expands_and_says_so():
    matrix = torch.eye(6, dtype=torch.float64) - 8 * (torch.eye(6, dtype=torch.float64) - nonsymmetric(6))
    found = Neumann(alpha=1.0, rtol=1e-8).solve(Dense(matrix, symmetric=False), randn(6))
    assert found.result is Result.DIVERGED
    assert found.stats["num_steps"] <= 10


def test_neumann_finds_its_own_step_on_badly_scaled_matrices():
    matrices = torch.stack([1e6 * spd(8, 10.0), 1e-6 * spd(8, 10.0)])
    solution = Neumann(rtol=1e-8).solve(Dense(matrices), randn(2, 8))
    assert solution.result is Result.CONVERGED


def test_largest_eigenvalue():
    matrix = torch.stack([spd(10, 100.0), 7 * spd(10, 100.0, seed=5)])
    torch.testing.assert_close(
        largest_eigenvalue(Dense(matrix), 200), torch.tensor([1.0, 7.0], dtype=torch.float64), rtol=1e-2, atol=0
    )


def test_identity_is_first_order():
    matrix, b = spd(6), randn(6)
    solution = Identity(0.5, measure=True).solve(Dense(matrix), b)
    assert torch.equal(solution.value, 0.5 * b)
    assert solution.result is Result.STEPS_DONE
    torch.testing.assert_close(solution.stats["residual_norm"], (b - matrix @ (0.5 * b)).norm())
    assert torch.isnan(Identity().solve(Dense(matrix), b).stats["residual_norm"])


@pytest.mark.parametrize("solver", [CG, MINRES, NormalCG, Neumann, *KRYLOV])
@pytest.mark.parametrize("settings", [{"rtol": 1.5}, {"atol": -1.0}, {"max_steps": 0}])
def test_bad_settings_name_the_argument(solver, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is"):
        solver(**settings)


@pytest.mark.parametrize(("solver", "settings"), [(Neumann, {"alpha": 0.0}), (GMRES, {"restart": 0})])
def test_bad_settings_of_one_solver_name_the_argument(solver, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is"):
        solver(**settings)
    assert solver(**dict.fromkeys(settings, 1)).solve(Dense(torch.eye(3).double()), torch.ones(3).double()).result.ok


@pytest.mark.parametrize("solver", [Cholesky(), LU(), CG()], ids=repr)
@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8])
def test_the_condition_and_the_least_curvature_are_told(solver, condition):
    matrix = spd(6, condition)
    stats = solver.solve(Dense(matrix, symmetric=True), randn(6)).stats
    exact = torch.linalg.eigvalsh(matrix)
    assert 0.9 <= float(stats["least_curvature"]) / float(exact[0]) < 30
    assert float(exact[-1] / exact[0]) / 100 < float(stats["condition"]) < 1.1 * float(exact[-1] / exact[0])


@pytest.mark.parametrize("solver", [Cholesky(), LU()], ids=repr)
def test_the_least_curvature_of_two_features_that_are_nearly_one_is_told(solver):
    """Its direction is (1, -1, 0, ...), to which a start of equal neighbours would be orthogonal."""
    matrix = 1.5 * torch.eye(6, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[0.8, 0.7], [0.7, 0.8]])
    stats = solver.solve(Dense(matrix, symmetric=True), randn(6)).stats
    assert 0.1 <= float(stats["least_curvature"]) <= 0.11
    assert 1.5 / 0.1 / 6**0.5 <= float(stats["condition"]) <= 15.01


def test_a_nearly_singular_system_that_is_not_solved_is_told():
    matrix = torch.diag(torch.tensor([1.0, 1e-8]))
    assert LeastNorm().solve(Dense(matrix, symmetric=True), torch.tensor([1.0, 0.007])).result is Result.STAGNATED
    assert LeastNorm().solve(Dense(matrix, symmetric=True), torch.tensor([1.0, 0.0])).result is Result.CONVERGED
