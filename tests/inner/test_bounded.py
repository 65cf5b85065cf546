"""Bounds of `LBFGS` and `ScipyMinimize`: against SciPy and closed forms, derivatives on the active set."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import scipy.optimize
import torch

import bilevel as bl
from bilevel import LBFGS, Result, ScipyMinimize
from tests.conformance import check_inner_solver, randn, relative_error, spd
from tests.inner.test_solvers import rosenbrock

WIDE = (-1e3, None)
BOUNDED = [lambda bounds: LBFGS(bounds=bounds), lambda bounds: ScipyMinimize(bounds=bounds)]
IDS = ["LBFGS", "L-BFGS-B"]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("solver", [LBFGS(bounds=WIDE), ScipyMinimize(bounds=WIDE, gtol=1e-7)], ids=repr)
def test_conforms_where_no_bound_is_met(solver):
    check_inner_solver(solver)


def box_minimum(A, b, low, high):
    """The minimum of ``y A y / 2 - b y`` in float64, by enumerating the active sets of three params."""
    best = None
    for code in range(27):
        sides = [code // 3**i % 3 for i in range(3)]
        y = torch.where(
            tensor([s == 1 for s in sides]) > 0, low, torch.where(tensor([s == 2 for s in sides]) > 0, high, 0.0)
        )
        free = [i for i in range(3) if sides[i] == 0]
        if free:
            held = [i for i in range(3) if sides[i]]
            right = b[free] - (A[free][:, held] @ y[held] if held else 0)
            y[free] = torch.linalg.solve(A[free][:, free], right)
        value = y @ A @ y / 2 - b @ y
        if ((y >= low - 1e-12) & (y <= high + 1e-12)).all() and (best is None or value < best[0]):
            best = (value, y)
    return best[1]


@pytest.mark.parametrize("make", BOUNDED, ids=IDS)
def test_a_batch_of_quadratics_and_their_derivatives(make):
    """Forty quadratics, with bounds that are hyperparameters; by differences of the closed form."""
    A, b = spd(3, batch=(40,)), (3 * randn(40, 3)).requires_grad_()
    low, high = tensor([-0.5, -1.0, 0.1]).requires_grad_(), tensor([0.5, 0.4, 0.8]).requires_grad_()
    weights = randn(40, 3)

    def objective(y):
        return torch.einsum("ti,tij,tj->t", y, A, y) / 2 - (b * y).sum(-1)

    fit = bl.argmin(objective, torch.zeros(40, 3, dtype=torch.float64), solver=make((low, high)), throw="raise")
    truth = torch.stack([box_minimum(A[t], b[t].detach(), low.detach(), high.detach()) for t in range(40)])
    torch.testing.assert_close(fit.value.detach(), truth, rtol=0, atol=1e-7)
    grads = torch.autograd.grad((weights * fit.value).sum(), (b, low, high))

    def outer(b, low, high):
        return sum(weights[t] @ box_minimum(A[t], b[t], low, high) for t in range(40))

    point, h = [x.detach() for x in (b, low, high)], 1e-6
    for index, grad in enumerate(grads):
        direction = randn(*grad.shape, seed=index)
        sides = [outer(*[x + s * h * direction if i == index else x for i, x in enumerate(point)]) for s in (-1, 1)]
        assert (grad * direction).sum().item() == pytest.approx(((sides[1] - sides[0]) / (2 * h)).item(), rel=1e-6)


@pytest.mark.parametrize("method", ["L-BFGS-B", "TNC", "SLSQP", "Powell"])
def test_scipys_methods_with_bounds(method):
    """A bound that holds, one that does not, and the slope of what is free."""
    x = tensor([2.0, 0.3]).requires_grad_()
    solver = ScipyMinimize(method, gtol=1e-4, bounds=(0.0, 1.0))
    fit = bl.argmin(lambda y: (y - x).square().sum() + y.prod(), tensor([0.5, 0.5]), solver=solver, throw="raise")
    torch.testing.assert_close(fit.value.detach(), tensor([1.0, 0.0]), rtol=0, atol=1e-6)
    fit = bl.argmin(lambda y: (y - x).square().sum() + 0.1 * y.prod(), tensor([0.5, 0.5]), solver=solver, throw="raise")
    torch.testing.assert_close(fit.value.detach(), tensor([1.0, 0.25]), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(fit.value.sum(), x)[0], tensor([0.0, 1.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [2, 30])
def test_a_valley_with_a_wall(size):
    """Rosenbrock's function, not convex, where the wall is in the way of its minimum."""
    start = torch.linspace(-1.2, 0.5, size, dtype=torch.float64)
    loss = lambda y: (100 * (y[1:] - y[:-1] ** 2) ** 2 + (1 - y[:-1]) ** 2).sum()  # noqa: E731
    fit = bl.argmin(loss, start, solver=LBFGS(bounds=(None, 0.6), max_steps=2000), throw="raise", hypergrad=None)
    theirs = scipy.optimize.minimize(
        lambda x: loss(torch.tensor(x)).item(),
        fit.value.numpy(),
        jac=lambda x: torch.func.grad(loss)(torch.tensor(x)).numpy(),
        bounds=[(None, 0.6)] * size,
        method="L-BFGS-B",
        options={"ftol": 0, "gtol": 1e-10, "maxiter": 10000},
    )
    np.testing.assert_allclose(fit.value.numpy(), theirs.x, atol=1e-6)
    assert fit.value.max() == 0.6


def test_many_params_most_of_them_at_their_bounds():
    """Nonnegative least squares of 300 badly scaled unknowns."""
    A = randn(400, 300) * torch.logspace(0, 1, 300, dtype=torch.float64)
    b = randn(400)
    fit = bl.argmin(lambda y: (A @ y - b).square().sum(), torch.ones(300, dtype=torch.float64) / 100,
                    solver=LBFGS(bounds=(0.0, None), max_steps=5000), throw="raise", hypergrad=None)  # fmt: skip
    theirs = scipy.optimize.nnls(A.numpy(), b.numpy(), maxiter=10000)[0]
    scales = np.logspace(0, 1, 300)
    np.testing.assert_allclose(fit.value.numpy() * scales, theirs * scales, atol=1e-6)
    assert 50 < (fit.value == 0).sum() < 250


def test_bounds_of_a_tree_reach_each_leaf():
    init = {"w": torch.zeros(2, 3, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float64)}
    solver = LBFGS(bounds=({"w": 0.5, "b": None}, {"w": torch.full((3,), 2.0), "b": tensor([-1.0, 5.0])}))
    target = tensor([[0.1, 1.0, 3.0], [-4.0, 0.7, 2.5]])
    fit = bl.argmin(lambda p: (p["w"] - target).square().sum() + (p["b"] - 2).square().sum(), init, solver=solver)
    torch.testing.assert_close(fit.value["w"], target.clamp(0.5, 2.0))
    torch.testing.assert_close(fit.value["b"], tensor([-1.0, 2.0]))


def test_float32_and_transforms():
    def fit(x):
        return bl.argmin(
            lambda y: (y - x).square().sum() + y.pow(4).sum(), torch.zeros(3), solver=LBFGS(bounds=(0.0, 0.5))
        ).value

    x = torch.tensor([[-1.0, 0.3, 4.0], [0.2, -2.0, 0.6]])
    values = torch.vmap(fit)(x)
    torch.testing.assert_close(values, torch.stack([fit(one) for one in x]), rtol=1e-3, atol=1e-5)
    slopes = torch.vmap(torch.func.jacrev(fit))(x)
    inner = (values > 0) & (values < 0.5)
    truth = torch.where(inner, 2 / (2 + 12 * values**2), torch.zeros_like(values))
    torch.testing.assert_close(slopes, torch.diag_embed(truth), rtol=1e-3, atol=1e-4)


def test_saddles_and_losses_without_end_are_told():
    """``y0`` is held by its bound, and ``y1`` sits at a maximum."""
    loss = lambda y: y[0] - y[1].square() + y[1].pow(4)  # noqa: E731
    with pytest.warns(bl.SolveWarning, match="curvature"):
        fit = bl.argmin(loss, tensor([0.0, 0.0]), solver=LBFGS(bounds=(0.0, 3.0)))
    assert fit.result is Result.MAX_STEPS or fit.result is Result.NEGATIVE_CURVATURE
    held = bl.argmin(lambda y: y[0] - y[0] ** 2 / 4, tensor([0.0]), solver=LBFGS(bounds=(0.0, 1.0)), throw="raise")
    assert held.value.item() == 0  # concave, and a minimum all the same
    with pytest.warns(bl.SolveWarning, match="still falls"):
        fit = bl.argmin(lambda y: -y.sum(), tensor([1.0, 2.0]), solver=LBFGS(bounds=(0.0, None)))
    assert fit.result is Result.UNBOUNDED


SHIFTED = tensor([[2.0, -3.0, 0.4], [0.0, 0.3, 0.2]])
STIFF = tensor([1.0, 5.0, 20.0])


def shifted(y):
    """At most 1, its first minimum is at ``(1, -1, 0.4)``; the second is inside."""
    return (STIFF * (y - SHIFTED).square()).sum(-1) + 0.1 * (y - SHIFTED).pow(4).sum(-1)


@pytest.mark.parametrize("gtol", [1e-6, 1e-2, None])
def test_a_tolerance_is_for_the_gradient_of_the_free(gtol):
    solver = LBFGS(bounds=(-1.0, 1.0), gtol=gtol)
    fit = bl.argmin(shifted, torch.zeros(2, 3, dtype=torch.float64), solver=solver, throw="raise", hypergrad=None)
    torch.testing.assert_close(fit.value, SHIFTED.clamp(-1, 1), rtol=0, atol=1e-6 if gtol is None else gtol)
    assert fit.value[0, :2].tolist() == [1.0, -1.0]
    assert fit.stats["result"].tolist() == [int(Result.CONVERGED)] * 2
    assert ("step_norm" in fit.stats) == (gtol is None)
    again = bl.argmin(shifted, fit.value, solver=solver, throw="raise", hypergrad=None)
    assert bool((again.stats["num_steps"] <= (0 if gtol else 1)).all())


@pytest.mark.parametrize("gtol", [1e-9, None])
def test_the_limit_of_steps_within_bounds_holds(gtol):
    solver = LBFGS(bounds=(-1.0, 1.0), gtol=gtol, max_steps=2)
    fit = bl.argmin(shifted, torch.zeros(2, 3, dtype=torch.float64), solver=solver, throw="ignore")
    assert fit.stats["num_steps"].tolist() == [2, 2]
    assert fit.stats["result"].tolist() == [int(Result.MAX_STEPS)] * 2


@pytest.mark.parametrize("make", [LBFGS, functools.partial(ScipyMinimize, "L-BFGS-B")], ids=IDS)
@pytest.mark.parametrize("gtol", [1e-6, None])
def test_each_step_within_bounds_is_told_and_may_be_the_last(make, gtol):
    """The losses fall, the params stay inside, and the norm is that of the slope of what is free."""
    seen: list[bl.InnerStep] = []
    solver = make(bounds=(-1.0, 1.0), gtol=gtol, callback=seen.append)
    start = torch.zeros(2, 3, dtype=torch.float64)
    fit = bl.argmin(shifted, start, solver=solver, throw="raise", hypergrad=None)
    assert [one.step for one in seen] == list(range(len(seen)))
    assert len(seen) == int(fit.stats["num_steps"].max()) + 1
    for one in seen:
        assert bool((one.params.abs() <= 1).all())
        g = torch.func.grad(lambda y: shifted(y).sum())(one.params)
        free = torch.where((one.params >= 1) & (g < 0) | (one.params <= -1) & (g > 0), 0.0, g)
        torch.testing.assert_close(one.residual_norm, free.norm(dim=-1), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(one.loss, shifted(one.params))
    assert bool((seen[-1].loss < seen[0].loss).all())
    assert seen[-1].last or make is not LBFGS
    stopped = make(bounds=(-1.0, 1.0), gtol=gtol, callback=lambda one: one.step == 1)
    fit = bl.argmin(shifted, start, solver=stopped, hypergrad=None)
    assert fit.result is Result.STEPS_DONE
    assert int(fit.stats["num_steps"].max()) == 1


def test_a_start_outside_is_moved_inside():
    fit = bl.argmin(rosenbrock, tensor([[5.0, -7.0]]), solver=LBFGS(bounds=(-0.5, 0.5)), throw="raise")
    assert relative_error(fit.value, tensor([[0.5, 0.25]])) < 1e-6


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ((1.0, 0.0), "empty"),
        (0.5, "pair"),
        ((torch.zeros(3), None), "broadcast"),
        (({"a": 0.0}, None), "structure"),
        (([0.0, 0.0], None), "write a vector as a tensor"),
        ((np.zeros(3), None), "broadcast"),
        (("0", None), "lower bound is '0'"),
        ((None, np.array(["1", "2"])), "upper bound is of <U1"),
        ((None, torch.tensor(1j)), "upper bound is of torch.complex64"),
        ((math.inf, None), "empty"),
        ((None, torch.tensor([1.0, -math.inf])), "empty"),
        ((math.nan, None), "empty"),
    ],
)
def test_bad_bounds(bounds, words):
    with pytest.raises((ValueError, TypeError), match=words):
        bl.argmin(lambda y: y.square().sum(), torch.ones(2), solver=LBFGS(bounds=bounds))


@pytest.mark.parametrize("low", [np.array([1.0, -3.0]), np.array([1, -3]), np.float32([1, -3])], ids=repr)
def test_bounds_may_be_arrays_of_numpy(low):
    for solver in (LBFGS(bounds=(low, np.array(5.0))), ScipyMinimize(bounds=(low, np.float64(5.0)))):
        fit = bl.argmin(lambda y: y.square().sum(), tensor([2.0, 2.0]), solver=solver, throw="raise")
        torch.testing.assert_close(fit.value, tensor([1.0, 0.0]), rtol=0, atol=1e-7)


def test_scipy_methods_without_bounds_say_so():
    with pytest.raises(ValueError, match="no bounds"):
        ScipyMinimize("BFGS", bounds=(0.0, None))
