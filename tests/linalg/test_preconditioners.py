"""Diagonal preconditioners; that they halve the steps is in test_cg.py and test_minres.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from bilevel.linalg.cg import CG
from bilevel.linalg.nystrom import Nystrom, NystromPreconditioner
from bilevel.linalg.operator import Dense
from bilevel.linalg.preconditioners import AdamPreconditioner, Jacobi
from bilevel.solution import Result
from tests.conformance import randn, relative_error, spd


def test_one_probe_finds_a_diagonal_matrix():
    diagonal, r = torch.tensor([[1.0, 2, 4], [3.0, 5, 7]], dtype=torch.float64), randn(2, 3)
    found = Jacobi(num_probes=1)(Dense(torch.diag_embed(diagonal)))(r)
    torch.testing.assert_close(found, r / diagonal, rtol=1e-14, atol=0)


def test_probes_estimate_the_diagonal():
    """Hutchinson's variance for entry i is the sum of the squares beside it, divided by the probes."""
    matrix, probes = spd(12, 10.0) + torch.eye(12, dtype=torch.float64), 400
    found = 1 / Jacobi(num_probes=probes)(Dense(matrix))(torch.ones(12, dtype=torch.float64))
    off = matrix - torch.diag(matrix.diagonal())
    deviation = off.norm(dim=-1) / probes**0.5
    assert ((found - matrix.diagonal()).abs() <= 5 * deviation).all()


def test_small_and_negative_entries_stay_positive_and_bounded():
    """A preconditioner must be positive definite, whatever the matrix is."""
    matrix = torch.diag(torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))
    inverse = Jacobi(num_probes=1)(Dense(matrix))(torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(inverse, torch.tensor([1.0, 1.0, 1000.0], dtype=torch.float64))


def test_adam_divides_by_the_root_of_the_second_moment():
    v, r = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64), randn(3)
    found = AdamPreconditioner(v, eps=0.1)(Dense(spd(3)))(r)
    torch.testing.assert_close(found, r / torch.tensor([2.1, 1.1, 0.1], dtype=torch.float64))


def test_adam_s_own_state_preconditions():
    """FACTS 17: the gradients of a badly scaled quadratic have the scales of its curvature."""
    scales = torch.logspace(0, 2, 40, dtype=torch.float64).sqrt()
    matrix, b = scales.unsqueeze(-1) * spd(40, 4.0) * scales, randn(40)
    y = torch.nn.Parameter(randn(40, seed=5))
    optimizer = torch.optim.Adam([y], lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        (y @ matrix @ y / 2).backward()
        optimizer.step()
    second_moment = optimizer.state[y]["exp_avg_sq"]
    plain = CG(rtol=1e-10).solve(Dense(matrix), b)
    helped = CG(rtol=1e-10, preconditioner=AdamPreconditioner(second_moment)).solve(Dense(matrix), b)
    assert helped.result is Result.CONVERGED
    assert relative_error(helped.value, plain.value) <= 1e-8
    assert helped.stats["num_steps"] < 0.8 * plain.stats["num_steps"]


def test_a_second_moment_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"second_moment has shape \(4,\).*3 unknowns"):
        AdamPreconditioner(torch.ones(4))(Dense(spd(3)))


def test_bad_settings_name_the_argument():
    with pytest.raises(ValueError, match="num_probes is 0"):
        Jacobi(num_probes=0)
    with pytest.raises(ValueError, match="eps is -1"):
        AdamPreconditioner(torch.ones(3), eps=-1.0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Nystrom(6, damping=1.0), Nystrom(6, damping=1e-9)),
        (Nystrom(2, damping=8.0), Nystrom(6, damping=1e-9)),
        (
            CG(max_steps=1, preconditioner=NystromPreconditioner(1)),
            CG(max_steps=1, preconditioner=NystromPreconditioner(6)),
        ),
        (CG(max_steps=6, preconditioner=Jacobi()), CG(max_steps=1, preconditioner=NystromPreconditioner(6))),
    ],
    ids=range(4),
)
def test_settings_of_an_earlier_solve_do_not_override_those_of_this_one(first, second):
    operator, b = Dense(spd(6)), randn(6)
    state = first.solve(operator, b).state
    cold, warm = second.solve(operator, b), second.solve(operator, b, replace(state, x0=None))
    assert float(cold.stats["relative_residual"]) < 1e-6
    assert float(warm.stats["relative_residual"]) < 1e-6


def test_equal_settings_build_no_second_preconditioner():
    built = []

    @dataclass(frozen=True)
    class Counting:
        rank: int

        def __call__(self, operator):
            built.append(self.rank)
            return lambda r: r

    operator, b = Dense(spd(6)), randn(6)
    state = CG(preconditioner=Counting(1)).solve(operator, b).state
    CG(preconditioner=Counting(1)).solve(operator, randn(6, seed=7), state)
    assert built == [1]
    CG(preconditioner=Counting(2)).solve(operator, randn(6, seed=7), state)
    assert built == [1, 2]


def test_adam_of_other_tensors_is_another_preconditioner():
    operator, b = Dense(spd(6)), randn(6)
    first, second = (CG(preconditioner=AdamPreconditioner(torch.full((6,), size).double())) for size in (1.0, 2.0))
    state = first.solve(operator, b).state
    assert second.solve(operator, b, state).result is Result.CONVERGED
