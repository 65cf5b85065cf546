"""What is particular to BiCGSTAB: its restarts."""

from __future__ import annotations

import torch

from bilevel.linalg.bicgstab import BiCGSTAB
from bilevel.linalg.operator import Dense
from tests.conformance import randn, relative_error


def test_a_restart_has_the_steps_that_are_left():
    """Near a cyclic shift the recurrence drifts away from the residual, for some right-hand sides at step 25 of 44."""
    matrix = torch.eye(12, dtype=torch.float64).roll(1, 0) + torch.linspace(0.3, 0.6, 12, dtype=torch.float64).diag()
    b = torch.stack([randn(12, seed=seed) for seed in range(6)])
    for right in (b, b[1]):
        found = BiCGSTAB(rtol=1e-10).solve(Dense(matrix.expand(*right.shape[:-1], 12, 12), symmetric=False), right)
        assert found.result.ok
        assert relative_error(found.value @ matrix.mT, right) <= 1e-9
