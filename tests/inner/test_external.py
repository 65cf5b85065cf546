"""A black box as inner solver: another library's optimizer, and a search that knows no gradient."""

from __future__ import annotations

import pytest
import scipy.optimize
import torch

import bilevel as bl
from bilevel.problems import Ridge
from tests.conformance import check_inner_solver, relative_error


def by_scipy(loss, start):
    """A library that takes and returns arrays."""
    found = scipy.optimize.minimize(
        lambda y: float(loss(torch.from_numpy(y).view_as(start)).sum()),
        start.flatten().numpy(),
        method="COBYQA",
        options={"final_tr_radius": 1e-7, "maxfev": 100000},
    )
    return torch.from_numpy(found.x).view_as(start)


def grid(loss, start):
    """An exhaustive search over a dict of one number."""
    points = torch.linspace(-2, 2, 81, dtype=torch.float64)
    values = torch.stack([loss({"w": point}) for point in points])
    return {"w": points[values.argmin()]}


def test_conforms():
    check_inner_solver(bl.External(by_scipy, gtol=1e-4), tolerance=1e-4)


def test_implicit_differentiation_of_a_black_box():
    problem = Ridge(num_features=4)
    x = problem.hparams.clone().requires_grad_()
    fit = bl.argmin(problem.inner, problem.init, x, solver=bl.External(by_scipy))
    (grad,) = torch.autograd.grad(problem.outer(fit.value, x), x)
    assert relative_error(grad, problem.hypergradient(x)) <= 1e-4
    assert fit.result is bl.Result.STEPS_DONE


def test_evolution_strategies_ask_the_black_box_again():
    """A grid's answers are steps; smoothed by noise as wide as the steps, they have a slope."""
    x = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    start = {"w": torch.zeros((), dtype=torch.float64)}
    hypergrad = bl.EvolutionStrategies(num_samples=60, sigma=0.2)
    fit = bl.argmin(lambda p: (p["w"] - 2 * x).square(), start, solver=bl.External(grid), hypergrad=hypergrad)
    (grad,) = torch.autograd.grad(fit.value["w"], x)
    assert grad.item() == pytest.approx(2.0, rel=0.3)


def test_outcomes_and_bad_input():
    start = torch.ones(2, dtype=torch.float64)
    with pytest.warns(bl.SolveWarning, match="inner solve"):
        bl.argmin(lambda y: y.square().sum(), start, solver=bl.External(lambda loss, y: y, gtol=1e-3))
    with pytest.raises(TypeError, match="not a tree like init"):
        bl.argmin(lambda y: y.square().sum(), start, solver=bl.External(lambda loss, y: y[:1]))
    with pytest.raises(TypeError, match="solve is 3"):
        bl.External(3)


def by_autograd(loss, start):
    """Another library's optimizer."""
    point = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([point], lr=0.2)
    for _ in range(200):
        optimizer.zero_grad()
        loss(point).sum().backward()
        optimizer.step()
    return point


def by_functions(loss, start):
    """One's own optimizer: Newton's method."""
    hessian = torch.func.hessian(lambda y: loss(y).sum())(start).reshape(start.numel(), start.numel())
    grad = torch.func.grad(lambda y: loss(y).sum())(start)
    return start - torch.linalg.solve(hessian, grad.flatten()).view_as(start)


class Doubled(torch.autograd.Function):
    """Out of sight of what looks at operations."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output): ...

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@pytest.mark.parametrize("solve", [by_autograd, by_functions])
@pytest.mark.parametrize("hypergrad", [bl.Implicit(), None])
@pytest.mark.parametrize("given", ["captured", "args", "hidden"])
def test_the_loss_is_differentiable_by_the_params_alone(solve, hypergrad, given):
    c, init = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def objective(y, x=x):
        weight = Doubled.apply(x) / 2 if given == "hidden" else x
        return (y - c).square().sum() + weight * y.square().sum()

    args = () if given == "captured" else (x,)
    fit = bl.argmin(objective, init, *args, solver=bl.External(solve), hypergrad=hypergrad)
    assert relative_error(fit.value, c / 1.5) < 1e-12
    assert x.grad is None
    if hypergrad is not None:
        (grad,) = torch.autograd.grad(fit.value.square().sum(), x)
        assert grad.item() == pytest.approx(-2 * 5.0 / 1.5**3)


def test_many_problems_under_a_transform():
    c = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)

    def solution(x):
        solver = bl.External(by_functions)
        return bl.argmin(
            lambda y: (y - c).square().sum(-1) + x * y.square().sum(-1), torch.zeros_like(c), solver=solver
        ).value

    x = torch.tensor([0.5, 1.0], dtype=torch.float64)
    found = torch.vmap(torch.func.jacrev(solution))(x)
    assert relative_error(found, -c / (1 + x[:, None, None]).square()) < 1e-10
