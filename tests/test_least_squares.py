"""`least_squares`: the certified values of NIST, the losses of SciPy, derivatives against differences of the fits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import torch

import bilevel as bl
from bilevel import GaussNewtonCG, LevenbergMarquardt, Result
from bilevel.least_squares import LOSSES
from tests.conformance import randn, relative_error
from tests.nist import PROBLEMS

CASES = [(name, start) for name in PROBLEMS for start in (0, 1)]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("name", "start"), CASES)
def test_certified_values_from_both_starts(name, start):
    problem = PROBLEMS[name]
    x, y = tensor(problem.x), tensor(problem.y)
    fit = bl.least_squares(lambda b: problem.model(b, x) - y, tensor(problem.starts[start]), throw="raise")
    torch.testing.assert_close(fit.value, tensor(problem.certified), rtol=1e-6, atol=0)
    assert 2 * float(fit.stats["loss"]) == pytest.approx(problem.squares, rel=1e-6)


@pytest.mark.parametrize("name", ["Misra1a", "Thurber", "MGH09", "Eckerle4", "Rat43", "DanWood"])
def test_derivative_towards_the_data_is_that_of_the_fits(name, recwarn):
    """Five-point differences of fits that start at the solution, in steps of some thousandths of the data."""
    problem = PROBLEMS[name]
    x, y = tensor(problem.x), tensor(problem.y).requires_grad_()
    direction = randn(len(x)) * y.detach()

    def fitted(y, start):
        return bl.least_squares(lambda b: problem.model(b, x) - y, start, throw="raise")

    fit = fitted(y, tensor(problem.starts[1]))
    rows = [torch.autograd.grad(value, y, retain_graph=True)[0] for value in fit.value]
    slopes = torch.stack(rows) @ direction
    assert fit.adjoint.result is Result.CONVERGED
    h, start = 4e-3, fit.value.detach()
    ahead = [fitted(y.detach() + k * h * direction, start).value for k in (-2, -1, 1, 2)]
    difference = (ahead[0] - 8 * ahead[1] + 8 * ahead[2] - ahead[3]) / (12 * h)
    assert ((slopes - difference).abs() <= 1e-5 * (slopes.abs() + start.abs())).all()
    cost = lambda b, y: (problem.model(b, x) - y).square().sum() / 2  # noqa: E731
    hessian = torch.func.hessian(cost)(start, y.detach())
    mixed = torch.func.jacfwd(torch.func.grad(cost), argnums=1)(start, y.detach())
    torch.testing.assert_close(torch.stack(rows), -torch.linalg.solve(hessian, mixed), rtol=1e-6, atol=1e-9)
    assert not [warning for warning in recwarn if issubclass(warning.category, bl.SolveWarning)]


def test_gauss_newton_curvature_is_exact_where_the_fit_is_and_biased_elsewhere():
    x, b = torch.linspace(0, 2, 12, dtype=torch.float64), tensor([2.0, 1.3])

    def slope(y, curvature):
        y = y.clone().requires_grad_()
        model = lambda p: p[0] * torch.exp(-p[1] * x) - y  # noqa: E731
        fit = bl.least_squares(model, tensor([1.0, 1.0]), curvature=curvature)
        return torch.autograd.grad(fit.value[1], y)[0]

    exact = b[0] * torch.exp(-b[1] * x)
    torch.testing.assert_close(slope(exact, "gauss_newton"), slope(exact, "full"))
    noisy = exact + 0.3 * randn(12)
    assert 1e-3 < relative_error(slope(noisy, "gauss_newton"), slope(noisy, "full")) < 1


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("solver", [None, GaussNewtonCG(), bl.LBFGS()], ids=repr)
def test_losses_are_those_of_scipy(loss, solver):
    """With outliers; and the derivative towards the scale of the loss against a difference."""
    x = torch.linspace(0, 3, 30, dtype=torch.float64)
    y = 2 * torch.exp(-0.8 * x) + 0.05 * randn(30)
    y[::7] += 1.0
    scale = tensor(0.1).requires_grad_()

    def residuals(b):
        return b[0] * torch.exp(-b[1] * x) - y

    def fitted(scale):
        start = tensor([1.8, 0.7])
        return bl.least_squares(residuals, start, loss=loss, loss_scale=scale, solver=solver, throw="raise")

    fit = fitted(scale)
    theirs = scipy.optimize.least_squares(
        lambda b: residuals(torch.tensor(b)).numpy(), fit.value.detach().numpy(), loss=loss, f_scale=0.1, gtol=1e-13
    )
    np.testing.assert_allclose(fit.value.detach().numpy(), theirs.x, rtol=1e-5)
    assert float(fit.stats["loss"]) == pytest.approx(theirs.cost, rel=1e-8)
    if loss != "linear":
        (slope,) = torch.autograd.grad(fit.value[0], scale)
        difference = (fitted(scale.detach() + 1e-4).value[0] - fitted(scale.detach() - 1e-4).value[0]) / 2e-4
        assert slope.item() == pytest.approx(difference.item(), rel=1e-4)


@pytest.mark.parametrize("solver", [LevenbergMarquardt(), GaussNewtonCG()], ids=repr)
def test_a_batch_is_its_fits_one_by_one(solver):
    """Trees, starts of their own, and derivatives that do not mix."""
    x = torch.linspace(0, 2, 15, dtype=torch.float64)
    rates = tensor([0.5, 1.0, 2.0])
    y = (3 * torch.exp(-rates[:, None] * x) + 0.1 * randn(3, 15)).requires_grad_()
    init = {"size": tensor([1.0, 2.0, 3.0]), "rate": tensor([0.1, 1.0, 3.0])}

    def residuals(p, y):
        return {"curve": p["size"][..., None] * torch.exp(-p["rate"][..., None] * x) - y, "prior": 0.1 * p["rate"]}

    fit = bl.least_squares(residuals, init, y, solver=solver, batched=True, throw="raise")
    assert fit.stats["num_steps"].shape == (3,)
    (grad,) = torch.autograd.grad(fit.value["rate"].sum(), y)
    for t in range(3):
        one = y[t].detach().requires_grad_()
        alone = bl.least_squares(residuals, {k: v[t] for k, v in init.items()}, one, solver=solver, throw="raise")
        torch.testing.assert_close(fit.value["rate"][t], alone.value["rate"], rtol=1e-7, atol=0)
        torch.testing.assert_close(grad[t], torch.autograd.grad(alone.value["rate"], one)[0], rtol=1e-6, atol=1e-9)


def test_units_of_the_params_do_not_matter():
    """A time constant in nanoseconds beside an amplitude in millions."""
    t = torch.linspace(0.1e-9, 5e-9, 20, dtype=torch.float64)
    y = (3e6 * torch.exp(-t / 1.5e-9) * (1 + 0.02 * randn(20))).requires_grad_()
    fit = bl.least_squares(lambda p: p[0] * torch.exp(-t / p[1]) - y, tensor([1e6, 5e-9]), throw="raise")
    (grad,) = torch.autograd.grad(fit.value[1], y)
    z = (y.detach() / 1e6).requires_grad_()
    plain = bl.least_squares(lambda p: p[0] * torch.exp(-t * 1e9 / p[1]) - z, tensor([1.0, 5.0]), throw="raise")
    (truth,) = torch.autograd.grad(plain.value[1], z)
    torch.testing.assert_close(fit.value * tensor([1e-6, 1e9]), plain.value, rtol=1e-7, atol=0)
    torch.testing.assert_close(grad * 1e15, truth, rtol=1e-6, atol=0)


def test_float32():
    x = torch.linspace(0, 2, 15)
    fit = bl.least_squares(
        lambda p: p[0] * torch.exp(-p[1] * x) - 2 * torch.exp(-1.5 * x), torch.ones(2), throw="raise"
    )
    torch.testing.assert_close(fit.value, torch.tensor([2.0, 1.5]), rtol=1e-4, atol=0)


def test_transforms_and_second_derivatives():
    x = torch.linspace(0, 1, 6, dtype=torch.float64)
    y = 2 * torch.exp(-x) + 0.1 * randn(6)

    def rate(y):
        return bl.least_squares(lambda p: p[0] * torch.exp(-p[1] * x) - y, tensor([1.5, 0.5])).value[1]

    torch.testing.assert_close(
        torch.func.grad(rate)(y), torch.autograd.grad(rate(z := y.clone().requires_grad_()), z)[0]
    )
    many = torch.stack([y, 1.1 * y + 0.01])
    torch.testing.assert_close(torch.vmap(rate)(many), torch.stack([rate(one) for one in many]))
    assert torch.autograd.gradgradcheck(rate, y.requires_grad_(), atol=1e-4, rtol=1e-3)


def test_a_nested_fit_is_differentiated_through():
    """Variable projection: the amplitudes are fitted inside of the fit of the rates."""
    x = torch.linspace(0, 2, 20, dtype=torch.float64)
    y = 2 * torch.exp(-1.5 * x) + 0.01 * randn(20)

    def projected(rate):
        basis = torch.exp(-rate * x)
        size = bl.least_squares(lambda a: a * basis - y, tensor(1.0)).value
        return size * basis - y

    both = bl.least_squares(lambda p: p[0] * torch.exp(-p[1] * x) - y, tensor([1.0, 1.0]))
    nested = bl.least_squares(projected, tensor(1.0), throw="raise")
    torch.testing.assert_close(nested.value, both.value[1], rtol=1e-6, atol=0)


def test_a_saddle_is_no_fit():
    """``(p^2 - 1)^2`` is stationary at 0, and stays so for every step of Gauss and Newton."""
    with pytest.warns(bl.SolveWarning, match="curvature"):
        fit = bl.least_squares(lambda p: p**2 - 1, tensor([0.0]))
    assert fit.result is Result.NEGATIVE_CURVATURE
    with pytest.warns(bl.SolveWarning, match="curvature"):
        # Moves in one coordinate, and is stationary at a maximum in the other.
        fit = bl.least_squares(lambda p: torch.stack([p[0] - 3, p[1] ** 2 - 1]), tensor([0.0, 0.0]))
    assert fit.result is Result.NEGATIVE_CURVATURE


@pytest.mark.parametrize("solver", [LevenbergMarquardt(), GaussNewtonCG()], ids=repr)
def test_no_minimum_is_told(solver):
    """Falls for ever towards infinity."""
    fit = bl.least_squares(lambda p: 1 / (1 + p.square()), tensor([0.5]), solver=solver, throw="ignore")
    assert fit.result is Result.UNBOUNDED
    y = tensor([1.0, 2.0]).requires_grad_()
    fit = bl.least_squares(lambda p: (p[0] + p[1]) * y.new_ones(2) - y, tensor([0.0, 0.0]), solver=solver)
    with pytest.warns(bl.SolveWarning, match="adjoint"):  # not unique: neither is its derivative
        torch.autograd.grad(fit.value[0], y)


def test_a_limit_on_the_steps_is_told():
    with pytest.warns(bl.SolveWarning, match="step limit"):
        fit = bl.least_squares(lambda p: p.exp() - 100, tensor([0.0]), solver=LevenbergMarquardt(max_steps=2))
    assert fit.result is Result.MAX_STEPS
    good = bl.least_squares(lambda p: p.exp() - 100, tensor([0.0]), solver=LevenbergMarquardt(gtol=1e-6), throw="raise")
    assert good.value.item() == pytest.approx(math.log(100), rel=1e-9)


def test_a_model_that_leaves_its_domain_is_stepped_back():
    y = tensor([0.1, 0.2, 0.4])
    fit = bl.least_squares(lambda p: torch.log(p) - y, tensor([5.0]), throw="raise")
    assert fit.value.item() == pytest.approx(math.exp(y.mean()), rel=1e-9)


def test_many_params_by_products():
    """Beyond what is factorised."""
    A = randn(900, 600) / 60 + torch.eye(900, 600, dtype=torch.float64) / 2
    y = randn(1500).requires_grad_()
    truth = randn(600)
    y = torch.tanh(A @ truth).requires_grad_()
    fit = bl.least_squares(lambda p: torch.tanh(A @ p) - y, torch.zeros_like(truth), solver=GaussNewtonCG())
    assert fit.result is Result.CONVERGED
    torch.testing.assert_close(fit.value, truth, rtol=0, atol=1e-6)
    weights = randn(600)
    (grad,) = torch.autograd.grad(fit.value @ weights, y)  # of an exact fit, by the pseudo-inverse of its Jacobian
    jacobian = (1 - y.detach().square())[:, None] * A
    torch.testing.assert_close(grad, torch.linalg.pinv(jacobian).mT @ weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", [None, GaussNewtonCG(), bl.LBFGS()], ids=repr)
def test_a_scale_for_each_residual(solver):
    """Which multiplied each fit's sum by the scale of another residual, and left fits at their start."""
    X, y = randn(8, 2, seed=1), randn(8, seed=2)
    y[::3] += 4.0
    scale = torch.linspace(0.2, 2.0, 8, dtype=torch.float64).requires_grad_()

    def residuals(b):
        return b @ X.T - y

    settings = {"loss": "soft_l1", "solver": solver, "throw": "raise"}
    fit = bl.least_squares(residuals, tensor([0.0, 0.0]), loss_scale=scale, **settings)

    def cost(b):
        s = scale.detach()
        return (s**2 * 2 * ((1 + (residuals(torch.tensor(b)) / s) ** 2).sqrt() - 1)).sum().item() / 2

    exact = scipy.optimize.minimize(cost, [0.0, 0.0], method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(fit.value.detach().numpy(), exact, atol=1e-5)
    (slope,) = torch.autograd.grad(fit.value[0], scale)
    step = 1e-5 * torch.eye(8, dtype=torch.float64)[3]
    ends = [
        bl.least_squares(residuals, tensor([0.0, 0.0]), loss_scale=scale.detach() + way * step, **settings).value[0]
        for way in (1, -1)
    ]
    assert slope[3].item() == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-4)
    fits = torch.zeros(3, 2, dtype=torch.float64)
    of_fits = tensor([0.1, 0.5, 2.0])
    together = bl.least_squares(residuals, fits, loss_scale=of_fits[:, None], batched=True, **settings)
    for one, size in zip(together.value, of_fits, strict=True):
        alone = bl.least_squares(residuals, fits[0], loss_scale=size, **settings).value
        torch.testing.assert_close(one, alone, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"loss": "l2"}, ValueError, "soft_l1"),
        ({"loss_scale": 0.0}, ValueError, "positive"),
        ({"loss_scale": tensor(-1.0)}, ValueError, "positive"),
        ({"loss_scale": "a"}, TypeError, "loss_scale is 'a'"),
        ({"loss_scale": tensor([1.0, 2.0]), "loss": "huber"}, ValueError, r"loss_scale has shape \(2,\)"),
        ({"curvature": "half"}, ValueError, "gauss_newton"),
        ({"hypergrad": bl.Unroll()}, NotImplementedError, "argmin"),
        ({"solver": bl.Newton()}, TypeError, "it solves systems"),
        ({"residuals": lambda p: None}, ValueError, "no tensors"),
        ({"residuals": 3}, TypeError, "residuals is 3"),
    ],
)
def test_bad_input(change, error, words):
    settings = {"residuals": lambda p: p - 1, "init": tensor([0.0]), **change}
    with pytest.raises(error, match=words):
        bl.least_squares(settings.pop("residuals"), settings.pop("init"), **settings)


def test_a_plain_objective_is_none_of_theirs():
    with pytest.raises(TypeError, match=r"bl\.least_squares"):
        bl.argmin(lambda p: p.square().sum(), tensor([1.0]), solver=LevenbergMarquardt())
    for settings in ({"max_steps": 0}, {"radius": 0.0}, {"gtol": -1.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            LevenbergMarquardt(**settings)


@pytest.mark.parametrize(
    ("solver", "value", "slope"),
    [
        (bl.ScipyMinimize(bounds=(0.0, 0.7)), [0.7, 0.1], 0.1),
        (bl.LBFGS(bounds=(0.0, 0.7)), [0.7, 0.1], 0.1),
        (bl.ProximalGradient(bl.prox.L1(0.3)), [1.7, 0.0], 2.0),
        (bl.Steps(bl.SGD(0.1, weight_decay=1.0), 300), [1.0, 0.05], 1.05),
        (bl.TorchOptim(torch.optim.SGD, lr=0.1, weight_decay=1.0, max_steps=300), [1.0, 0.05], 1.05),
    ],
    ids=lambda case: type(case).__name__,
)
def test_bounds_a_prox_and_a_weight_decay_of_the_solver_count(solver, value, slope):
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def residuals(p):
        return p - scale * tensor([2.0, 0.1])

    fit = bl.least_squares(residuals, tensor([0.0, 0.0]), solver=solver)
    torch.testing.assert_close(fit.value.detach(), tensor(value), rtol=1e-6, atol=1e-9)
    (found,) = torch.autograd.grad(fit.value.sum(), scale)
    assert found.item() == pytest.approx(slope, rel=1e-6)
    with pytest.raises(ValueError, match="more than the sum of squares"):
        bl.least_squares(residuals, tensor([0.0, 0.0]), solver=solver, curvature="gauss_newton")


def test_batches_with_bounds():
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    at = torch.tensor([[2.0, 0.1], [1.0, 0.2]], dtype=torch.float64)
    solver = bl.LBFGS(bounds=(0.0, 0.7))
    fit = bl.least_squares(lambda p: p - scale * at, torch.zeros_like(at), solver=solver, batched=True)
    torch.testing.assert_close(fit.value.detach(), at.clamp(max=0.7))
    assert torch.autograd.grad(fit.value.sum(), scale)[0].item() == pytest.approx(0.3)


def test_a_decay_beside_the_gradient_is_told():
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    solver = bl.Steps(bl.AdamW(0.01, weight_decay=0.1), 3)
    with pytest.warns(bl.SolveWarning, match="decays the params beside the gradient"):
        bl.least_squares(lambda p: p - scale, tensor([0.5]), solver=solver)


@pytest.mark.parametrize("hypergrad", [bl.Penalty(), bl.Implicit(operator="func"), bl.FiniteDifference()], ids=repr)
def test_curvature_is_not_passed_over(hypergrad):
    with pytest.raises(ValueError, match="curvature='gauss_newton' is"):
        bl.least_squares(lambda p: p - 1, tensor([0.5]), curvature="gauss_newton", hypergrad=hypergrad)
