from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch
from hypothesis import given, settings

from bilevel.linalg.cg import CG
from bilevel.linalg.operator import Dense
from bilevel.linalg.preconditioners import Jacobi
from bilevel.solution import Result
from tests.conformance import check_linear_solver, randn, relative_error, spd
from tests.linalg.operators import Rowwise


def test_conforms():
    check_linear_solver(CG())
    check_linear_solver(CG(rtol=1e-9, preconditioner=Jacobi()))


def test_two_times_identity_is_one_step():
    """FACTS 8: hypertorch and BOAT return the iterate before the converged one: 0."""
    solution = CG(rtol=1e-12).solve(Dense(2 * torch.eye(5, dtype=torch.float64)), torch.ones(5, dtype=torch.float64))
    assert solution.stats["num_steps"] == 1
    assert torch.equal(solution.value, torch.full((5,), 0.5, dtype=torch.float64))


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(2, 50),
    log_condition=st.floats(0, 3),
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 20),
)
def test_error_bound_in_the_energy_norm(size, log_condition, seed, steps):
    """FACTS 7: ||e_k||_A <= 2 ((sqrt c - 1) / (sqrt c + 1))^k ||e_0||_A; moskomule's update never gets there."""
    matrix, b = spd(size, 10**log_condition, seed=seed), randn(size, seed=seed + 1)
    truth = torch.linalg.solve(matrix, b)
    found = CG(max_steps=steps).solve(Dense(matrix), b)
    error = found.value - truth
    root = math.sqrt(10**log_condition)
    bound = 2 * ((root - 1) / (root + 1)) ** steps
    assert (error @ matrix @ error).sqrt() <= (bound + 1e-9) * (truth @ matrix @ truth).sqrt()


def test_finite_termination():
    """FACTS 7."""
    matrix, b = spd(50, 10.0), randn(50)
    solution = CG(rtol=1e-10).solve(Dense(matrix), b)
    assert solution.result is Result.CONVERGED
    assert solution.stats["num_steps"] <= 50


@pytest.mark.parametrize("b", [(1.0, 1.0), (1.0, 2.0), (2.0, 1.0)])
def test_saddle_is_negative_curvature(b):
    """FACTS 10: SciPy's cg reports success at the saddle of diag(1, -1), or returns NaN."""
    matrix = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    solution = CG(rtol=1e-10).solve(Dense(matrix), torch.tensor(b, dtype=torch.float64))
    assert solution.result is Result.NEGATIVE_CURVATURE
    assert torch.isfinite(solution.value).all()


@pytest.mark.parametrize("max_steps", [None, 400])
@pytest.mark.parametrize("seed", range(5))
def test_of_an_indefinite_matrix_an_iterate_that_ran_away_is_not_given(seed, max_steps):
    """The iterate before negative curvature leaves up to hundreds of times the right-hand side."""
    eigenvalues = torch.cat([torch.tensor([-1e-3]), torch.logspace(-3, 1, 199)]).double()
    basis = torch.linalg.qr(randn(200, 200, seed=seed))[0]
    matrix, b = basis @ torch.diag(eigenvalues) @ basis.mT, randn(200, seed=seed + 9)
    found = CG(rtol=1e-10, max_steps=max_steps).solve(Dense(matrix), b)
    assert found.result is Result.NEGATIVE_CURVATURE
    left = (b - matrix @ found.value).norm() / b.norm()
    assert left <= 10
    assert found.stats["relative_residual"] == pytest.approx(float(left), rel=1e-6)


def test_singular_consistent_gives_the_minimum_norm_solution():
    """FACTS 11."""
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    solution = CG(rtol=1e-10).solve(Dense(matrix), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    assert solution.result is Result.CONVERGED
    assert relative_error(solution.value, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)) <= 1e-10


@pytest.mark.parametrize("max_steps", [None, 60])
@pytest.mark.parametrize("seed", range(5))
def test_larger_inconsistent_systems_do_not_run_away(seed, max_steps):
    """FACTS 11: without a guard the iterates grow to 1e17 here."""
    eigenvalues = torch.linspace(0.1, 1, 30, dtype=torch.float64)
    eigenvalues[:6] = 0
    basis = torch.linalg.qr(randn(30, 30, seed=seed))[0]
    b = randn(30, seed=seed + 9)
    found = CG(rtol=1e-10, max_steps=max_steps).solve(Dense(basis @ torch.diag(eigenvalues) @ basis.mT), b)
    assert found.result is Result.NEGATIVE_CURVATURE
    assert found.value.norm() <= 1e3 * b.norm()
    assert found.stats["residual_norm"] <= b.norm()


def test_singular_inconsistent_is_never_converged():
    """FACTS 11."""
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    b = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    solution = CG(rtol=1e-10).solve(Dense(matrix), b)
    assert not solution.result.ok
    assert solution.value.norm() <= 1e3 * b.norm()


def test_unconverged_says_so_with_the_true_residual():
    """TorchOpt and JAXopt return a bare tensor, no flag."""
    matrix, b = spd(30, 1e4), randn(30)
    solution = CG(rtol=1e-10, max_steps=3).solve(Dense(matrix), b)
    assert solution.result is Result.MAX_STEPS
    torch.testing.assert_close(solution.stats["residual_norm"], (b - matrix @ solution.value).norm())


def test_a_number_of_steps_alone_is_no_failure():
    solution = CG(max_steps=3).solve(Dense(spd(30, 30.0)), randn(30))
    assert solution.result is Result.STEPS_DONE
    assert solution.stats["num_steps"] == 3
    assert solution.stats["residual_norm"] > 0.01


def test_hilbert_residual_is_the_true_one():
    """FACTS 14, condition 1e13: the recurrence drifts away from the residual; the report must not."""
    matrix = torch.from_numpy(scipy.linalg.hilbert(10))
    b = randn(10)
    solution = CG(rtol=1e-14, max_steps=200).solve(Dense(matrix), b)
    true = (b - matrix @ solution.value).norm()
    assert true / 10 <= solution.stats["residual_norm"] <= 10 * true


def test_conditions_from_1_to_1e4_each_meet_the_tolerance():
    """linear_operator stops on the mean residual: its worst task is left at 2.3."""
    matrices = torch.stack([spd(20, 10.0**k, seed=k) for k in range(5)])
    b = randn(5, 20)
    solution = CG(rtol=1e-8).solve(Dense(matrices), b)
    true = (b - (matrices @ solution.value.unsqueeze(-1)).squeeze(-1)).norm(dim=-1)
    assert (true <= 1e-8 * b.norm(dim=-1) * (1 + 1e-6)).all()
    assert len(set(solution.stats["num_steps"].tolist())) == 5


@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_problems_may_be_solved_in_chunks(chunk):
    """FACTS 21."""
    matrices, b = torch.stack([spd(15, 10.0 ** (k / 2), seed=k) for k in range(6)]), randn(6, 15)
    together = CG(rtol=1e-9).solve(Rowwise(matrices), b).value
    parts = [
        CG(rtol=1e-9).solve(Rowwise(m), v).value for m, v in zip(matrices.split(chunk), b.split(chunk), strict=True)
    ]
    assert relative_error(torch.cat(parts), together) <= 1e-12


@pytest.mark.parametrize("condition", [10.0, 1e3])
def test_agrees_with_scipy(condition):
    """FACTS 16: SciPy's cg on the same system, to 1e-10 and one iteration."""
    matrix, b = spd(30, condition), randn(30)
    iterations = 0

    def count(_):
        nonlocal iterations
        iterations += 1

    expected, info = scipy.sparse.linalg.cg(matrix.numpy(), b.numpy(), rtol=1e-13, callback=count)
    assert info == 0
    found = CG(rtol=1e-13).solve(Dense(matrix), b)
    assert found.result is Result.CONVERGED
    assert relative_error(found.value, torch.from_numpy(expected)) <= 1e-10
    assert abs(found.stats["num_steps"] - iterations) <= 1


@pytest.mark.parametrize(
    ("settings", "name"), [({"rtol": -1e-3}, "rtol"), ({"atol": -1.0}, "atol"), ({"max_steps": 0}, "max_steps")]
)
def test_bad_settings_name_the_argument(settings, name):
    with pytest.raises(ValueError, match=f"{name} is"):
        CG(**settings)
