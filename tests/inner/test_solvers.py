"""The inner solvers: all conform; then what is particular to each."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch

import bilevel as bl
from bilevel import LBFGS, GradientDescent, NewtonCG, Result, ScipyMinimize, TorchOptim
from bilevel.problem import Problem
from bilevel.problems import Quadratics
from tests.conformance import check_inner_solver, randn, relative_error

SOLVERS = [
    LBFGS(),
    NewtonCG(),
    NewtonCG(operator="func"),
    GradientDescent(lr=0.018, max_steps=5000, gtol=1e-8),
    GradientDescent(lr=0.018, momentum=0.8, max_steps=5000, gtol=1e-8),
    GradientDescent(lr=1.0, max_steps=2000, gtol=1e-6, line_search=True),
    TorchOptim(torch.optim.Adam, lr=0.03, max_steps=20000, gtol=1e-6),
    TorchOptim(torch.optim.LBFGS, max_steps=200, gtol=1e-6, tolerance_change=0.0, line_search_fn="strong_wolfe"),
    ScipyMinimize("L-BFGS-B", gtol=1e-7),
    ScipyMinimize("BFGS", gtol=1e-7),
    ScipyMinimize("CG", gtol=1e-5),
    ScipyMinimize("Newton-CG", gtol=1e-7),
    ScipyMinimize("trust-ncg", gtol=1e-7),
    ScipyMinimize("trust-exact", gtol=1e-7),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_conforms(solver):
    check_inner_solver(solver)


def rosenbrock(y):
    return (100 * (y[..., 1] - y[..., 0] ** 2) ** 2 + (1 - y[..., 0]) ** 2).sum()


@pytest.mark.parametrize("solver", [LBFGS(), NewtonCG(), ScipyMinimize()])
def test_rosenbrock(solver):
    """Not convex, and a long curved valley."""
    problem = Problem(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64))
    found = solver.minimize(problem)
    assert found.result is Result.CONVERGED
    torch.testing.assert_close(found.value, torch.ones(2, dtype=torch.float64), rtol=1e-4, atol=0)


HESSIANS = {"Newton-CG": 1, "trust-ncg": 1, "trust-krylov": 1, "trust-constr": 1, "dogleg": 0, "trust-exact": 0}


@pytest.mark.parametrize("method", [*HESSIANS, "TNC", "L-BFGS-B", "BFGS", "CG", "SLSQP", "Nelder-Mead", "COBYLA"])
def test_scipy_methods_get_the_derivatives_that_they_want(method, monkeypatch, recwarn):
    """The Hessians of two problems, whose Hessian has two blocks; and nothing that they do not know."""
    given = {}
    theirs = scipy.optimize.minimize

    def minimize(*args, **settings):
        given.update(settings)
        return theirs(*args, **settings)

    monkeypatch.setattr(scipy.optimize, "minimize", minimize)
    target = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)

    def loss(y):
        return (y - target).square().sum(-1) + y.pow(4).sum(-1) + (y[:, 0] * y[:, 1] - 1).square()

    start = torch.full((2, 2), 0.3, dtype=torch.float64)
    found = ScipyMinimize(method, gtol=1e-4).minimize(Problem(loss, start))
    assert found.result is Result.CONVERGED
    v = np.arange(1.0, 5.0)
    hessian = np.zeros((4, 4))
    for block, y in enumerate(start):
        part = torch.func.hessian(lambda y, b=block: loss(torch.stack([y, y]))[b])(y)
        hessian[2 * block : 2 * block + 2, 2 * block : 2 * block + 2] = part.numpy()
    if HESSIANS.get(method) == 1:
        np.testing.assert_allclose(given["hessp"](start.flatten().numpy(), v), hessian @ v)
    elif method in HESSIANS:
        np.testing.assert_allclose(given["hess"](start.flatten().numpy()), hessian)
    assert not [seen for seen in recwarn.list if issubclass(seen.category, scipy.optimize.OptimizeWarning)]


@pytest.mark.parametrize("solver", [LBFGS(gtol=1e-7, history=20), NewtonCG(gtol=1e-7)], ids=repr)
def test_conditions_from_1_to_1e4_each_meet_the_tolerance(solver):
    quadratics = Quadratics()
    problem = Problem(quadratics.inner, quadratics.init, (quadratics.hparams,))
    found = solver.minimize(problem)
    assert found.result is Result.CONVERGED
    assert (problem.evaluate(found.value).g.norm(dim=-1) <= solver.gtol).all()
    assert len(set(found.stats["num_steps"].tolist())) >= 3
    assert found.stats["step_size"].shape == (5,)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (GradientDescent(lr=0.01, max_steps=7), TorchOptim(torch.optim.SGD, lr=0.01, max_steps=7)),
        (
            GradientDescent(lr=0.01, max_steps=7, momentum=0.9),
            TorchOptim(torch.optim.SGD, lr=0.01, momentum=0.9, max_steps=7),
        ),
    ],
)
def test_gradient_descent_makes_the_steps_of_torch(ours, theirs):
    quadratics = Quadratics(conditions=(1.0, 50.0))
    problem = Problem(quadratics.inner, quadratics.init, (quadratics.hparams,))
    one, other = ours.minimize(problem), theirs.minimize(problem)
    assert relative_error(one.value, other.value) <= 1e-14
    assert one.stats["num_steps"].tolist() == other.stats["num_steps"].tolist() == [7, 7]
    assert one.result is other.result is Result.STEPS_DONE


def test_a_step_size_for_each_problem():
    quadratics = Quadratics(conditions=(1.0, 10.0))
    problem = Problem(quadratics.inner, quadratics.init, (quadratics.hparams,))
    both = GradientDescent(lr=(0.5, 0.1), max_steps=5).minimize(problem).value
    for task, lr in enumerate((0.5, 0.1)):
        assert torch.equal(both[task], GradientDescent(lr=lr, max_steps=5).minimize(problem).value[task])


def test_converged_problems_are_frozen():
    """The easy problem of a batch ends where it would have ended alone."""
    easy, both = Quadratics(conditions=(1.0,)), Quadratics(conditions=(1.0, 1e3))
    both.matrix[0], both.c[0], both.hparams = easy.matrix[0], easy.c[0], easy.hparams
    for solver in (GradientDescent(1e-3, 20, 1.0), TorchOptim(torch.optim.Adam, lr=0.1, max_steps=50, gtol=1.0)):
        alone = solver.minimize(Problem(easy.inner, easy.init, (easy.hparams,)))
        together = solver.minimize(Problem(both.inner, both.init, (both.hparams,)))
        torch.testing.assert_close(together.value[0], alone.value[0], rtol=1e-12, atol=1e-12)
        assert together.stats["num_steps"][0] == alone.stats["num_steps"][0]


def test_divergence_is_seen():
    quadratics = Quadratics(conditions=(1.0, 1e4))
    problem = Problem(quadratics.inner, quadratics.init, (quadratics.hparams,))
    found = GradientDescent(lr=1.0, max_steps=500, gtol=1e-6).minimize(problem)
    assert found.stats["result"].tolist() == [int(Result.CONVERGED), int(Result.NONFINITE)]


def test_stops_on_steps_and_says_so():
    quadratics = Quadratics(conditions=(1e4,))
    problem = Problem(quadratics.inner, quadratics.init, (quadratics.hparams,))
    for solver in (LBFGS(3), NewtonCG(1, cg_steps=2), GradientDescent(1e-5, 3, 1e-9), ScipyMinimize(max_steps=3)):
        assert solver.minimize(problem).result is Result.MAX_STEPS


def test_safeguard_halves_the_step_of_the_problem_that_needs_it():
    quadratics = Quadratics(conditions=(1.0, 100.0))
    problem = Problem(quadratics.inner, quadratics.init, (quadratics.hparams,))
    found = GradientDescent(lr=0.5, max_steps=2000, gtol=1e-6, momentum=0.5, safeguard=True).minimize(problem)
    assert found.result is Result.CONVERGED
    assert found.stats["step_size"][1] < 0.1 < found.stats["step_size"][0]
    plain = GradientDescent(lr=0.01, max_steps=9, momentum=0.5)
    guarded = GradientDescent(lr=0.01, max_steps=9, momentum=0.5, safeguard=True)
    assert torch.equal(plain.minimize(problem).value, guarded.minimize(problem).value)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_safeguard_takes_the_last_step_back_without_its_gradient(momentum, monkeypatch):
    quadratics = Quadratics(conditions=(1.0, 100.0))
    problem = Problem(quadratics.inner, quadratics.init, (quadratics.hparams,))
    solver, evaluate, points = GradientDescent(0.5, 7, momentum=momentum, safeguard=True), problem.evaluate, []
    monkeypatch.setattr(problem, "evaluate", lambda y: points.append(y) or evaluate(y))
    found = solver.minimize(problem)
    assert len(points) == 6

    at, lr, velocity = problem.start, torch.full((2,), 0.5, dtype=torch.float64), 0.0
    for _ in range(7):
        velocity = momentum * velocity + at.g
        new = evaluate(at.y - lr.unsqueeze(-1) * velocity)
        better = (new.f <= at.f).unsqueeze(-1)
        lr = torch.where(better.squeeze(-1), lr, lr / 2)
        velocity = torch.where(better, velocity, 0.0)
        at = new if better.all() else evaluate(torch.where(better, new.y, at.y))
    torch.testing.assert_close(found.value, at.y, rtol=1e-12, atol=0)
    assert torch.equal(found.stats["step_size"], lr)
    assert lr[1] < lr[0]


def test_newton_cg_passes_through_negative_curvature():
    problem = Problem(lambda y: (y**4 / 4 - y**2 / 2).sum(), 0.01 + 0.001 * randn(5).abs())
    found = NewtonCG().minimize(problem)
    assert found.result is Result.CONVERGED
    torch.testing.assert_close(found.value, torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: GradientDescent(lr=-1.0), "lr"),
        (lambda: GradientDescent(momentum=1.0), "momentum"),
        (lambda: GradientDescent(gtol=-1.0), "gtol"),
        (lambda: GradientDescent(momentum=0.5, line_search=True), "line_search"),
        (lambda: LBFGS(max_steps=0), "max_steps"),
        (lambda: LBFGS(history=0), "history"),
        (lambda: NewtonCG(cg_steps=0), "cg_steps"),
        (lambda: TorchOptim(torch.optim.SGD, gtol=-1.0, lr=0.1), "gtol"),
        (lambda: ScipyMinimize(max_steps=-3), "max_steps"),
    ],
)
def test_bad_settings_name_the_argument(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def test_solvers_are_values():
    """Printable, comparable, hashable: pasted back from a log."""
    assert TorchOptim(torch.optim.Adam, lr=0.1) == TorchOptim(torch.optim.Adam, lr=0.1)
    assert repr(TorchOptim(torch.optim.Adam, lr=0.1)) == "TorchOptim(Adam, max_steps=100, gtol=None, lr=0.1)"
    for solver in SOLVERS:
        if not isinstance(solver, TorchOptim):
            assert eval(repr(solver)) == solver
        assert hash(solver) == hash(solver)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_optimizers_work_under_transforms(optimizer):
    """PyTorch refuses requires_grad_() there."""
    solver = TorchOptim(optimizer, lr=0.1, max_steps=2000, gtol=1e-6)

    def solved(x):
        start = torch.zeros(2, dtype=torch.float64)
        return bl.argmin(lambda y: (y - x).square().sum() + y.pow(4).sum(), start, solver=solver).value

    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    y = solved(x)
    exact = torch.diag(2 / (2 + 12 * y.detach().square()))
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(solved)(x), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.func.vmap(solved)(torch.stack([x, x]))[1], y, rtol=1e-5, atol=1e-6)


def test_an_index_error_of_the_objective_is_heard():
    """That of PyTorch's own line search, on a loss without a minimum, ends the solve instead."""
    solver = bl.TorchOptim(torch.optim.LBFGS, max_steps=20, gtol=1e-6, line_search_fn="strong_wolfe")
    calls = []

    def raising(y):
        calls.append(y)
        if len(calls) > 2:
            raise IndexError("of the objective")
        return (y - 1).square().sum() + y.pow(4).sum()

    with pytest.raises(IndexError, match="of the objective"):
        bl.argmin(raising, torch.zeros(3), solver=solver, hypergrad=None)
    fit = bl.argmin(lambda y: -y.sum(), torch.zeros(3).double(), solver=solver, hypergrad=None, throw="ignore")
    assert not fit.result.ok
