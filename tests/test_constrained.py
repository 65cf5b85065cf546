"""`constrained` and `Bisection`: against closed forms, SciPy and differences; what is no minimum is told."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import torch

import bilevel as bl
from bilevel import Bisection, LeastNorm, Result
from bilevel.linalg.scaled import SMALL
from tests.conformance import randn, spd


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_a_quadratic_with_linear_constraints_is_a_quadratic_program():
    """Values, multipliers and derivatives, of a batch."""
    Q, c, A, b = spd(5, batch=(3,)), randn(3, 5), randn(3, 2, 5), randn(3, 2)
    for x in (Q, c, A, b):
        x.requires_grad_()

    def objective(y):
        return torch.einsum("ti,tij,tj->t", y, Q, y) / 2 + (c * y).sum(-1)

    def gap(y):
        return (A @ y.unsqueeze(-1)).squeeze(-1) - b

    fit = bl.constrained(objective, gap, torch.zeros(3, 5, dtype=torch.float64), batched=True, throw="raise")
    truth = bl.quadratic_program((Q + Q.mT) / 2, c, A, b)
    torch.testing.assert_close(fit.value.params, truth.value.primal, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(fit.value.multipliers, truth.value.equality, rtol=1e-7, atol=1e-9)
    weights = randn(3, 5, seed=4)
    ours = torch.autograd.grad((weights * fit.value.params).sum() + fit.value.multipliers.sum(), (Q, c, A, b))
    theirs = torch.autograd.grad((weights * truth.value.primal).sum() + truth.value.equality.sum(), (Q, c, A, b))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("start", [[1.0, 1.0], [-3.0, 0.1], [0.2, -5.0], [0.0, 0.0]])
def test_a_curved_constraint_from_many_starts(start):
    """The point of an ellipse that is nearest to a line's direction: closed form, with its slope by the axes."""
    axes = tensor([2.0, 0.5]).requires_grad_()
    direction = tensor([1.0, 3.0])

    def ellipse(y):
        return ((y / axes).square().sum() - 1).unsqueeze(0)

    fit = bl.constrained(lambda y: direction @ y, ellipse, tensor(start), throw="raise")
    size = (axes * direction).square().sum().sqrt()
    torch.testing.assert_close(fit.value.params, -(axes**2) * direction / size, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(fit.value.multipliers, (size / 2).unsqueeze(0), rtol=1e-7, atol=0)
    grads = [torch.autograd.grad(v, axes, retain_graph=True)[0] for v in (fit.value.params[0], -(axes[0] ** 2) / size)]
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-9)


def test_a_nonconvex_program_is_scipys():
    """Hock and Schittkowski's problem 26, with a hyperparameter; the derivative by differences."""

    def parts(x):
        return (
            lambda y: (y[0] - y[1]).square() + (y[1] - x * y[2]).pow(4) + 0.1 * y.square().sum(),
            lambda y: ((1 + y[1] ** 2) * y[0] + y[2] ** 4 - 3).unsqueeze(0),
        )

    def fitted(x):
        return bl.constrained(*parts(x), tensor([-2.6, 2.0, 2.0]), throw="raise").value.params

    x = tensor(1.2).requires_grad_()
    f, c = parts(tensor(1.2))
    theirs = scipy.optimize.minimize(
        lambda y: f(torch.tensor(y)).item(), [-2.6, 2.0, 2.0], method="SLSQP", options={"ftol": 1e-15, "maxiter": 500},
        constraints={"type": "eq", "fun": lambda y: c(torch.tensor(y)).numpy()},
    )  # fmt: skip
    np.testing.assert_allclose(fitted(x).detach().numpy(), theirs.x, atol=1e-5)
    (slope,) = torch.autograd.grad(fitted(x)[2], x)
    h = 1e-5
    assert slope.item() == pytest.approx(
        ((fitted(tensor(1.2 + h)) - fitted(tensor(1.2 - h)))[2] / (2 * h)).item(), rel=1e-6
    )


def test_transforms():
    def price(radius):
        circle = lambda y: (y.square().sum() - radius**2).unsqueeze(0)  # noqa: E731
        return bl.constrained(lambda y: y[0] + 2 * y[1], circle, tensor([0.5, -1.0])).value.multipliers[0]

    radii = tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(torch.vmap(price)(radii), math.sqrt(5) / (2 * radii))
    torch.testing.assert_close(torch.func.grad(price)(tensor(2.0)), tensor(-math.sqrt(5) / 8))


def test_a_tree_of_params():
    target = {"w": randn(2, 3), "b": randn(2)}
    fit = bl.constrained(
        lambda p: sum((p[k] - target[k]).square().sum() for k in p),
        lambda p: p["w"].sum(1) + p["b"],
        {"w": torch.zeros(2, 3).double(), "b": torch.zeros(2).double()},
        throw="raise",
    )
    excess = (target["w"].sum(1) + target["b"]) / 4
    torch.testing.assert_close(fit.value.params["w"], target["w"] - excess[:, None])
    torch.testing.assert_close(fit.value.params["b"], target["b"] - excess)


@pytest.mark.parametrize("curvature", [100.0, 1e4])
def test_a_curvature_that_only_the_constraint_holds_raises_the_strength(curvature):
    """The first augmented Lagrangians fall without end: closed form of values, multiplier and slopes."""
    x = tensor(1.5).requires_grad_()
    objective = lambda y: -curvature * y[0] ** 2 + (y[1] - x) ** 2  # noqa: E731
    fit = bl.constrained(objective, lambda y: (y[0] - x)[None], tensor([0.0, 1.0]), throw="raise")
    torch.testing.assert_close(fit.value.params, torch.stack([x, x]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fit.value.multipliers, 2 * curvature * x[None], rtol=1e-9, atol=0)
    (slope,) = torch.autograd.grad(fit.value.params.sum() + fit.value.multipliers[0], x)
    assert slope.item() == pytest.approx(2 + 2 * curvature, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("objective", [lambda y: -y.square().sum(-1), lambda y: y[..., 0] - y[..., 1].exp()])
def test_an_objective_without_a_minimum_along_the_constraints_is_told(objective, dtype):
    """Whether the start meets the constraint or not; and of a batch each problem by itself."""
    line = lambda y: y.sum(-1, keepdim=True) - 1  # noqa: E731
    for start in ([1.0, 0.0], [0.3, 0.1]):
        with pytest.raises(bl.SolveError, match=r"falls? without end"):
            bl.constrained(objective, line, torch.tensor(start, dtype=dtype), throw="raise")
    signs = torch.tensor([1.0, -1.0], dtype=dtype)
    start = torch.tensor([[0.3, 0.1], [0.3, 0.1]], dtype=dtype)
    fit = bl.constrained(lambda y: signs * y.square().sum(-1), line, start, batched=True, throw="ignore")
    assert fit.stats["result"][0] == int(Result.CONVERGED)
    assert fit.stats["result"][1] >= int(Result.NEGATIVE_CURVATURE)
    torch.testing.assert_close(fit.value.params[0], torch.full((2,), 0.5, dtype=dtype), rtol=3e-5, atol=3e-5)
    many = torch.linspace(-1, 1, SMALL, dtype=dtype)
    with pytest.raises(bl.SolveError, match="seems to fall without end where the constraints hold"):
        bl.constrained(lambda y: -y.square().sum(), line, many, throw="raise")


def test_a_maximum_a_set_that_is_empty_and_constraints_that_repeat_are_told():
    circle = lambda y: (y.square().sum() - 1).unsqueeze(0)  # noqa: E731
    with pytest.warns(bl.SolveWarning, match="Lagrange"):
        fit = bl.constrained(lambda y: y[0], circle, tensor([0.9, 0.1]), solver=bl.Newton(LeastNorm()))
    assert fit.result is Result.NEGATIVE_CURVATURE
    with pytest.warns(bl.SolveWarning, match="constrained solve"):
        bl.constrained(lambda y: y[0], lambda y: (y.square().sum() + 1).unsqueeze(0), tensor([0.9, 0.1]))
    double = lambda y: torch.stack([y.sum() - 1, 2 * (y.sum() - 1)])  # noqa: E731
    with pytest.warns(bl.SolveWarning, match="degenerate") as heard:
        fit = bl.constrained(lambda y: y.square().sum(), double, tensor([0.9, 0.1]))
    assert heard[0].filename == __file__
    torch.testing.assert_close(fit.value.params, tensor([0.5, 0.5]))
    assert fit.stats["degenerate"]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"constraints": lambda y: y.sum()}, ValueError, "vector"),
        ({"constraints": 3}, TypeError, "constraints is 3"),
        ({"hypergrad": bl.Unroll()}, TypeError, "Implicit"),
    ],
)
def test_bad_input(settings, error, words):
    given = {"constraints": lambda y: y[:1], **settings}
    with pytest.raises(error, match=words):
        bl.constrained(lambda y: y.square().sum(), given.pop("constraints"), tensor([1.0, 2.0]), **given)
    with pytest.raises(TypeError, match=r"bl\.constrained"):
        bl.root(lambda y: y - 1, tensor([0.0]), solver=bl.AugmentedLagrangian())


def test_bisection_of_a_batch_that_newton_cannot_start():
    """Flat at the start and beyond; with the derivative of each root."""
    level = tensor([0.1, 0.5, 0.999]).requires_grad_()
    residual = lambda y: torch.tanh(20 * (y - 3)) - level  # noqa: E731
    fit = bl.root(residual, torch.zeros(3, dtype=torch.float64), solver=Bisection(-10.0, 50.0), throw="raise")
    truth = 3 + torch.atanh(level) / 20
    torch.testing.assert_close(fit.value, truth, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(value.sum(), level, retain_graph=True)[0] for value in (fit.value, truth)]
    torch.testing.assert_close(*grads, rtol=1e-7, atol=0)
    each = bl.root(
        lambda y: residual(y.squeeze(-1)).unsqueeze(-1),
        torch.zeros(3, 1, dtype=torch.float64),
        batched=True,
        solver=Bisection(tensor([[0.0], [1.0], [2.0]]), 20.0),
        throw="raise",
    )
    torch.testing.assert_close(each.value.squeeze(-1), truth, rtol=1e-12, atol=0)


def test_bisection_tells_where_there_is_no_root():
    for function, words in (
        (lambda y: y.square() + 1, "does not change its sign"),
        (lambda y: 1 / (y - 0.3), "changes its sign without vanishing"),
    ):
        with pytest.warns(bl.SolveWarning, match=words):
            fit = bl.root(function, tensor([0.0]), solver=Bisection(-1.0, 2.0))
        assert fit.result is Result.STAGNATED
    levels = tensor([[2.0], [-1.0], [3.0]])
    with pytest.raises(bl.SolveError, match="sign between lower and upper in 1 of 3 problems") as raised:
        bl.root(lambda y: y**2 - levels, 0 * levels, batched=True, solver=Bisection(0.0, 9.0), throw="raise")
    assert raised.value.solution.stats["bracketed"].tolist() == [True, False, True]
    with pytest.warns(bl.SolveWarning, match="step limit"):
        bl.root(lambda y: y - 0.3, tensor([0.0]), solver=Bisection(-1.0, 2.0, max_steps=5))
    at_zero = bl.root(lambda y: y.pow(3), tensor([0.5]), solver=Bisection(-1.0, 2.0), hypergrad=None, throw="raise")
    assert abs(at_zero.value.item()) < 1e-29
    with pytest.raises(ValueError, match="bracket"):
        Bisection(1.0, 0.0)


@pytest.mark.parametrize(("lr", "steps"), [(0.01, 5), (0.1, 50), (10.0, 5), (0.001, 500)])
def test_inner_steps_that_are_too_long_or_few_do_no_harm(lr, steps):
    inner = bl.GradientDescent(lr, steps)
    fit = bl.constrained(
        lambda y: ((y - 2) ** 2).sum(),
        lambda y: (y.sum() - 1)[None],
        tensor([0.0, 0.0]),
        solver=bl.AugmentedLagrangian(inner=inner),
        throw="raise",
    )
    torch.testing.assert_close(fit.value.params, tensor([0.5, 0.5]), rtol=1e-9, atol=0)
    torch.testing.assert_close(fit.value.multipliers, tensor([3.0]), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"solver": bl.LBFGS()}, r"AugmentedLagrangian\(inner=LBFGS"),
        ({"solver": bl.AugmentedLagrangian}, "is the class"),
        ({"warm_start": 3}, "warm_start is"),
        ({"solver": bl.AugmentedLagrangian(inner=bl.LBFGS(bounds=(0.0, 0.7)))}, "with bounds, a prox"),
        ({"solver": bl.AugmentedLagrangian(inner=bl.ProximalGradient(bl.prox.Box(0.0, 0.7)))}, "with bounds, a prox"),
        ({"solver": bl.AugmentedLagrangian(inner=bl.Steps(bl.SGD(0.01, weight_decay=5.0), 9))}, "or a weight decay"),
    ],
    ids=range(6),
)
def test_solvers_of_other_problems_are_refused(settings, told):
    with pytest.raises(TypeError, match=told):
        bl.constrained(lambda y: y.square().sum(), lambda y: (y.sum() - 1)[None], tensor([0.0, 0.0]), **settings)


@pytest.mark.parametrize("apart", [1e-2, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constraints_that_no_point_meets_are_not_met(apart, dtype):
    """Large multipliers hid the gap, which Newton's step does not see."""

    def fit(constraints, start, **settings):
        return bl.constrained(lambda w: (w - 1).square().sum(-1), constraints, start, throw="ignore", **settings)

    start = torch.zeros(3, dtype=dtype)
    found = fit(lambda w: torch.stack([w[0] - 3, w[0] - 3 - apart]), start)
    assert not found.result.ok
    found = fit(lambda w: torch.cat([w - 3, w - 3 - apart]), start)
    assert not found.result.ok
    # Of two problems one.
    ends = torch.tensor([[3.0, 3.0], [3.0, 3.0 + apart]], dtype=dtype)
    found = fit(lambda w: w[..., :1] - ends, torch.zeros(2, 3, dtype=dtype), batched=True)
    codes = found.stats["result"]
    assert codes[1] > int(bl.Result.STEPS_DONE)
    assert codes[0] <= int(bl.Result.STEPS_DONE)


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_constraints_that_are_met_at_once_are_met(start):
    """At the start, at the minimum without them, and through zero."""
    w = torch.full((3,), start, dtype=torch.float64)
    for constraints in (lambda w: w.sum(-1, keepdim=True) - 3, lambda w: w[:1] - w[1:2], lambda w: w[:1] - 1):
        found = bl.constrained(lambda w: (w - 1).square().sum(), constraints, w, throw="raise")
        torch.testing.assert_close(found.value.params, torch.ones(3, dtype=torch.float64))
    found = bl.constrained(lambda w: w.square().sum(), lambda w: w.sum(-1, keepdim=True), w, throw="raise")
    assert found.value.params.abs().max() < 1e-8


UNITS = [(1e5, 1, 1), (1e8, 1, 1), (1e-6, 1, 1), (1, 1e5, 1), (1, 1e-5, 1), (1, 1, 1e4), (1, 1, 1e-4), (1e6, 1e-4, 1e3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", [[0.9, 0.4], [0.1, -2.0], [0.0, 0.0]])
def test_units_of_loss_constraints_and_params_do_not_matter(start, dtype):
    """The ellipse again, each problem of a batch in units of its own; and one problem alone."""
    loss, gap, unit = (torch.tensor(column, dtype=dtype).unsqueeze(-1) for column in zip(*UNITS, strict=True))
    axes, direction = torch.tensor([2.0, 0.5], dtype=dtype).requires_grad_(), torch.tensor([1.0, 3.0], dtype=dtype)

    def posed(loss, gap, unit):
        return (
            lambda y: (loss * direction * (y / unit)).sum(-1),
            lambda y: gap * ((y / unit / axes).square().sum(-1, keepdim=True) - 1),
            unit * torch.tensor(start, dtype=dtype),
        )

    size = (axes * direction).square().sum().sqrt()
    truth = -(axes**2) * direction / size
    near = {"rtol": 1e-7, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    many = bl.constrained(*posed(loss, gap, unit), batched=True, throw="raise")
    alone = [
        bl.constrained(*posed(*row), throw="raise")
        for row in zip(loss.unbind(), gap.unbind(), unit.unbind(), strict=True)
    ]
    params = torch.stack([fit.value.params for fit in alone])
    multipliers = torch.stack([fit.value.multipliers for fit in alone])
    want = torch.autograd.grad(truth @ truth.new_tensor([1.0, -2.0]), axes, retain_graph=True)[0]
    for found, prices in ((many.value.params, many.value.multipliers), (params, multipliers)):
        torch.testing.assert_close(found / unit, truth.expand_as(found), **near)
        torch.testing.assert_close(prices * gap / loss, (size / 2).expand_as(prices), **near)
        for row in found / unit:
            slope = torch.autograd.grad(row @ row.new_tensor([1.0, -2.0]), axes, retain_graph=True)[0]
            torch.testing.assert_close(slope, want, rtol=near["rtol"], atol=10 * near["atol"])


def test_units_that_the_start_does_not_show():
    """At zero, a constraint and a loss without a slope there."""
    targets = tensor([1.0, 2.0, 0.5])

    def solved(loss, gap):
        return bl.constrained(
            lambda y: loss * (y.pow(4).sum() + (y - targets).pow(2).sum()),
            lambda y: gap * torch.stack([y.sum() - 1, y[0] * y[1] - 0.1]),
            torch.zeros(3, dtype=torch.float64),
            throw="raise",
        ).value

    plain = solved(1.0, 1.0)
    for loss, gap in ((1e6, 1.0), (1.0, 1e6), (1e-6, 1e3)):
        found = solved(loss, gap)
        torch.testing.assert_close(found.params, plain.params, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(found.multipliers * gap / loss, plain.multipliers, rtol=1e-6, atol=1e-9)


def test_an_objective_that_is_no_scalar_is_refused():
    point = torch.zeros(3, 2, dtype=torch.float64)
    line = lambda y: y.sum(-1, keepdim=True) - 1  # noqa: E731
    with pytest.raises(ValueError, match="objective returned"):
        bl.constrained(lambda y: y.square(), line, point[0])
    with pytest.raises(ValueError, match="objective returned"):
        bl.constrained(lambda y: y.square().sum(), line, point, batched=True)
    with pytest.raises(ValueError, match="objective returned"):
        bl.constrained(lambda y: y.square().sum(-1, keepdim=True), line, point, batched=True)


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        weights = randn(3).abs() + 1
    fit = bl.constrained(lambda y: weights @ y.square(), lambda y: (weights @ y - 1).unsqueeze(0), 0 * randn(3))
    torch.testing.assert_close(fit.value.params, (torch.ones(3, dtype=torch.float64) / weights.sum()))


def test_functions_that_are_not_defined_far_from_the_start():
    """Where they raise, or are NaN: the sizes are found nearer."""

    def objective(y):
        if bool((y.detach() < 0).any()):
            raise RuntimeError("outside")
        return (y * y.log()).sum()

    start = tensor([0.6, 0.01, 0.5])
    fit = bl.constrained(objective, lambda y: (y.sum() - 1).unsqueeze(0), start, solver=bl.Newton(LeastNorm()))
    torch.testing.assert_close(fit.value.params, torch.full((3,), 1 / 3, dtype=torch.float64))
    inner = lambda y: (y * y.log()).sum()  # noqa: E731
    fit = bl.constrained(inner, lambda y: (y.sum() - 1).unsqueeze(0), start, throw="raise")
    torch.testing.assert_close(fit.value.params, torch.full((3,), 1 / 3, dtype=torch.float64))


W = tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize("solver", [None, bl.Newton(LeastNorm())], ids=["augmented", "newton"])
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1.0, 1e3])
def test_starts_where_slopes_are_of_another_size(size, solver):
    """A barrier from near its boundary: units of the start alone made any feasible point a root, silently."""
    start = size * tensor([0.9, 0.5, 0.7])
    fit = bl.constrained(
        lambda y: -(W * y.log()).sum(), lambda y: (y.sum() - 1).unsqueeze(0), start, solver=solver, throw="ignore"
    )
    right = torch.allclose(fit.value.params, W / 6, rtol=1e-6) and torch.allclose(fit.value.multipliers, 0 * W[:1] + 6)
    assert right or not fit.result.ok
    assert right or size == 1e3 or solver is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [20.0, 300.0, 1e4])
def test_far_starts_have_the_multiplier(size, dtype):
    target = torch.tensor([1.0, 2.0, -1.0], dtype=dtype)
    fit = bl.constrained(
        lambda y: (y - target).square().sum() + 0.1 * (y - target).pow(4).sum(),
        lambda y: (y.sum() - 1).unsqueeze(0),
        size * torch.tensor([1.0, 0.7, 0.4], dtype=dtype),
        throw="raise",
    )
    torch.testing.assert_close(fit.value.multipliers, torch.full_like(target[:1], 0.68148148), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e4), (torch.float64, 1e8)])
def test_leaves_of_units_of_their_own(dtype, size):
    start = {"a": torch.tensor([0.5], dtype=dtype), "b": torch.tensor([0.1 * size], dtype=dtype)}
    fit = bl.constrained(
        lambda q: (q["a"] - 1.5).square().sum() + (q["b"] / size - 2).square().sum(),
        lambda q: q["a"] + q["b"] / size - 1,
        start,
        throw="raise",
    )
    assert not fit.stats["degenerate"]
    for name, want in (("a", 0.25), ("b", 0.75 * size)):
        torch.testing.assert_close(fit.value.params[name], torch.full_like(start[name], want), rtol=1e-5, atol=0)
    torch.testing.assert_close(fit.value.multipliers, torch.full_like(start["a"], 2.5), rtol=1e-5, atol=0)


def test_a_root_where_the_loss_is_not_defined_is_none():
    """The slopes of a logarithm are defined for negative numbers as well."""
    with pytest.raises(bl.SolveError, match="NaN"):
        bl.constrained(
            lambda y: -(W * y.log()).sum(),
            lambda y: (y.sum() + 1).unsqueeze(0),
            tensor([0.3, 0.3, 0.3]),
            solver=bl.Newton(LeastNorm()),
        )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"inner": "LBFGS"}, "inner is 'LBFGS'"),
        ({"inner": bl.LBFGS}, "inner is "),
        ({"newton": None}, "newton is None"),
    ],
)
def test_parts_that_are_no_solvers_are_named(settings, told):
    with pytest.raises(TypeError, match=told):
        bl.AugmentedLagrangian(**settings)


@pytest.mark.parametrize("returned", [lambda y: y[:0], lambda y: y > 0, lambda y: y.long()])
def test_constraints_that_are_no_numbers_are_told(returned):
    with pytest.raises(ValueError, match="constraints returned"):
        bl.constrained(lambda y: y.square().sum(), returned, tensor([0.3, 0.3]))


def test_functions_that_take_gradients_themselves_are_refused_by_name():
    start = torch.ones(3, dtype=torch.float64)

    def force(y):
        return torch.autograd.grad(y.square().sum(), y, create_graph=True)[0]

    for objective, constraints in (
        (lambda y: force(y).square().sum(), lambda y: y[:1]),
        (lambda y: y.square().sum(), lambda y: force(y)[:1] - 1),
    ):
        with pytest.raises(NotImplementedError, match=r"write torch\.func\.grad"):
            bl.constrained(objective, constraints, start)
    fit = bl.constrained(
        lambda y: y.square().sum(), lambda y: torch.func.grad(lambda z: z.square().sum())(y)[:1] - 1, start
    )
    assert torch.allclose(fit.value.params, torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64), atol=1e-8)
