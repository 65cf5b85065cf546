"""What a failed adjoint solve advises: never the solver in use, always what it saw."""

from __future__ import annotations

import pytest
import torch

import bilevel as bl


def told(hypergrad: bl.Implicit, curvature: torch.Tensor) -> str:
    """The warning of the backward pass through ``argmin 1/2 sum curvature (y - x)^2``, begun near its solution."""
    x = torch.linspace(1, 2, len(curvature)).requires_grad_()
    fit = bl.argmin(
        lambda y: (curvature * (y - x).square()).sum() / 2,
        x.detach() + 1e-3,  # beside it: of a start that is stationary the inner solve would tell
        solver=bl.GradientDescent(1e-9, 1),
        hypergrad=hypergrad,
    )
    with pytest.warns(bl.SolveWarning, match="adjoint solve") as heard:
        fit.value.square().sum().backward()
    return str(heard[0].message)


ILL, INDEFINITE = torch.logspace(0, 4, 30), torch.tensor([-2.0, 1.0, 3.0])


def test_negative_curvature_proposes_gauss_newton_and_says_what_was_seen():
    message = told(bl.Implicit(), INDEFINITE)
    assert "operator=GaussNewton.of(module, loss)" in message
    assert "curvatures from -" in message


def test_a_valley_without_curvature_is_no_missing_minimum():
    torch.manual_seed(0)
    wide, b = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, dtype=torch.float64, requires_grad=True)
    fit = bl.argmin(lambda y: (wide @ y - b).square().sum(), torch.zeros(6, dtype=torch.float64))
    with pytest.warns(bl.SolveWarning, match="no single point"):
        torch.autograd.grad(fit.value @ torch.arange(6.0).double(), b)
    for linear in (bl.MINRES(), bl.LeastNorm()):  # of what does not depend on where it lies
        fit = bl.argmin(lambda y: (wide @ y - b).square().sum(), torch.zeros(6).double(), hypergrad=bl.Implicit(linear))
        (grad,) = torch.autograd.grad((wide @ fit.value).sum(), b)
        torch.testing.assert_close(grad, torch.ones(3).double())


def test_a_matrix_that_cannot_be_factorised_is_said_to_be_singular():
    times, data = torch.linspace(0, 1, 9).double(), torch.linspace(0, 1, 9).double().requires_grad_()

    def fit(hypergrad):
        return bl.least_squares(
            lambda y: (y[0] + y[1]) * times - data, torch.zeros(2).double(), hypergrad=bl.Implicit(hypergrad)
        )

    with pytest.warns(bl.SolveWarning, match="singular.*LeastNorm"):
        fit(None).value.sum().backward()
    (grad,) = torch.autograd.grad(fit(bl.LeastNorm()).value.sum(), data)
    torch.testing.assert_close(grad, times / (times @ times))


def test_an_answer_that_is_doubted_may_be_that_of_a_kink():
    x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    with pytest.warns(bl.SolveWarning, match="inner solve.*kink"):
        fit = bl.argmin(lambda y: (y - x).square() / 2 + y.abs(), torch.tensor(0.3, dtype=torch.float64))
    with pytest.warns(bl.SolveWarning, match="kink.*ProximalGradient"):
        fit.value.backward()


@pytest.mark.parametrize(
    ("linear", "advice"),
    [
        (bl.CG(rtol=1e-6, max_steps=2), "raise max_steps (now 2), loosen rtol (now 1e-06), or give CG a precond"),
        (bl.MINRES(rtol=1e-6, max_steps=2), "or add a penalty on the params"),
        (bl.Neumann(rtol=1e-6, max_steps=2), "or take CG()"),
    ],
)
def test_it_knows_the_solver_in_use(linear, advice):
    message = told(bl.Implicit(linear), ILL)
    assert advice in message
    assert f"take {type(linear).__name__}" not in message
    assert "relative residual norm" in message
