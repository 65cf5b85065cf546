"""What is particular to BiCGSTAB: its restarts."""

from __future__ import annotations

import torch

from bilevel.linalg.bicgstab import BiCGSTAB
from bilevel.linalg.operator import Dense
from bilevel.solution import Result
from tests.conformance import randn, relative_error


def test_a_restart_has_the_steps_that_are_left():
    """Near a cyclic shift the recurrence drifts away from the residual, for one right-hand side in fifty or so."""
    matrix = torch.eye(12, dtype=torch.float64).roll(1, 0) + torch.linspace(0.3, 0.6, 12, dtype=torch.float64).diag()
    b = torch.stack([randn(12, seed=seed) for seed in range(400)])
    found = BiCGSTAB(rtol=1e-10).solve(Dense(matrix.expand(400, 12, 12), symmetric=False), b)
    assert found.result is Result.CONVERGED
    assert relative_error(found.value @ matrix.mT, b) <= 1e-9
