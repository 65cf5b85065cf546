"""The truth itself: every problem's hypergradient against finite differences, and its solution against its residual."""

from __future__ import annotations

import re

import pytest
import torch

import bilevel as bl
from bilevel.diagnostics import solve
from bilevel.problems import Quadratics, Ridge, collection, finite_sums
from tests.conformance import relative_error

PROBLEMS = collection()


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_solution_solves(name):
    problem = PROBLEMS[name]
    y = problem.solution(problem.hparams).detach()
    scale = 1 + (problem.constants(problem.hparams)[1] if hasattr(problem, "constants") else 1.0) * y.norm()
    assert problem.residual(y, problem.hparams).norm() <= 1e-13 * scale


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_hypergradient_is_a_finite_difference(name):
    problem = PROBLEMS[name]
    x, generator = problem.hparams, torch.Generator().manual_seed(0)
    grad = problem.hypergradient(x)
    for _ in range(3):
        direction = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        h = 1e-4

        def loss(size, direction=direction):
            moved = x + size * direction
            return problem.outer(problem.solution(moved), moved).item()

        # Richardson: the error of the fourth order, so that the step may be large beside rounding.
        slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
        assert (grad * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_library_finds_it(name):
    problem = PROBLEMS[name]
    x = problem.hparams.clone().requires_grad_()
    hypergrad = bl.Implicit(
        bl.MINRES(rtol=1e-10) if problem.kind in ("argmin", "composite") or problem.symmetric else bl.LU()
    )
    solver = {"argmin": bl.NewtonCG(gtol=1e-11)}.get(problem.kind, bl.Newton(tol=1e-12))
    fit = solve(problem, x, solver=solver, hypergrad=hypergrad, throw="ignore")
    assert relative_error(fit.value, problem.solution(x)) <= 1e-6
    (grad,) = torch.autograd.grad(problem.outer(fit.value, x), x)
    assert relative_error(grad, problem.hypergradient(x)) <= 1e-6


def test_in_float32_too():
    for name, problem in collection(torch.float32).items():
        assert problem.hypergradient(problem.hparams).dtype is torch.float32
        if name != "ill-conditioned":
            truth = PROBLEMS[name].hypergradient(PROBLEMS[name].hparams)
            assert relative_error(problem.hypergradient(problem.hparams).double(), truth) <= 1e-3


def test_constants_are_those_of_the_hessian():
    low, high = Quadratics(conditions=(3.0, 50.0)).constants(torch.zeros(20, dtype=torch.float64))
    assert (low, high) == pytest.approx((1.0, 50.0))
    problem = Ridge()
    values = torch.linalg.eigvalsh(torch.func.hessian(problem.inner)(problem.init, problem.hparams))
    assert problem.constants(problem.hparams) == pytest.approx((values[0].item(), values[-1].item()))


@pytest.mark.parametrize(
    ("problem", "settings", "words"),
    [
        (finite_sums.Quadratics, {"num_samples": 50}, "at least as many samples as the larger of them"),
        (finite_sums.Quadratics, {"size": 0}, "size is 0"),
        (finite_sums.Quadratics, {"condition": 0.5}, "condition is 0.5"),
        (finite_sums.Quadratics, {"size": 2.5}, "size is 2.5: a whole number"),
        (finite_sums.Logistic, {"num_samples": 0}, "num_samples 0"),
        (finite_sums.Logistic, {"outer_penalty": 0.0}, "outer_penalty is 0.0"),
        (finite_sums.Logistic, {"seed": "a"}, "seed is 'a'"),
    ],
)
def test_sizes_that_make_no_problem_are_named(problem, settings, words):
    with pytest.raises((TypeError, ValueError), match=words):
        problem(**settings)


@pytest.mark.parametrize(
    "kind", sorted({type(problem) for problem in PROBLEMS.values()}, key=lambda kind: kind.__name__)
)
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"seed": 0.5}, TypeError, "seed is 0.5: a whole number"),
        ({"dtype": torch.int64}, TypeError, "dtype is torch.int64"),
    ],
)
def test_data_that_cannot_be_drawn_are_refused(kind, settings, error, message):
    with pytest.raises(error, match=re.escape(message)):
        kind(**settings)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Ridge(0), ValueError, "num_examples is 0: at least 1"),
        (lambda: Ridge(num_features=2.0), TypeError, "num_features is 2.0: a whole number"),
        (lambda: Quadratics(size=True), TypeError, "size is True"),
        (lambda: Quadratics(()), ValueError, "conditions is ()"),
        (lambda: Quadratics((0.5,)), ValueError, "conditions is (0.5,)"),
        (lambda: bl.problems.Singular(4, 5), ValueError, "rank is 5: it is at most the size, 4"),
        (lambda: bl.problems.LinearFixedPoint(rate=1.0), ValueError, "rate is 1.0"),
    ],
)
def test_a_problem_that_there_is_not_is_refused(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()
