"""Composite problems: solutions against scikit-learn and SciPy, derivatives against weak ones and differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear
from sklearn.linear_model import ElasticNet as SklearnElasticNet
from sklearn.linear_model import Lasso

import bilevel as bl
from bilevel import prox
from bilevel.closure import Autocast, Closure
from bilevel.hypergrad.base import Point
from bilevel.hypergrad.composite import ActiveSet, CompositeStatement, ProxJacobian
from bilevel.inner.first_look import LOOKED
from bilevel.linalg.operator import Dense
from bilevel.problem import Problem
from tests.conformance import check_operator, randn, relative_error

X, TARGET = randn(40, 12, seed=1), randn(40, seed=2) + 2 * randn(40, 12, seed=1)[:, :3].sum(-1)
START = torch.zeros(12, dtype=torch.float64)


def least_squares(y, x=X):
    return (x @ y - TARGET).square().mean() / 2


def fit(penalty, objective=least_squares, start=START, hypergrad=bl.Implicit(bl.CG(rtol=1e-12)), **settings):  # noqa: B008
    solver = bl.ProximalGradient(penalty, tol=1e-12, **settings)
    return bl.argmin(objective, start, solver=solver, hypergrad=hypergrad, throw="ignore")


@pytest.mark.parametrize("accelerated", [True, False])
def test_lasso_and_elastic_net_are_scikit_learns(accelerated):
    for strength in (0.05, 0.3, 1.0) if accelerated else (0.5,):
        ours = fit(prox.L1(strength), accelerated=accelerated)
        theirs = Lasso(strength, fit_intercept=False, tol=1e-14, max_iter=100000).fit(X.numpy(), TARGET.numpy())
        np.testing.assert_allclose(ours.value.numpy(), theirs.coef_, atol=1e-8)
        assert ours.stats["residual_norm"] <= 1e-8
    ours = fit(prox.ElasticNet(0.2 * 0.7, 0.2 * 0.3))
    net = SklearnElasticNet(0.2, l1_ratio=0.7, fit_intercept=False, tol=1e-14, max_iter=100000)
    np.testing.assert_allclose(ours.value.numpy(), net.fit(X.numpy(), TARGET.numpy()).coef_, atol=1e-8)


def test_box_is_scipys():
    ours = fit(prox.Box(-0.2, 0.5))
    theirs = lsq_linear(X.numpy(), TARGET.numpy(), (-0.2, 0.5), tol=1e-14).x
    np.testing.assert_allclose(ours.value.numpy(), theirs, atol=1e-7)


LINEAR = [bl.CG(rtol=1e-12), bl.MINRES(rtol=1e-12), bl.Cholesky(), bl.GMRES(rtol=1e-12), None]


@pytest.mark.parametrize("linear", LINEAR, ids=repr)
def test_the_weak_derivative_of_the_lasso(linear):
    """d y_S / d strength = -(X_S'X_S / m)^{-1} sign(y_S), zero off the support (Bertrand et al. 2020)."""
    strength = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    found = fit(prox.L1(strength), hypergrad=bl.Implicit(linear))
    support = found.value.detach() != 0
    assert 0 < support.sum() < 12
    weights = randn(12, seed=3)
    (grad,) = torch.autograd.grad((found.value * weights).sum(), strength)
    reduced = X[:, support].mT @ X[:, support] / 40
    truth = -torch.linalg.solve(reduced, found.value.detach()[support].sign()) @ weights[support]
    assert grad.item() == pytest.approx(truth.item(), rel=1e-8)
    assert found.adjoint.result is bl.Result.CONVERGED


def derivative_and_difference(penalty_of, hparam, objective=least_squares, hypergrad=bl.Implicit()):  # noqa: B008
    """Hypergradient of a fixed outer loss along a random direction, and its central difference."""
    x = hparam.clone().requires_grad_()

    def loss(x):
        found = fit(penalty_of(x), lambda y: objective(y), hypergrad=hypergrad, max_steps=50000)
        return (found.value - randn(12, seed=4)).square().sum()

    (grad,) = torch.autograd.grad(loss(x), x)
    direction = randn(*hparam.shape, seed=5) if hparam.dim() else torch.ones_like(hparam)
    step = 1e-6
    with torch.no_grad():
        slope = (loss(hparam + step * direction) - loss(hparam - step * direction)) / (2 * step)
    return (grad * direction).sum().item(), slope.item()


GROUPS = torch.arange(12) // 3


@pytest.mark.parametrize(
    ("penalty_of", "hparam"),
    [
        (lambda x: prox.L1(x.exp()), torch.full((12,), -1.0)),
        (lambda x: prox.ElasticNet(x[0].exp(), x[1].exp()), torch.tensor([-1.0, -2.0])),
        (lambda x: prox.GroupLasso(GROUPS, x.exp()), torch.tensor([-1.0, -0.5, -1.0, -0.2])),
        (lambda x: prox.Box(-x[0].exp(), x[1]), torch.tensor([-1.0, 0.4])),
        (lambda x: prox.Simplex(x), torch.tensor(1.3)),
        (lambda x: prox.L2Ball(x), torch.tensor(0.8)),
    ],
    ids=["L1 each", "elastic net", "group lasso", "box", "simplex", "ball"],
)
def test_settings_of_every_prox_are_hyperparameters(penalty_of, hparam):
    found, difference = derivative_and_difference(penalty_of, hparam.double())
    assert found == pytest.approx(difference, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    "penalty", [prox.L1(0.3), prox.NonNegative(), prox.L2Ball(0.7)], ids=lambda p: type(p).__name__
)
def test_hyperparameters_of_the_smooth_part(penalty):
    weights = randn(40, seed=6)

    def loss(weights):
        def objective(y):
            return (weights.exp() * (X @ y - TARGET).square()).mean() / 2

        return (fit(penalty, objective, hypergrad=bl.Implicit(), max_steps=50000).value - 1).square().sum()

    x = weights.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(x), x)
    direction, step = randn(40, seed=7), 1e-6
    with torch.no_grad():
        slope = (loss(weights + step * direction) - loss(weights - step * direction)) / (2 * step)
    assert (grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)


def test_second_derivatives_and_transforms_on_the_active_set():
    def solve(log_strength, target):
        def objective(y, target):
            return (X @ y - target).square().mean() / 2 + y.pow(4).sum() / 10

        solver = bl.ProximalGradient(prox.L1(log_strength.exp()), tol=1e-11, max_steps=2000)
        return bl.argmin(
            objective, START, target, solver=solver, hypergrad=bl.Implicit(bl.Cholesky()), throw="ignore"
        ).value

    strength = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    target = TARGET.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: solve(s, target.detach()), (strength,), check_forward_ad=True, rtol=1e-5)
    assert torch.autograd.gradgradcheck(lambda s: solve(s, target.detach()), (strength,), rtol=1e-4, atol=1e-6)

    def total(s):
        return solve(s, TARGET).square().sum()

    many = torch.tensor([-2.0, -1.0, -0.5], dtype=torch.float64)
    each = torch.stack([torch.func.grad(total)(s) for s in many])
    torch.testing.assert_close(torch.vmap(torch.func.grad(total))(many), each, rtol=1e-6, atol=1e-9)


def test_a_batch_is_its_problems():
    """Sixteen strengths at once, each with its own step size and stopping."""
    targets = TARGET + randn(4, 40, seed=8)
    strengths = torch.logspace(-2, 0, 4, dtype=torch.float64).unsqueeze(-1).requires_grad_()

    def objective(y):
        return ((X @ y.unsqueeze(-1)).squeeze(-1) - targets).square().mean(-1) / 2

    together = fit(prox.L1(strengths), objective, START.expand(4, -1))
    assert together.stats["num_steps"].shape == (4,)
    assert len(set(together.stats["num_steps"].tolist())) > 1
    (grads,) = torch.autograd.grad(together.value.square().sum(), strengths)
    for task in range(4):
        strength = strengths[task].detach().squeeze().requires_grad_()
        alone = fit(prox.L1(strength), lambda y, t=task: (X @ y - targets[t]).square().mean() / 2)
        assert relative_error(together.value[task], alone.value) <= 1e-8
        (grad,) = torch.autograd.grad(alone.value.square().sum(), strength)
        assert grads[task].item() == pytest.approx(grad.item(), rel=1e-6)


def test_trees_and_module_parameters():
    model = torch.nn.Linear(12, 1).double()
    strength = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    def objective(params):
        return (torch.func.functional_call(model, params, (X,)).squeeze(-1) - TARGET).square().mean() / 2

    found = fit(prox.L1(strength), objective, dict(model.named_parameters()))
    assert (found.value["weight"] == 0).any()
    (grad,) = torch.autograd.grad(found.value["weight"].square().sum(), strength)
    assert grad < 0


def test_outcomes_and_bad_input():
    solver = bl.ProximalGradient(prox.L1(0.1), max_steps=2)
    with pytest.warns(bl.SolveWarning, match=r"inner solve: the step limit"):
        bl.argmin(least_squares, START, solver=solver)
    plain = bl.argmin(least_squares, START, solver=bl.ProximalGradient(prox.L1(0.1)), hypergrad=None)
    assert not plain.value.requires_grad
    assert plain.result is bl.Result.CONVERGED
    with pytest.raises(TypeError, match=r"prox is 0\.1"):
        bl.ProximalGradient(0.1)
    with pytest.raises(ValueError, match="step_size"):
        bl.ProximalGradient(prox.L1(), step_size=0.0)
    with pytest.raises(TypeError, match="needs Steps"):
        bl.argmin(least_squares, START, solver=solver, hypergrad=bl.Unroll())


def at_solution(penalty):
    """A statement without hyperparameters, at its solution, and the dense Jacobian of its residual."""
    value = fit(penalty, max_steps=50000, hypergrad=None).value
    spec, pair = (torch.utils._pytree.tree_structure(tree) for tree in ([value], [value, value]))
    closures = [
        Closure(fn, of, (), [], Autocast.current(value.device))
        for fn, of in ((lambda params: least_squares(params[0]), spec), (lambda both: penalty.prox(*both), pair))
    ]
    point = Point(CompositeStatement(*closures, penalty.separable), [value], [], 0, "raise")
    jacobian = torch.func.jacrev(lambda y: point.statement.residual([y], [])[0])(value)
    return point, jacobian


HESSIAN = X.mT @ X / 40
PENALTIES = [
    prox.L1(0.3),
    prox.ElasticNet(0.3, 0.5),
    prox.Box(-0.2, 0.5),
    prox.GroupLasso(GROUPS, 0.4),
    prox.Simplex(1.3),
    prox.L2Ball(0.7),
]


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("transpose", [True, False])
def test_systems_are_those_of_the_whole_jacobian(penalty, transpose):
    """On the active set or not, ``J^T u = b`` and ``J w = b`` are solved, by one operator of the smooth part."""
    point, jacobian = at_solution(penalty)
    assert not torch.allclose(jacobian, jacobian.mT, atol=1e-3)
    b, seen = randn(12, seed=3), []

    def solve(operator, right):
        seen.append(operator)
        return bl.LU().solve(operator, right)

    found = point.statement.solve(point, Dense(HESSIAN), b, transpose, solve).value
    truth = torch.linalg.solve(jacobian.mT if transpose else jacobian, b)
    assert relative_error(found, truth) <= 1e-10
    assert isinstance(seen[0], ActiveSet) == penalty.separable


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: type(p).__name__)
def test_operators_conform(penalty):
    point, jacobian = at_solution(penalty)
    at = point.linearization()
    check_operator(ProxJacobian(Dense(HESSIAN), at), jacobian)
    if penalty.separable:
        (diagonal,) = torch.autograd.grad(at.shrunk.sum(), at.z, retain_graph=True)
        support = diagonal > 0
        assert 0 < support.sum() < 12
        truth = torch.where(support & support[:, None], HESSIAN, 0.0)
        extra = torch.where(support, (1 / diagonal.clamp_min(1e-9) - 1) / at.step, 1 / at.step)
        check_operator(ActiveSet(Dense(HESSIAN), diagonal, at.step), truth + torch.diag(extra))


SCALED = [
    (lambda x, scale: prox.L1(x * scale), 1e-6),
    (lambda x, scale: prox.Box(-x, x), 1e-6),
    (lambda x, scale: prox.GroupLasso(GROUPS, x * scale), 1e-4),
    (lambda x, scale: prox.Simplex(x), 1e-4),
]


@pytest.mark.parametrize(("penalty_of", "tolerance"), SCALED, ids=["L1", "box", "group lasso", "simplex"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_scale_of_the_loss_does_not_matter(penalty_of, tolerance, dtype):
    """As small as 1e-25 in float32: the same steps, the same derivative, by default settings."""
    data, target = X.to(dtype), TARGET.to(dtype)

    def derivative(scale):
        x = torch.tensor(0.3, dtype=dtype, requires_grad=True)
        found = bl.argmin(
            lambda y: scale * ((data @ y - target).square().mean() / 2),
            START.to(dtype),
            solver=bl.ProximalGradient(penalty_of(x, scale)),
            throw="raise",
        )
        (grad,) = torch.autograd.grad((found.value - 1).square().sum(), x)
        return grad.double(), found.stats["num_steps"]

    (base, steps), exact = derivative(1.0), tolerance if dtype == torch.float32 else 1e-9
    for scale in (1e-25, 1e-12, 1e6):
        grad, more = derivative(scale)
        assert relative_error(grad, base) <= max(exact, tolerance if dtype == torch.float32 else 1e-8)
        assert abs(int(more) - int(steps)) <= 2


def test_steps_do_not_collapse_at_rounding():
    """The linear part of the loss does not vanish at a composite minimum, so its rounding must not reject steps."""
    found = fit(prox.ElasticNet(0.3679, 0.1353))
    assert found.result is bl.Result.CONVERGED
    assert found.stats["num_steps"] < 100  # thousands, where they were rejected
    assert found.stats["step_size"] > 0.1


def test_a_warm_start_makes_no_step():
    first = fit(prox.L1(0.3))
    again = bl.argmin(least_squares, first.value, solver=bl.ProximalGradient(prox.L1(0.3)))
    assert again.stats["num_steps"] == 0
    assert torch.equal(again.value, first.value)


@pytest.mark.parametrize(
    "operator", ["func", bl.GaussNewton(lambda y: X @ y, lambda p: (p - TARGET).square().mean() / 2)]
)
@pytest.mark.parametrize("penalty_of", [prox.L1, lambda s: prox.GroupLasso(GROUPS, s)], ids=["L1", "group lasso"])
def test_operators_of_the_smooth_part(operator, penalty_of):
    """Least squares is its own Gauss-Newton approximation, so every way to the Hessian gives the same."""
    strength = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    grads = []
    for implicit in (bl.Implicit(), bl.Implicit(operator=operator)):
        found = fit(penalty_of(strength), hypergrad=implicit)
        grads.append(torch.autograd.grad(found.value.square().sum(), strength)[0])
    assert relative_error(*grads) <= 1e-8
    damped = fit(penalty_of(strength), hypergrad=bl.Implicit(operator=operator, damping=1.0))
    assert relative_error(torch.autograd.grad(damped.value.square().sum(), strength)[0], grads[0]) > 1e-2


def test_leaves_that_the_objective_does_not_use():
    upper = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    start = {"used": torch.zeros(2, dtype=torch.float64), "unused": torch.full((2,), 0.5, dtype=torch.float64)}
    found = fit(prox.Box(0.0, 2.0), lambda params: (params["used"] - upper).square().sum(), start)
    total = found.value["used"].sum() + found.value["unused"].square().sum()
    assert torch.autograd.grad(total, upper)[0].item() == pytest.approx(2)
    assert found.adjoint.result is bl.Result.CONVERGED


class Product(torch.autograd.Function):
    """Old style: without ``setup_context``, so that `torch.func` cannot pass it."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return grad * b, grad * a


def test_custom_functions_as_in_smooth_problems():
    """Followed as an argument; refused where captured, since the hypergradient would silently be missing."""
    factor = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def objective(y, factor):
        return (Product.apply(y, factor) - 1).square().sum() / 2

    start, solver = torch.zeros(2, dtype=torch.float64), bl.ProximalGradient(prox.L1(0.1), tol=1e-12)
    found = bl.argmin(objective, start, factor, solver=solver)
    # y = (f - 0.1) / f^2
    (grad,) = torch.autograd.grad(found.value.sum(), factor)
    torch.testing.assert_close(grad, -1 / factor.detach() ** 2 + 0.2 / factor.detach() ** 3)
    with pytest.raises(ValueError, match="cannot be followed"):
        bl.argmin(lambda y: objective(y, factor), start, solver=solver)


def test_fallback_where_the_support_is_not_convex():
    """A saddle of g on the support: CG says so, and MINRES solves what is regular all the same."""
    strength = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    start = torch.tensor([0.9, 1.1], dtype=torch.float64)  # the stationary point, found at once

    def objective(y):
        return (signs * (y - 1).square()).sum() / 2

    solver = bl.ProximalGradient(prox.L1(strength))
    with pytest.raises(bl.SolveError, match="negative curvature"):
        bl.argmin(objective, start, solver=solver, throw="raise").value.sum().backward()
    with pytest.warns(bl.SolveWarning, match="negative curvature"):
        found = bl.argmin(objective, start, solver=solver, throw="fallback")
    weights = torch.tensor([3.0, 5.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad(found.value @ weights, strength)
    assert found.adjoint.recovered == ("MINRES",)
    assert grad.item() == pytest.approx(-3.0 + 5.0, rel=1e-3)


def test_second_derivative_through_a_prox_that_is_not_separable():
    """Towards the radius of the ball: the smooth part has a third derivative, so that all terms count."""

    def solve(radius):
        def objective(y):
            return (X[:, :4] @ y - TARGET).square().mean() / 2 + y.pow(4).sum() / 10

        solver = bl.ProximalGradient(prox.L2Ball(radius), tol=1e-12, max_steps=2000)
        return bl.argmin(objective, START[:4], solver=solver, hypergrad=bl.Implicit(bl.LU()), throw="ignore").value

    radius = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(solve, (radius,), rtol=1e-4, atol=1e-6)


def test_solves_inside_a_batch_are_independent():
    """Other problems beside it change no bit of a solution."""
    targets = TARGET + randn(3, 40, seed=8)

    def minimize(targets):
        def objective(y):
            return ((X @ y.unsqueeze(-1)).squeeze(-1) - targets).square().mean(-1) / 2

        return bl.ProximalGradient(prox.L1(0.3)).minimize(Problem(objective, START.expand(len(targets), -1)))

    together, alone = minimize(targets), minimize(targets[1:])
    assert torch.equal(together.value[1:], alone.value)
    assert torch.equal(together.stats["num_steps"][1:], alone.stats["num_steps"])


def test_a_failed_solve_says_what_to_try_and_a_random_objective_is_named():
    few = bl.ProximalGradient(prox.L1(0.1), max_steps=2)
    with pytest.warns(bl.SolveWarning, match="raise max_steps, loosen tol, or start closer"):
        bl.argmin(least_squares, START, solver=few)
    torch.manual_seed(0)
    with pytest.warns(bl.SolveWarning, match="it is random \\(dropout"):
        bl.argmin(lambda w: least_squares(w) * (1 + 0.1 * torch.rand(())), START, solver=few)


@pytest.mark.parametrize("penalty", [prox.L1(0.1), prox.ElasticNet(0.1, 0.01), prox.Box(-1.0, 1.0)], ids=repr)
def test_what_float32_cannot_reach_is_told(penalty):
    """Features that are not centred: the params were 2e-3 off, the gradient by half, CONVERGED."""
    X = (randn(60, 30, seed=1) + 30).float()
    y = (X[:, :3].sum(-1) + randn(60, seed=2).float()).float()

    def fitted(X, y):
        start = torch.zeros(30, dtype=X.dtype)
        objective = lambda w: (X @ w - y).square().mean() / 2  # noqa: E731
        return bl.argmin(objective, start, solver=bl.ProximalGradient(penalty, max_steps=100_000), hypergrad=None)

    with pytest.warns(bl.SolveWarning, match="less accurate than a solve without a tolerance promises"):
        fit = fitted(X, y)
    assert fit.result is bl.Result.INACCURATE
    near = fitted(X - 30, y - y.mean())
    assert near.result is bl.Result.CONVERGED
    assert relative_error(near.value.double(), fitted((X - 30).double(), (y - y.mean()).double()).value) <= 3e-4


@pytest.mark.parametrize("penalty", [prox.Box(-3.0, 3.0), prox.L2Ball(3.0)], ids=repr)
def test_a_saddle_is_told_where_the_prox_holds_nothing(penalty):
    start = torch.zeros(2, dtype=torch.float64)

    def well(y):
        return (y[0] ** 2 - 1) ** 2 + (y[1] - 0.3) ** 2

    LOOKED._met.pop(well.__code__, None)  # each prox is to meet it for the first time
    with pytest.warns(bl.SolveWarning, match="bends down"):
        bl.argmin(well, start, solver=bl.ProximalGradient(penalty), hypergrad=None)
    with pytest.warns(bl.SolveWarning, match="curvature"):
        stays = bl.argmin(lambda y: (y[0] ** 2 - 1) ** 2, start[:1], solver=bl.ProximalGradient(penalty))
    assert stays.result is bl.Result.NEGATIVE_CURVATURE
    held = bl.ProximalGradient(prox.Box(0.5, 3.0))  # concave at the bound, and a minimum all the same
    bl.argmin(lambda y: (y - 0.1 * y.square()).sum(), start, solver=held, throw="raise")


@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize("start", [1.0, 100.0, 1e4])
def test_momentum_that_leaves_the_domain_starts_anew(start, accelerated):
    """Poisson regression is NaN where a rate is negative: the step size collapsed, and the point was CONVERGED."""
    random = torch.Generator().manual_seed(0)
    a = torch.rand(30, 6, generator=random, dtype=torch.float64)
    counts = torch.poisson(a @ torch.tensor([5.0, 0, 3, 0, 8, 1], dtype=torch.float64), generator=random)

    def loss(y):
        rates = y @ a.T
        return (rates - counts * torch.log(rates)).sum(-1)

    one = torch.ones(6, dtype=torch.float64)
    best = loss(bl.argmin(loss, one, solver=bl.LBFGS(bounds=(0.0, None)), hypergrad=None).value)
    solver = bl.ProximalGradient(bl.prox.NonNegative(), max_steps=20_000, accelerated=accelerated)
    starts = torch.stack([start * one, one])  # the problems of a batch do not disturb each other
    fit = bl.argmin(loss, starts, solver=solver, hypergrad=None, throw="ignore")
    solved = fit.stats["result"] == int(bl.Result.CONVERGED)
    assert (loss(fit.value)[solved] < best + 1e-9).all()
    assert solved.all() or not accelerated
