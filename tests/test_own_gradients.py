"""Functions that take gradients themselves: physics-informed losses, gradient penalties, forces of an energy."""

from __future__ import annotations

import pytest
import torch

import bilevel as bl
from tests.conformance import Triple, randn, relative_error

F64 = torch.float64
TIMES = torch.linspace(0, 1, 20, dtype=F64)
START = torch.tensor([0.5, 1.2, 0.1], dtype=F64)


def curve(w, t):
    return w[0] * torch.sin(w[1] * t) + w[2] * t


def cloned():
    return TIMES.clone().requires_grad_()


def assigned():
    t = TIMES * 1
    t.requires_grad = True
    return t


def drawn():
    return torch.linspace(0, 1, 20, dtype=F64, requires_grad=True)


def misfit(w, inputs=cloned):
    """Of the slopes of a curve by its input."""
    t = inputs()
    (slope,) = torch.autograd.grad(curve(w, t).sum(), t, create_graph=True)
    return slope - torch.cos(TIMES)


def reference(x):
    """The derivative of the squared norm of the minimum, by slopes in closed form."""

    def objective(w):
        slope = w[0] * w[1] * torch.cos(w[1] * TIMES) + w[2]
        return (slope - torch.cos(TIMES)).square().mean() + x * w.square().sum()

    return torch.autograd.grad(bl.argmin(objective, START, solver=bl.NewtonCG()).value.square().sum(), x)[0]


@pytest.fixture
def x():
    return torch.tensor(0.3, dtype=F64, requires_grad=True)


@pytest.mark.parametrize("inputs", [cloned, assigned, drawn])
@pytest.mark.parametrize(
    ("hypergrad", "tolerance"),
    [(bl.Implicit(), 1e-6), (bl.Implicit(bl.LU()), 1e-6), (bl.Penalty(1e4), 1e-5), (bl.EvolutionStrategies(200), 0.5)],
)
def test_slopes_by_the_input(inputs, hypergrad, tolerance, x):
    fit = bl.argmin(
        lambda w: misfit(w, inputs).square().mean() + x * w.square().sum(),
        START,
        solver=bl.NewtonCG(),
        hypergrad=hypergrad,
    )
    (grad,) = torch.autograd.grad(fit.value.square().sum(), x)
    assert relative_error(grad, reference(x)) < tolerance


@pytest.mark.parametrize("hypergrad", [bl.Unroll(), bl.Unroll(checkpoint=True)])
def test_steps(hypergrad, x):
    solver = bl.GradientDescent(0.3, 1500)
    fit = bl.argmin(
        lambda w: misfit(w).square().mean() + x * w.square().sum(), START, solver=solver, hypergrad=hypergrad
    )
    (grad,) = torch.autograd.grad(fit.value.square().sum(), x)
    assert relative_error(grad, reference(x)) < 1e-6


@pytest.mark.parametrize(
    "solver", [bl.LBFGS(), bl.ScipyMinimize("Powell"), bl.External(lambda loss, w: (loss(w), w)[1])]
)
@pytest.mark.parametrize("hypergrad", [None, bl.FiniteDifference(0.1)])
def test_where_gradients_are_off(solver, hypergrad, x):
    with torch.no_grad():
        fit = bl.argmin(lambda w: misfit(w).square().mean() + x * w.square().sum(), START, solver=solver)
    again = bl.argmin(
        lambda w: misfit(w).square().mean() + x * w.square().sum(), START, solver=solver, hypergrad=hypergrad
    )
    assert torch.equal(fit.value, again.value)


def test_residuals_of_a_fit(x):
    fit = bl.least_squares(
        lambda w: torch.cat([misfit(w) / 20**0.5, x.sqrt() * w]), START, solver=bl.LevenbergMarquardt()
    )
    (grad,) = torch.autograd.grad(fit.value.square().sum(), x)
    assert relative_error(grad, reference(x)) < 1e-6


@pytest.mark.parametrize("hypergrad", [bl.Implicit(), None])
@pytest.mark.parametrize("kind", ["root", "fixed_point", "Picard", "gradient of the params"])
def test_forces_of_an_energy(kind, hypergrad):
    coupling, b = 0.3 * randn(4, 4, seed=0), torch.ones(4, dtype=F64, requires_grad=True)
    coupling = (coupling + coupling.mT) / 2

    def energy(z):
        return z.square().sum() / 2 - torch.log(torch.cosh(coupling @ z + b)).sum()

    def force(z):
        return torch.autograd.grad(energy(z), z, create_graph=True)[0]

    zeros = torch.zeros(4, dtype=F64)
    fit = {
        "root": lambda: bl.root(force, zeros, hypergrad=hypergrad),
        "fixed_point": lambda: bl.fixed_point(lambda z: z - 0.5 * force(z), zeros, hypergrad=hypergrad),
        "Picard": lambda: bl.fixed_point(lambda z: z - 0.5 * force(z), zeros, solver=bl.Picard(), hypergrad=hypergrad),
        "gradient of the params": lambda: bl.argmin(
            lambda z: force(z).square().sum(), zeros, solver=bl.NewtonCG(), hypergrad=hypergrad
        ),
    }[kind]()
    z = fit.value
    exact = bl.argmin(energy, zeros, solver=bl.NewtonCG()).value
    assert relative_error(z, exact) < 1e-6
    if hypergrad is not None:
        found, right = (torch.autograd.grad(value.square().sum(), b)[0] for value in (z, exact))
        assert relative_error(found, right) < 1e-5


def test_hidden_hyperparameters_are_still_told(x):
    """A leaf of the function's own excuses no other."""
    with pytest.raises(ValueError, match="cannot be followed"):
        bl.argmin(lambda w: misfit(w).square().mean() + Triple.apply(x) * w.square().sum(), START)
