"""All hypergradient methods: right to their stated accuracy, for every kind of hyperparameter; then each one's law."""

from __future__ import annotations

import itertools

import pytest
import torch

import bilevel as bl
from bilevel.diagnostics import all_methods, solve
from bilevel.diagnostics.cost import peak_mib
from bilevel.diagnostics.methods import DEFINITE, accurate_solver
from bilevel.problems import Quadratics, Ridge, collection
from tests.conformance import randn, relative_error

EXACT = bl.NewtonCG(gtol=1e-13)
LONG = bl.GradientDescent(lr=0.15, max_steps=400)
METHODS = all_methods()
COLLECTION = {dtype: collection(dtype) for dtype in (torch.float64, torch.float32)}
DESCENT = {"logistic": {"lr": 1.0, "max_steps": 600}}
"""Settings of the unrolled methods, where the defaults converge too slowly."""
NOISY = ("evolution strategies", "forward gradient, 16 directions")
CASES = [
    (m, name)
    for name, problem in collection().items()
    for m in all_methods(**DESCENT.get(name, {}))
    if m.suits(problem)
    and not (m.solver and name in ("ill-conditioned", "kernel ridge"))
    # Many solves, of an answer of which nothing could be said.
    and not (isinstance(m.hypergrad, bl.EvolutionStrategies) and name == "ill-conditioned")
]


def hypergradient(problem, method, solver=EXACT):
    x = problem.hparams.clone().requires_grad_()
    fit = solve(problem, x, solver=solver, hypergrad=method, throw="ignore")
    (grad,) = torch.autograd.grad(problem.outer(fit.value, x), x, allow_unused=True)
    return torch.zeros_like(x) if grad is None else grad


@pytest.mark.parametrize(("method", "name"), CASES, ids=[f"{m.name}-{name}" for m, name in CASES])
def test_stated_accuracy(method, name):
    """The suite that every method inherits by its line in `all_methods`."""
    problem = COLLECTION[torch.float64][name]
    x = problem.hparams.clone().requires_grad_()
    solver = method.solver or accurate_solver(problem)
    fit = solve(problem, x, solver=solver, hypergrad=method.hypergrad, throw="ignore")
    (grad,) = torch.autograd.grad(problem.outer(fit.value, x), x, allow_unused=True)
    truth = problem.hypergradient(problem.hparams)
    error = relative_error(torch.zeros_like(x) if grad is None else grad, truth)
    if method.tolerance is None:
        assert error < 5 or name == "ill-conditioned"  # biased or noisy, but no nonsense
    elif fit.adjoint is not None and not fit.adjoint.result.ok:
        assert name == "ill-conditioned"  # and it says so
    else:
        # An iterative solver stops at a residual; its error may exceed that by the condition number.
        assert error <= method.tolerance * (1e4 if name == "ill-conditioned" else 1.0)
    assert hash(method.hypergrad) == hash(method.hypergrad)
    assert "object at" not in repr(method.hypergrad)


@pytest.mark.parametrize(
    "method", [m for m in METHODS if DEFINITE in m.solves and m.name != "first order"], ids=lambda m: m.name
)
def test_every_kind_of_hyperparameter(method):
    """An argument, a captured leaf, a captured non-leaf, 0-d and vector, all in one: each as if it were alone."""
    vector = randn(3, seed=1)

    def inner(y, shift):
        return (y - shift).square().sum() + (y * scale).square().sum() / 2 + (y - offset).square().sum() / 2

    shift = vector.clone().requires_grad_()
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    root = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    offset = root * torch.arange(3)
    fit = bl.argmin(
        inner,
        torch.zeros(3, dtype=torch.float64),
        shift,
        solver=method.solver or EXACT,
        hypergrad=method.hypergrad,
        throw="ignore",
    )
    found = torch.autograd.grad(fit.value.square().sum(), (shift, scale, root), retain_graph=True)
    exact = (2 * shift + offset) / (3 + scale**2)
    truth = torch.autograd.grad(exact.square().sum(), (shift, scale, root))
    for one, other in zip(found, truth, strict=True):
        if method.tolerance is not None:
            assert relative_error(one, other) <= 10 * method.tolerance
        else:
            assert (one * other).sum() > 0 or method.name in NOISY


REPLAYED = [
    bl.Unroll(checkpoint=checkpoint, mode=mode) for checkpoint in (False, True, "tree") for mode in ("plain", "mixed")
][1:]


def test_unroll_is_autograd_of_the_loop():
    problem = Ridge(per_feature=True)
    x = problem.hparams.clone().requires_grad_()
    y = problem.init.clone().requires_grad_()
    for _ in range(17):
        (g,) = torch.autograd.grad(problem.inner(y, x), y, create_graph=True)
        y = y - 0.1 * g
    (truth,) = torch.autograd.grad(problem.outer(y, x), x)
    solver = bl.Steps(bl.SGD(0.1), max_steps=17)
    for method in (
        *REPLAYED,
        bl.Unroll(),
        bl.Truncated(last=17),
        bl.ForwardMode(),
        bl.ForwardGradient(10, "orthogonal"),
    ):
        assert relative_error(hypergradient(problem, method, solver), truth) <= 1e-10
        gradient_descent = bl.GradientDescent(0.1, max_steps=17)
        assert relative_error(hypergradient(problem, method, gradient_descent), truth) <= 1e-10


@pytest.mark.parametrize(
    "rule", [bl.SGD, lambda lr: bl.SGD(lr, momentum=0.9), bl.Adam, lambda lr: bl.RMSprop(lr, centered=True)]
)
@pytest.mark.parametrize("schedule", [False, True])
def test_forward_mode_is_unrolling(rule, schedule):
    """Also for the step size, or one for each step, and for momentum, as hyperparameters."""
    problem = Ridge(per_feature=True, num_features=4)

    def gradients(method):
        x = problem.hparams.clone().requires_grad_()
        lr = torch.full((6,) if schedule else (), 0.05, dtype=torch.float64, requires_grad=True)
        solver = bl.Steps(rule(lr), max_steps=6)
        fit = bl.argmin(problem.inner, problem.init, x, solver=solver, hypergrad=method)
        return torch.autograd.grad(problem.outer(fit.value, x), (x, lr))

    for one, other in zip(gradients(bl.ForwardMode()), gradients(bl.Unroll()), strict=True):
        assert relative_error(one, other) <= 1e-10


def test_learned_momentum_in_forward_mode():
    problem = Ridge()

    def gradient(method):
        momentum = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
        solver = bl.Steps(bl.SGD(0.05, momentum=momentum), max_steps=10)
        fit = bl.argmin(problem.inner, problem.init, problem.hparams, solver=solver, hypergrad=method)
        return torch.autograd.grad(problem.outer(fit.value, problem.hparams), momentum)[0]

    assert relative_error(gradient(bl.ForwardMode()), gradient(bl.Unroll())) <= 1e-10
    for method in REPLAYED:
        assert relative_error(gradient(method), gradient(bl.Unroll())) <= 1e-10


def test_forward_mode_on_several_problems():
    problem = Quadratics(conditions=(3.0, 10.0), size=5)
    solver = bl.GradientDescent(0.1, 12)
    forward, unrolled = (hypergradient(problem, m, solver) for m in (bl.ForwardMode(), bl.Unroll()))
    assert relative_error(forward, unrolled) <= 1e-10


def test_memory_of_checkpoints():
    """2 sqrt(K) steps kept in place of K = 400, a tenth; truncated and forward mode hardly more than one."""
    problem = Ridge(200, 50)

    def peak(method, solver):
        return peak_mib(lambda: hypergradient(problem, method, solver))

    steps = bl.GradientDescent(0.01, 400)
    full = peak(bl.Unroll(), steps)
    assert peak(bl.Unroll(checkpoint=True), steps) < 0.25 * full
    assert peak(bl.Truncated(last=4), steps) < 0.1 * full
    assert peak(bl.ForwardMode(), steps) < 0.1 * full


def test_truncation_decays_with_the_horizon():
    problem = Quadratics(conditions=(5.0,), size=8)
    truth = problem.hypergradient(problem.hparams)
    solver = bl.GradientDescent(0.3, 200)
    errors = [relative_error(hypergradient(problem, bl.Truncated(last), solver), truth) for last in (1, 5, 10, 20)]
    assert all(later < 0.4 * earlier for earlier, later in itertools.pairwise(errors))
    # What is left out is (I - lr H)^k, whose largest factor is 1 - 0.3.
    assert errors[2] <= 0.7**10


def test_one_step_is_one_application_of_the_map():
    """Its matrix is step_size I in place of the inverse: exact where the map forgets its start at once."""
    problem = Quadratics(conditions=(1.0,), size=6)  # H = I: one step of size one is Newton's
    truth = problem.hypergradient(problem.hparams)
    assert relative_error(hypergradient(problem, bl.OneStep(1.0)), truth) <= 1e-10
    bent = Quadratics(conditions=(4.0,), size=6)
    found = hypergradient(bent, bl.OneStep(0.25))
    expected = 0.25 * (bent.solution(bent.hparams) - bent.target).sum(0)
    assert relative_error(found, expected) <= 1e-9
    weight = 0.3 * randn(4, 4, seed=1)
    x = randn(4, seed=2).requires_grad_()
    fit = bl.fixed_point(
        lambda z: torch.tanh(weight @ z + x), torch.zeros(4, dtype=torch.float64), hypergrad=bl.OneStep()
    )
    z = fit.value.detach()
    (truth,) = torch.autograd.grad(torch.tanh(weight @ z + x).sum(), x)
    assert relative_error(torch.autograd.grad(fit.value.sum(), x)[0], truth) <= 1e-9


def test_first_order_moves_with_init():
    init = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    fit = bl.argmin(
        lambda y, x: ((y - x) ** 2).sum(), init * 2, x, solver=bl.GradientDescent(0.1, 3), hypergrad=bl.FirstOrder()
    )
    by_init, by_x = torch.autograd.grad((fit.value * torch.tensor([3.0, 5.0])).sum(), (init, x), allow_unused=True)
    assert by_init.tolist() == [6.0, 10.0]
    assert by_x is None or by_x == 0


@pytest.mark.parametrize("epsilon", [1e-1, 1e-2])
def test_finite_differences_are_of_second_order(epsilon):
    """On a cubic mixed term the error is exactly proportional to epsilon squared."""

    def gradient(method):
        x = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        start = torch.tensor([1.0, -0.5], dtype=torch.float64)
        fit = bl.argmin(
            lambda y: (y - 1).square().sum() + x * y.pow(3).sum() / 20,
            start,
            solver=EXACT,
            hypergrad=method,
            throw="ignore",
        )
        return torch.autograd.grad(fit.value.sum(), x)[0]

    truth = gradient(bl.OneStep(0.2))
    error = abs(gradient(bl.FiniteDifference(0.2, epsilon)) - truth).item()
    assert error <= 0.2 * epsilon**2
    assert relative_error(gradient(bl.FiniteDifference(0.2, 1e-5)), truth) <= 1e-7


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_the_default_difference_is_accurate_where_the_derivative_bends(size, dtype, tolerance):
    """``y = size (1, 2)`` minimises ``|y - w|^2 + x sum y^5``: minus ``d_x grad_y g`` is ``-5 y^4``."""
    x = torch.zeros((), dtype=dtype, requires_grad=True)
    w = size * torch.tensor([1.0, 2.0], dtype=dtype)
    method = bl.FiniteDifference(0.5)
    fit = bl.argmin(lambda y: (y - w).square().sum() + x * y.pow(5).sum(), w.clone(), hypergrad=method, throw="ignore")
    (found,) = torch.autograd.grad(fit.value.sum(), x)
    assert found.item() == pytest.approx(-0.5 * 5 * (w**4).sum().item(), rel=tolerance)


def test_sama_uses_the_derivative_of_the_update():
    problem = Ridge(per_feature=True)
    sgd = hypergradient(problem, bl.SAMA(bl.SGD(0.05), 1e-4), bl.Steps(bl.SGD(0.05), max_steps=50))
    darts = hypergradient(problem, bl.FiniteDifference(0.05, 1e-4), bl.Steps(bl.SGD(0.05), max_steps=50))
    assert relative_error(sgd, darts) <= 1e-6

    rule, solver = bl.Adam(0.05), bl.Steps(bl.Adam(0.05), max_steps=50)
    x = problem.hparams.clone().requires_grad_()
    fit = bl.argmin(problem.inner, problem.init, x, solver=solver, hypergrad=bl.SAMA(rule, 1e-4))
    (found,) = torch.autograd.grad(problem.outer(fit.value, x), x)
    y = fit.value.detach().requires_grad_()
    (v,) = torch.autograd.grad(problem.outer(y, x), y)
    last = fit.state
    jacobian = torch.func.jacrev(lambda g: rule.step(last.y, g, last.before, last.index)[0])(last.g)
    mixed = torch.func.jacrev(torch.func.grad(problem.inner), argnums=1)(y.detach(), x.detach())
    assert relative_error(found, mixed.mT @ (jacobian.mT @ v)) <= 1e-5
    assert torch.equal(hypergradient(problem, bl.SAMA(epsilon=1e-4), solver), found)  # the solver knows its rule
    with pytest.raises(TypeError, match=r"needs solver=Steps"):
        hypergradient(problem, bl.SAMA(rule), EXACT)
    with pytest.raises(TypeError, match=r"does not fit the solver"):
        hypergradient(problem, bl.SAMA(bl.SGD(0.05)), solver)
    with pytest.raises(ValueError, match=r"made none"):
        hypergradient(problem, bl.SAMA(), bl.Steps(rule, gtol=1e9))


@pytest.mark.parametrize(("symmetric", "order"), [(False, 1), (True, 2)])
def test_penalty_error_shrinks_at_its_order(symmetric, order):
    def gradient(method):
        x = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
        start = torch.zeros(2, dtype=torch.float64)
        fit = bl.argmin(
            lambda y: (y - x).pow(4).sum() + (y.exp() - y).sum() + y.square().sum(),
            start,
            solver=EXACT,
            hypergrad=method,
            throw="ignore",
        )
        return torch.autograd.grad((fit.value - 1).square().sum(), x)[0]

    truth = gradient(bl.Implicit(bl.Cholesky()))
    errors = [relative_error(gradient(bl.Penalty(s, symmetric)), truth) for s in (10.0, 20.0, 40.0)]
    for earlier, later in itertools.pairwise(errors):
        assert earlier / later == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("throw", ["raise", "warn", "ignore"])
def test_a_nudge_below_the_precision_is_heard(throw):
    """A curvature of 4e8 in float32: the params cannot move by 2.5e-11, and the gradient would be zero."""
    x = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    fit = bl.argmin(
        lambda y: 1e8 * ((y - x).square().sum() + y.square().sum()),
        torch.ones(3),
        solver=bl.GradientDescent(1e-9, max_steps=80),
        hypergrad=bl.Penalty(),
        throw=throw,
    )
    if throw == "raise":
        with pytest.raises(bl.SolveError, match="lost in rounding"):
            fit.value.sum().backward()
    elif throw == "warn":
        with pytest.warns(bl.SolveWarning, match="lower strength"):
            fit.value.sum().backward()
    else:
        fit.value.sum().backward()
        assert x.grad.tolist() == [0.0, 0.0, 0.0]  # why it has to be heard


def test_evolution_strategies_are_unbiased():
    """On a linear solution map the estimate is exact in expectation: 100 samples, three standard errors."""
    problem = Quadratics(conditions=(3.0,), size=4)
    truth = problem.hypergradient(problem.hparams)
    found = hypergradient(problem, bl.EvolutionStrategies(100, 0.1, seed=1))
    assert relative_error(found, truth) <= 3 * (5 / 100) ** 0.5
    again = hypergradient(problem, bl.EvolutionStrategies(100, 0.1, seed=1))
    assert torch.equal(found, again)


def test_evolution_strategies_through_a_derivative_free_solver():
    x = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    fit = bl.argmin(
        lambda y: (y - x).square().sum() + 0.1 * y.pow(4).sum(),
        torch.zeros(1, dtype=torch.float64),
        solver=bl.ScipyMinimize("COBYQA", gtol=1e-4),
        hypergrad=bl.EvolutionStrategies(32, 0.05),
    )
    y = fit.value.detach()
    (found,) = torch.autograd.grad(fit.value.sum(), x)
    assert found.item() == pytest.approx((2 / (2 + 1.2 * y**2)).item(), rel=0.6)


APPROXIMATIONS = [bl.OneStep(), bl.FirstOrder(), bl.FiniteDifference(), bl.Penalty(), bl.EvolutionStrategies(2)]


@pytest.mark.parametrize("method", APPROXIMATIONS, ids=repr)
def test_approximations_under_transforms(method):
    """First derivatives and vmap work; second ones are refused, never wrong."""

    def loss(x):
        start = x * 0 + 1.0
        fit = bl.argmin(lambda y: (y - x).square().sum(), start, solver=bl.LBFGS(), hypergrad=method, throw="ignore")
        return fit.value.square().sum()

    x = randn(3, 2, seed=1)
    leaf = x[0].clone().requires_grad_()
    (truth,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x[0]), truth)
    if not isinstance(method, bl.EvolutionStrategies):  # its noise is drawn for the whole batch
        each = torch.stack([torch.func.grad(loss)(row) for row in x])
        torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x), each)
    with pytest.raises(NotImplementedError, match=r"second derivative"):
        torch.func.jacrev(torch.func.grad(loss))(x[0])
    with pytest.raises(NotImplementedError, match=r"forward-mode"):
        torch.func.jvp(loss, (x[0],), (x[0],))


@pytest.mark.parametrize(
    "method",
    [bl.Unroll(), bl.Unroll(mode="mixed"), bl.Truncated(2), bl.ForwardMode(), bl.ForwardGradient()],
    ids=repr,
)
def test_path_methods_refuse_what_they_cannot_differentiate(method):
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    start = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"needs Steps|cannot differentiate"):
        bl.argmin(lambda y: (y - x).square().sum(), start, solver=bl.LBFGS(), hypergrad=method)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(
            lambda x: bl.argmin(lambda y: (y - x).square().sum(), start, solver=LONG, hypergrad=method).value.sum()
        )(x.detach())


def test_settings_and_limits():
    x = torch.ones(100, dtype=torch.float64, requires_grad=True)
    start = torch.zeros(100, dtype=torch.float64)
    with pytest.raises(ValueError, match="ForwardMode would carry 100 derivatives"):
        bl.argmin(lambda y: (y - x).square().sum(), start, solver=LONG, hypergrad=bl.ForwardMode())
    with pytest.raises(TypeError, match="fixed number of steps"):
        bl.argmin(
            lambda y: (y - x).square().sum(), start, solver=bl.GradientDescent(gtol=1e-3), hypergrad=bl.Truncated(2)
        )
    with pytest.raises(TypeError, match="needs the objective of an argmin"):
        bl.root(lambda y: y - x, start, hypergrad=bl.Penalty()).value.sum().backward()
    for make, name in (
        (lambda: bl.OneStep(0.0), "step_size"),
        (lambda: bl.Truncated(0), "last"),
        (lambda: bl.ForwardMode(0), "max_hparams"),
        (lambda: bl.Unroll(checkpoint="trees"), "checkpoint"),
        (lambda: bl.Unroll(mode="mix"), "mode"),
        (lambda: bl.FiniteDifference(epsilon=0.0), "epsilon"),
        (lambda: bl.Penalty(-1.0), "strength"),
        (lambda: bl.EvolutionStrategies(0), "num_samples"),
        (lambda: bl.EvolutionStrategies(sigma=0.0), "sigma"),
    ):
        with pytest.raises(ValueError, match=f"{name} is"):
            make()
    with pytest.raises(TypeError, match="rule is"):
        bl.SAMA(0.1)


def test_a_nudge_that_is_too_large_is_told():
    """The params answer to a nudge of a hundredth by 1.7, and the hypergradient is four times the true one."""
    q = torch.tensor(1e-3, dtype=torch.float64, requires_grad=True)

    def hypergradient(hypergrad):
        fit = bl.argmin(
            lambda y: torch.nn.functional.softplus(-3 * y) + q * y**2,
            torch.tensor(0.0, dtype=torch.float64),
            solver=bl.NewtonCG(gtol=1e-12),
            hypergrad=hypergrad,
        )
        return torch.autograd.grad(fit.value, q)[0].item()

    exact = hypergradient(bl.Implicit())
    for loose in (bl.Penalty(), bl.Penalty(1e3, symmetric=False)):
        with pytest.warns(bl.SolveWarning, match="too large"):
            assert hypergradient(loose) != pytest.approx(exact, rel=0.05)
    assert hypergradient(bl.Penalty(1e4)) == pytest.approx(exact, rel=1e-3)
