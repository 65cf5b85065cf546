from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings

from bilevel import CG, Jacobi, Result
from bilevel.linalg.operator import Dense, Operator
from tests.conformance import check_linear_solver, randn, relative_error, spd


def test_conforms():
    check_linear_solver(CG())
    check_linear_solver(CG(rtol=1e-9, preconditioner=Jacobi()))


def test_two_times_identity_is_one_step():
    """hypertorch and BOAT return the iterate before the converged one: 0."""
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
    """||e_k||_A <= 2 ((sqrt c - 1) / (sqrt c + 1))^k ||e_0||_A; moskomule's update never gets there."""
    matrix, b = spd(size, 10**log_condition, seed=seed), randn(size, seed=seed + 1)
    truth = torch.linalg.solve(matrix, b)
    found = CG(max_steps=steps).solve(Dense(matrix), b)
    error = found.value - truth
    root = math.sqrt(10**log_condition)
    bound = 2 * ((root - 1) / (root + 1)) ** steps
    assert (error @ matrix @ error).sqrt() <= (bound + 1e-9) * (truth @ matrix @ truth).sqrt()


def test_finite_termination():
    matrix, b = spd(50, 10.0), randn(50)
    solution = CG(rtol=1e-10).solve(Dense(matrix), b)
    assert solution.result is Result.CONVERGED
    assert solution.stats["num_steps"] <= 50


@pytest.mark.parametrize("b", [(1.0, 1.0), (1.0, 2.0), (2.0, 1.0)])
def test_saddle_is_negative_curvature(b):
    """SciPy's cg reports success at the saddle of diag(1, -1), or returns NaN."""
    matrix = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    solution = CG(rtol=1e-10).solve(Dense(matrix), torch.tensor(b, dtype=torch.float64))
    assert solution.result is Result.NEGATIVE_CURVATURE
    assert torch.isfinite(solution.value).all()


def test_singular_consistent_gives_the_minimum_norm_solution():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    solution = CG(rtol=1e-10).solve(Dense(matrix), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    assert solution.result is Result.CONVERGED
    torch.testing.assert_close(solution.value, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))


def test_singular_inconsistent_is_never_converged():
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
    solution = CG(max_steps=3).solve(Dense(spd(30, 1e4)), randn(30))
    assert solution.result is Result.STEPS_DONE
    assert solution.stats["num_steps"] == 3
    assert solution.stats["residual_norm"] > 0.01


def test_hilbert_residual_is_the_true_one():
    """Condition 1e13: the recurrence drifts away from the residual; the report must not."""
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


def test_batch_equals_alone_and_frozen_problems_do_not_move():
    matrices = torch.stack([spd(20, 10.0**k, seed=k) for k in range(4)])
    b = randn(4, 20)
    together = CG(rtol=1e-9).solve(Dense(matrices), b)
    for task in range(4):
        alone = CG(rtol=1e-9).solve(Dense(matrices[task]), b[task])
        assert alone.stats["num_steps"] == together.stats["num_steps"][task]
        # Rounding differs between one product and a batched one, and the condition number amplifies it.
        assert relative_error(together.value[task], alone.value) <= 1e-12 * 10.0 ** (task + 1)


def test_one_poisoned_problem_leaves_the_others_bit_identical():
    matrices, b = spd(20, 1e3, batch=(3,)), randn(3, 20)
    clean = CG(rtol=1e-9).solve(Dense(matrices), b)
    b[1, 3] = torch.nan
    poisoned = CG(rtol=1e-9).solve(Dense(matrices), b)
    assert poisoned.stats["result"].tolist() == [0, int(Result.NONFINITE), 0]
    assert torch.equal(poisoned.value[[0, 2]], clean.value[[0, 2]])


def test_nan_in_a_product_stops_at_once():
    class Broken(Operator):
        products = 0

        def matvec(self, v):
            self.products += 1
            return v * torch.nan

    broken = Broken((), 4, torch.float64, torch.device("cpu"))
    solution = CG(max_steps=50).solve(broken, randn(4))
    assert solution.result is Result.NONFINITE
    assert broken.products == 1


def test_preconditioner_halves_the_steps_and_not_the_answer():
    scales = torch.logspace(0, 2, 40, dtype=torch.float64)
    matrix = scales.sqrt().unsqueeze(-1) * spd(40, 4.0) * scales.sqrt()
    b = randn(40)
    plain = CG(rtol=1e-10).solve(Dense(matrix), b)
    helped = CG(rtol=1e-10, preconditioner=Jacobi(num_probes=40)).solve(Dense(matrix), b)
    assert helped.result is Result.CONVERGED
    assert relative_error(helped.value, plain.value) <= 1e-8
    assert helped.stats["num_steps"] <= 0.5 * plain.stats["num_steps"]


@pytest.mark.parametrize(
    ("settings", "name"), [({"rtol": -1e-3}, "rtol"), ({"atol": -1.0}, "atol"), ({"max_steps": 0}, "max_steps")]
)
def test_bad_settings_name_the_argument(settings, name):
    with pytest.raises(ValueError, match=f"{name} is"):
        CG(**settings)
