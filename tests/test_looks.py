"""How often a solve asks the device for a value, where that is not free: numbers that a change must not raise."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import bilevel as bl
from bilevel.linalg.operator import Dense
from tests.conformance import nonsymmetric, randn, spd
from tests.looks import looks_cost


def logistic(tasks=()):
    """Ridge-regularised logistic losses, their start, and the logarithm of the strength."""
    x = randn(60, 10, seed=1)
    y = (x @ randn(10, seed=2) + randn(60, seed=3) > 0).double()
    strength = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)

    def objective(w):
        logits = w @ x.T
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, y.expand_as(logits), reduction="none")
        return losses.mean(-1) + strength.exp() * w.square().sum(-1)

    return objective, randn(*tasks, 10, seed=4), strength


def differentiated(solver, hypergrad, tasks=(), throw="warn"):
    objective, start, strength = logistic(tasks)
    fit = bl.argmin(objective, start, solver=solver, hypergrad=hypergrad, throw=throw)
    (grad,) = torch.autograd.grad(fit.value.square().sum(), strength)
    return fit, grad


@pytest.mark.parametrize("tasks", [(), (5,)], ids=["one", "five"])
def test_a_meta_step_of_implicit_maml_looks_at_nothing(monkeypatch, tasks):
    with looks_cost(monkeypatch) as looks:
        differentiated(bl.GradientDescent(0.5, max_steps=5), bl.Implicit(bl.CG(max_steps=5)), tasks, throw="ignore")
    assert looks.at == {}


@pytest.mark.parametrize("tasks", [(), (5,)], ids=["one", "five"])
def test_a_healthy_solve_and_its_backward_pass_look_once(monkeypatch, tasks):
    """At both results together, which may have to be told."""
    with looks_cost(monkeypatch) as looks:
        differentiated(bl.GradientDescent(0.5, max_steps=5), bl.Implicit(bl.CG(max_steps=5)), tasks)
    assert looks.at == {"hypergrad/search.py:look": 1}


def test_what_must_be_told_at_once_is_looked_at_once_each(monkeypatch):
    with looks_cost(monkeypatch) as looks:
        differentiated(bl.GradientDescent(0.5, max_steps=5), bl.Implicit(bl.CG(max_steps=5)), throw="raise")
    assert looks.count == 2


@pytest.mark.parametrize("tasks", [(), (5,)], ids=["one", "five"])
def test_failures_of_both_solves_are_told_with_the_backward_pass(monkeypatch, tasks):
    objective, start, strength = logistic(tasks)
    solver, hypergrad = bl.GradientDescent(0.5, max_steps=3, gtol=1e-12), bl.Implicit(bl.CG(rtol=1e-12, max_steps=2))
    with looks_cost(monkeypatch):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit = bl.argmin(objective, start, solver=solver, hypergrad=hypergrad)
        with pytest.warns(bl.SolveWarning) as told:
            torch.autograd.grad(fit.value.square().sum(), strength)
    assert [str(one.message).partition(":")[0] for one in told] == [
        "The inner solve",
        "The adjoint solve of the hypergradient",
    ]
    assert {one.filename for one in told} == {__file__}


def test_a_saddle_is_told_with_the_backward_pass_and_put_right_in_the_stats(monkeypatch):
    rate = torch.ones((), dtype=torch.float64, requires_grad=True)

    def saddle(w):
        return rate * (w[0] ** 2 - w[1] ** 2) + w[1] ** 4

    free = bl.argmin(saddle, torch.zeros(2, dtype=torch.float64), throw="ignore")
    with looks_cost(monkeypatch):
        fit = bl.argmin(saddle, torch.zeros(2, dtype=torch.float64), hypergrad=bl.Implicit(bl.MINRES()))
        with pytest.warns(bl.SolveWarning, match="The inner solve: .*negative curvature"):
            torch.autograd.grad(fit.value.sum(), rate)
    assert fit.result is bl.Result.NEGATIVE_CURVATURE
    assert free.result is bl.Result.CONVERGED  # nothing looks closer where nothing is told


def test_a_failure_without_a_backward_pass_is_told_when_the_solution_is_dropped(monkeypatch):
    objective, start, _ = logistic()
    with looks_cost(monkeypatch):
        fit = bl.argmin(objective, start, solver=bl.GradientDescent(0.5, max_steps=3, gtol=1e-12))
        with pytest.warns(bl.SolveWarning, match="The inner solve") as told:
            del fit
    assert told[0].filename == __file__


@pytest.mark.parametrize("tasks", [(), (5,)], ids=["one", "five"])
@pytest.mark.parametrize("gtol", [None, 1e-8])
def test_lbfgs_looks_once_a_step_and_never_in_its_line_search(monkeypatch, gtol, tasks):
    """And gives the answers that it gives where looks are free."""
    free, free_grad = differentiated(bl.LBFGS(gtol=gtol), bl.Implicit(), tasks)
    with looks_cost(monkeypatch) as looks:
        fit, grad = differentiated(bl.LBFGS(gtol=gtol), bl.Implicit(), tasks)
    steps = int(fit.stats["num_steps"].max())
    assert looks.at["inner/descent.py:step"] <= steps
    assert looks.at["inner/descent.py:finish"] == 0
    assert looks.at["inner/pairs.py:first_step"] == (gtol is None)
    assert looks.at["hypergrad/search.py:look"] == 1
    assert looks.at["solution.py:result"] == 0
    for name in ("num_steps", "result"):
        assert torch.equal(fit.stats[name], free.stats[name])
    torch.testing.assert_close(fit.value, free.value, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, free_grad, rtol=1e-9, atol=0)


def test_a_line_search_of_many_trials_looks_after_every_third(monkeypatch):
    """A first step of one, from where the curvature is a thousand times that: ten halvings."""
    start = torch.ones(3, dtype=torch.float64)
    solver = bl.GradientDescent(1.0, max_steps=1, line_search=True)
    with looks_cost(monkeypatch) as looks:
        bl.argmin(lambda w: 500 * w.square().sum(), start, solver=solver, throw="ignore")
    assert looks.at["inner/descent.py:step"] == 1 + math.ceil(9 / 3)


SYSTEMS = [(bl.CG, spd), (bl.MINRES, spd), (bl.NormalCG, nonsymmetric), (bl.GMRES, nonsymmetric)]


@pytest.mark.parametrize(("solver", "matrix"), SYSTEMS, ids=lambda part: getattr(part, "__name__", None))
def test_linear_solvers_look_once_in_eight_steps_and_once_at_the_end(monkeypatch, solver, matrix):
    operator, b = Dense(matrix(40), symmetric=matrix is spd), randn(40)
    free = solver(rtol=1e-8).solve(operator, b)
    with looks_cost(monkeypatch) as looks:
        found = solver(rtol=1e-8).solve(operator, b)
    steps = int(found.stats["num_steps"])
    assert steps >= 8
    assert looks.at["linalg/solve.py:stop_now"] <= math.ceil(steps / 8)
    assert looks.count <= math.ceil(steps / 8) + 1
    assert found.stats["num_steps"] == free.stats["num_steps"]
    torch.testing.assert_close(found.value, free.value, rtol=1e-12, atol=0)


def test_ordered_steps_of_cg_look_at_nothing(monkeypatch):
    with looks_cost(monkeypatch) as looks:
        bl.CG(max_steps=5).solve(Dense(spd(20, batch=(3,))), randn(3, 20))
    assert looks.count == 0


@pytest.mark.parametrize("solver", [bl.Anderson(), bl.Picard()], ids=repr)
def test_fixed_points_look_once_in_eight_steps(monkeypatch, solver):
    matrix = (torch.eye(10, dtype=torch.float64) - nonsymmetric(10)).requires_grad_()
    with looks_cost(monkeypatch) as looks:
        fit = bl.fixed_point(lambda y: matrix @ y + 1.0, torch.zeros(10, dtype=torch.float64), solver=solver)
    assert looks.at["linalg/solve.py:stop_now"] <= math.ceil(int(fit.stats["num_steps"]) / 8)
    assert looks.count <= math.ceil(int(fit.stats["num_steps"]) / 8) + 1


def test_a_start_that_is_not_finite_is_still_told(monkeypatch):
    objective, start, strength = logistic()
    settings = {"solver": bl.GradientDescent(0.1, max_steps=2)}
    with looks_cost(monkeypatch):
        fit = bl.argmin(objective, start * torch.nan, **settings)
        with pytest.raises(bl.NonFiniteError, match="init contains NaN"):
            torch.autograd.grad(fit.value.sum(), strength)
        for changes in ({"throw": "raise"}, {"hypergrad": None}):
            with pytest.raises(bl.NonFiniteError, match="init contains NaN"):
                bl.argmin(objective, start * torch.nan, **settings, **changes)
