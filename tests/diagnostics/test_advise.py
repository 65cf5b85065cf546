"""What `advise` promises, against the true error of what it recommends."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import bilevel as bl
from bilevel.diagnostics import BilevelProblem, advise, check_hypergradient, solve
from bilevel.diagnostics.written import written
from bilevel.problems import Quadratics, Ridge, Singular, collection
from tests.conformance import relative_error


@pytest.mark.parametrize(
    "problem",
    [Ridge(), Ridge(per_feature=True), Quadratics(conditions=(10.0, 1e3)), Quadratics(conditions=(1e4,))],
    ids=["ridge", "per feature", "two quadratics", "ill-conditioned"],
)
@pytest.mark.parametrize("accuracy", [1e-3, 1e-8])
def test_the_advice_keeps_its_promise(problem, accuracy):
    advice = advise(problem, accuracy=accuracy)
    x = problem.hparams.clone().requires_grad_()
    fit = bl.argmin(
        problem.inner, problem.init, x, solver=bl.NewtonCG(gtol=1e-13), hypergrad=advice.hypergrad, throw="ignore"
    )
    (grad,) = torch.autograd.grad(problem.outer(fit.value, x), x)
    assert relative_error(grad, problem.hypergradient(problem.hparams)) <= 10 * advice.predicted_error
    assert advice.hypergrad.linear_solver == advice.candidates[0].linear_solver
    assert written(advice.hypergrad) in str(advice)


def large(spectrum):
    scales = torch.as_tensor(spectrum, dtype=torch.float64)
    return BilevelProblem(
        inner=lambda y, x: (scales * y.square()).sum() / 2 - (x * y).sum(),
        outer=lambda y, x: (y - 1).square().sum(),
        init=torch.zeros(len(scales), dtype=torch.float64),
        hparams=torch.zeros(len(scales), dtype=torch.float64),
    )


def test_the_advice_sees_the_spectrum():
    definite = advise(large(torch.linspace(1, 50, 5000)), solver=bl.GradientDescent(1e-3, 1))
    assert isinstance(definite.hypergrad.linear_solver, bl.CG)
    assert definite.spectrum.largest == pytest.approx(50, rel=0.05)
    assert not definite.spectrum.indefinite
    indefinite = advise(large(torch.linspace(-5, 50, 5000)), solver=bl.GradientDescent(1e-3, 1))
    assert isinstance(indefinite.hypergrad.linear_solver, bl.MINRES)
    assert indefinite.spectrum.indefinite
    assert "The Hessian is indefinite" in str(indefinite)
    assert "No negative curvature was seen" in str(definite)
    assert "positive definite" not in str(definite)


def ill_conditioned(size, dtype, condition=1e8):
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    matrix = (basis @ torch.diag(torch.logspace(0, math.log10(condition), size, dtype=torch.float64)) @ basis.mT).to(
        dtype
    )
    return BilevelProblem(
        inner=lambda y, x: y @ matrix @ y / 2 - x @ y,
        outer=lambda y, x: y.sum(),
        init=torch.zeros(size, dtype=dtype),
        hparams=torch.ones(size, dtype=dtype),
    )


@pytest.mark.parametrize("size", [50, 600])
def test_float32_cannot_have_what_its_condition_number_forbids(size):
    advice = advise(ill_conditioned(size, torch.float32), solver=bl.NewtonCG(max_steps=20))
    assert advice.predicted_error > 1e-2
    assert "not the 1e-04 asked for" in str(advice)


@pytest.mark.parametrize("condition", [1e2, 1e5, 1e10])
def test_the_prediction_is_at_least_rounding_times_condition(condition):
    advice = advise(ill_conditioned(20, torch.float64, condition), accuracy=1e-10)
    assert advice.condition == pytest.approx(condition, rel=0.1)
    assert advice.predicted_error >= 2e-16 * condition


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", collection())
def test_the_prediction_counts_the_inner_error(name, dtype):
    """At the inner solution of the default solver, which is what the advice is followed with."""
    problem, exact = collection(dtype)[name], collection()[name]
    if problem.kind in ("composite", "qp"):
        with pytest.raises(NotImplementedError, match="compare_methods"):
            advise(problem)
        return
    advice = advise(problem)
    x = problem.hparams.clone().requires_grad_()
    fit = solve(problem, x, hypergrad=advice.hypergrad, throw="ignore")
    (grad,) = torch.autograd.grad(problem.outer(fit.value, x), x)
    data_rounding = 10 * torch.finfo(dtype).eps * (advice.condition or 1.0)  # of casting the problem itself
    error = relative_error(grad.double(), exact.hypergradient(exact.hparams))
    assert error <= 10 * advice.predicted_error + data_rounding


def test_whether_the_inner_problem_was_solved_is_said():
    problem = Ridge(per_feature=True)
    solved = advise(problem, solver=bl.NewtonCG(gtol=1e-9))
    assert "The inner problem was solved" in str(solved)
    stopped = advise(problem, solver=bl.LBFGS(max_steps=1, gtol=1e-9))
    assert "The inner problem was NOT solved (the step limit" in str(stopped)
    assert stopped.predicted_error > 1e-3 > solved.predicted_error
    assert "not the 1e-06 asked for: measured at this inner solution" in str(stopped)
    ordered = advise(problem, solver=bl.GradientDescent(0.1, 2))
    assert "Whether the inner problem was solved is not known" in str(ordered)


def test_the_advice_for_a_singular_matrix_factorises_nothing():
    advice = advise(Singular())
    assert isinstance(advice.hypergrad.linear_solver, bl.MINRES)
    assert "at least" in str(advice)


def test_a_loss_without_curvature_gets_advice():
    x = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    problem = BilevelProblem(lambda y, x: -y * x, lambda y, x: y**3, init=torch.tensor(0.7).double(), hparams=x)
    assert "NOT solved" in str(advise(problem))


def test_an_impossible_accuracy():
    with pytest.raises(ValueError, match=r"accuracy is 1e-09: in torch.float32"):
        advise(Ridge(dtype=torch.float32), accuracy=1e-9)


def network(dropout=0.0):
    """A network of 1,281 params that no default solve brings to a minimum."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(30, 40), torch.nn.Dropout(dropout), torch.nn.ReLU(), torch.nn.Linear(40, 1)
    )
    a, b = torch.randn(200, 30), torch.randn(200, 1)
    log_decay = torch.tensor(-9.0, requires_grad=True)

    def inner(params):
        out = torch.func.functional_call(net, params, (a,))
        penalty = sum(p.square().sum() for p in params.values())
        return torch.nn.functional.mse_loss(out, b) + log_decay.exp() * penalty

    def outer(params):
        return (torch.func.functional_call(net, params, (a[:50],)) - b[:50] / 2).square().mean()

    return net, BilevelProblem(inner, outer, dict(net.named_parameters()))


def test_a_network_gets_first_order_steps_and_a_matrix_that_is_never_indefinite():
    net, problem = network()
    advice = advise(problem)
    assert "The inner problem was NOT solved" in str(advice)
    assert isinstance(advice.solver, bl.Steps)
    assert advice.hypergrad.operator == bl.GaussNewton.of(net, torch.nn.functional.mse_loss)
    assert "bl.GaussNewton.of(model, mse_loss)" in advice.expression
    names = {"bl": bl, "inner": problem.inner, "params": problem.init, "fit": None, "model": net}
    names |= {"mse_loss": torch.nn.functional.mse_loss}
    program = advice.expression.replace("inner, params", "lambda p: inner(p, hparams), params")
    exec(program, names | {"hparams": problem.hparams})


def test_where_the_default_does_not_arrive_newton_is_named():
    """Features from 1e-2 to 1e3, as tables have them that nobody scaled."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, 12, generator=generator, dtype=torch.float64) * torch.logspace(-2, 3, 12, dtype=torch.float64)
    b = (a @ (1 / a.std(0)) + torch.randn(200, generator=generator, dtype=torch.float64) > 0).double()

    def inner(w, x):
        return binary_cross_entropy_with_logits(a[:100] @ w, b[:100]) + (x.exp() * w.square()).sum()

    def outer(w, x):
        return binary_cross_entropy_with_logits(a[100:] @ w, b[100:])

    x = torch.full((12,), -4.0, dtype=torch.float64)
    problem = BilevelProblem(inner, outer, torch.zeros(12, dtype=torch.float64), x)
    assert not bl.argmin(inner, problem.init, x, throw="ignore").result.ok
    advice = advise(problem)
    assert advice.solver == bl.NewtonCG()
    assert advice.predicted_error < 1e-5
    assert "The inner problem was solved" in str(advice)
    assert check_hypergradient(problem, solver=advice.solver, hypergrad=advice.hypergrad).ok


def test_a_random_problem_gets_a_stochastic_method():
    _, problem = network(dropout=0.5)
    advice = advise(problem)
    assert "the inner function is random" in advice.random
    assert str(advice).startswith("Take a stochastic method")
    assert "bl.stochastic.SOBA" in advice.expression


def test_a_definite_problem_gets_tolerances_that_follow_the_outer_loss():
    problem = Ridge(per_feature=True)
    advice = advise(problem)
    names = {"bl": bl, "inner": lambda y: problem.inner(y, problem.hparams), "params": problem.init, "fit": None}
    before = advice.expression.partition("begin with ")[2].partition(";")[0]
    exec(f"{before.replace(', ', '; ', 1)}\n{advice.expression}", names)
    assert isinstance(advice.tolerance, bl.Adaptive)
    assert str(advice).startswith("In an outer loop take tolerances")
    assert f"For one accurate hypergradient take {written(advice.hypergrad)}" in str(advice)
    assert advice.predicted_seconds > 0
    assert advice.inner_seconds > 0
    assert (advice.num_params, advice.num_hparams) == (10, 10)
