"""How far a fixed point is: a map that hardly moves its argument has a short residual anywhere."""

from __future__ import annotations

import pytest
import torch

import bilevel as bl
from tests.conformance import relative_error

F32, F64 = torch.float32, torch.float64


@pytest.mark.parametrize(("dtype", "unit"), [(F32, 1e5), (F64, 1e9)])
def test_a_root_in_other_units_is_not_where_the_search_starts(dtype, unit):
    """A pressure of 1.26 bar in Pa, from 1 bar: CONVERGED after no step, 21 % off."""

    def residual(p):
        return (p / unit) ** 3 - 2

    start = torch.tensor([unit], dtype=dtype)
    fit = bl.root(residual, start, solver=bl.Anderson(), throw="raise")
    assert fit.value.item() == pytest.approx(unit * 2 ** (1 / 3), rel=1e-4)
    with pytest.warns(bl.SolveWarning, match="step limit"):
        assert bl.root(residual, start, solver=bl.Picard()).result is bl.Result.MAX_STEPS


def ridge(lr, dtype):
    random = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=random, dtype=F64) for shape in ((200, 5), (5,)))
    matrix, right = x.T @ x / 200, x.T @ (x @ w) / 200

    def step(y, penalty):
        return y - lr * (matrix.to(dtype) @ y - right.to(dtype) + penalty * y)

    def exact(penalty):
        return torch.linalg.solve(matrix + penalty * torch.eye(5, dtype=F64), right)

    return step, exact


@pytest.mark.parametrize("solver", [bl.Anderson(), bl.Picard()], ids=["Anderson", "Picard"])
@pytest.mark.parametrize("before", [1.0, 1.01, 1.05])
@pytest.mark.parametrize(("lr", "dtype"), [(0.5, F32), (1e-3, F32), (1e-4, F32), (5e-5, F32), (0.5, F64), (1e-4, F64)])
def test_gradient_descent_as_a_map_from_the_solution_before(lr, dtype, before, solver):
    """Both passes were CONVERGED, with 2.4 % of the solution and 2.8 % of its derivative missing."""
    step, exact = ridge(lr, dtype)
    penalty = torch.tensor(1.0, dtype=dtype, requires_grad=True)
    fit = bl.fixed_point(step, exact(before).to(dtype), penalty, solver=solver, throw="ignore")
    error = relative_error(fit.value.detach().double(), exact(1.0))
    promised = 1e-3 if dtype is F32 else 1e-6
    assert error < promised or not fit.result.ok
    assert error < 2 * fit.stats["step_norm"] / exact(1.0).norm() + promised
    if before == 1.0 or lr == 0.5:
        assert error < promised


def test_what_hides_the_distance_is_told():
    step, exact = ridge(1e-4, F32)
    with pytest.warns(bl.SolveWarning, match=r"less accurate.*little more than their rounding.*float64"):
        bl.fixed_point(step, exact(1.05).float(), torch.tensor(1.0))
    with torch.no_grad():  # forward only as well
        fit = bl.fixed_point(step, exact(1.05).float(), torch.tensor(1.0), throw="ignore")
    assert fit.result is bl.Result.INACCURATE
    assert fit.stats["step_norm"] > 1e-2 * exact(1.0).norm()


def test_a_map_without_a_derivative_is_solved():
    """It can be seen no closer: its own steps are what tells."""

    def step(y):
        return torch.from_numpy(y.detach().numpy() * 0.5 + 1)

    fit = bl.fixed_point(step, torch.full((3,), 2.0), hypergrad=None, throw="raise")
    torch.testing.assert_close(fit.value, torch.full((3,), 2.0))
    asked = []

    class Short(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y - 1e-4 * (y - 1)

        @staticmethod
        def backward(ctx, grad):
            asked.append(grad)
            raise NotImplementedError("no backward pass")

    fit = bl.fixed_point(Short.apply, torch.full((3,), 1.001), hypergrad=None, throw="raise")
    assert fit.result is bl.Result.CONVERGED
    assert asked  # for the closer look
