"""Which linear solver the default is, and what the fallback of an adjoint solve keeps."""

from __future__ import annotations

import pytest
import torch

import bilevel as bl
from bilevel.hypergrad.implicit import _merge
from bilevel.solution import Result, Solution

DAMPED, FAILED, SOLVED = Result.DAMPED, Result.MAX_STEPS, Result.CONVERGED


def solutions(result, residual, length):
    """Of one problem in a batch of one: a vector of that length."""
    stats = {"result": torch.tensor([int(result)], dtype=torch.int8), "relative_residual": torch.tensor([residual])}
    return Solution(length * torch.tensor([[0.6, 0.8]]).double(), stats)


@pytest.mark.parametrize(
    ("old", "new", "taken"),
    [
        ((SOLVED, 1e-3, 1.0), (SOLVED, 1e-9, 1.0), False),  # it was solved
        ((FAILED, 0.5, 1.0), (FAILED, 0.1, 9.0), True),
        ((FAILED, 0.1, 1.0), (FAILED, 0.5, 0.1), False),
        ((FAILED, 0.1, 1.0), (SOLVED, 0.2, 1.0), True),
        ((FAILED, 0.5, 10.0), (DAMPED, 0.52, 4.0), True),  # as much, with less
        ((FAILED, 0.5, 0.3), (DAMPED, 0.52, 0.1), True),
        ((FAILED, 0.5, 10.0), (DAMPED, 0.52, 6.0), False),
        ((FAILED, 0.5, 0.3), (DAMPED, 0.52, 0.19), False),
        ((FAILED, 0.5, 10.0), (DAMPED, 0.6, 4.0), False),
        ((FAILED, torch.nan, 1.0), (DAMPED, 0.9, 1.0), True),
        ((FAILED, 0.5, 1.0), (FAILED, torch.nan, 0.1), False),
    ],
)
def test_of_two_answers_the_better_one_is_kept(old, new, taken):
    merged = _merge(solutions(*old), solutions(*new), ("MINRES",))
    result, residual, length = new if taken else old
    assert merged.recovered == ("MINRES",)
    assert merged.result is result
    assert merged.stats["relative_residual"].item() == pytest.approx(residual, nan_ok=True)
    assert merged.value.norm().item() == pytest.approx(length)


@pytest.mark.parametrize("signs", [(1.0, 1.0, 1.0), (1.0, -1.0, 1.0), (-1.0, -1.0, -1.0)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_system_may_be_indefinite(symmetric, signs):
    """``A y = x``: a root is no minimum, so that its symmetric systems are for MINRES, others for GMRES."""
    A = torch.diag(torch.tensor(signs).double() * torch.tensor([2.0, 1.0, 3.0]))
    A[0, 1] = A[1, 0] = 0.5
    A[0, 2] = 0.5 if not symmetric else 0.0
    x, c = torch.ones(3, dtype=torch.float64, requires_grad=True), torch.tensor([1.0, 2.0, -1.0]).double()
    start = torch.zeros(3, dtype=torch.float64)
    fit = bl.root(lambda y: A @ y - x, start, symmetric=symmetric, throw="raise")
    (found,) = torch.autograd.grad(fit.value @ c, x)
    torch.testing.assert_close(found, torch.linalg.solve(A.mT, c), rtol=1e-6, atol=1e-8)
