"""Quadratic programs: solutions against closed forms and SciPy, derivatives by gradcheck, and what cannot be solved."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.optimize
import torch

import bilevel as bl
from bilevel import prox, quadratic_program
from bilevel.inner.interior_point import Program
from tests.conformance import randn, relative_error


def program(n=6, me=2, mi=5, seed=0):
    """A random strictly convex program with a point inside its inequalities."""
    root, inside = randn(n, n, seed=seed), randn(n, seed=seed + 1)
    A, G = randn(me, n, seed=seed + 2), randn(mi, n, seed=seed + 3)
    margin = torch.linspace(0.01, 0.4, mi, dtype=torch.float64)
    Q = root @ root.mT + torch.eye(n, dtype=torch.float64)
    return Q, randn(n, seed=seed + 4), A, A @ inside, G, G @ inside + margin


@pytest.mark.parametrize("seed", range(0, 100, 10))
def test_random_programs_against_scipy(seed):
    Q, c, A, b, G, h = (t.numpy() for t in program(seed=seed))
    theirs = scipy.optimize.minimize(
        lambda z: z @ Q @ z / 2 + c @ z,
        np.linalg.lstsq(A, b)[0],
        jac=lambda z: Q @ z + c,
        constraints=[
            {"type": "eq", "fun": lambda z: A @ z - b, "jac": lambda z: A},
            {"type": "ineq", "fun": lambda z: h - G @ z, "jac": lambda z: -G},
        ],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    fit = quadratic_program(*program(seed=seed))
    np.testing.assert_allclose(fit.value.primal.numpy(), theirs.x, atol=1e-6)
    assert fit.result is bl.Result.CONVERGED
    assert fit.stats["residual_norm"] <= 1e-12
    assert (fit.value.inequality >= 0).all()


def test_projections_are_quadratic_programs():
    y, eye = 2 * randn(4, 6, seed=1), torch.eye(6, dtype=torch.float64)
    ones = torch.ones(1, 6, dtype=torch.float64)
    simplex = quadratic_program(eye, -y, ones, ones[:, 0] * 1.5, -eye, torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(simplex.value.primal, prox.Simplex(1.5).prox(y, 1.0))
    limits = torch.full((12,), 0.5, dtype=torch.float64)
    box = quadratic_program(eye, -y, G=torch.cat([eye, -eye]), h=limits)
    torch.testing.assert_close(box.value.primal, prox.Box(-0.5, 0.5).prox(y, 1.0))
    free = quadratic_program(2 * eye, -y)
    torch.testing.assert_close(free.value.primal, y / 2)


def test_equality_constraints_have_a_closed_form():
    Q, c, A, b, _, _ = (t.requires_grad_() for t in program())
    fit = quadratic_program(Q, c, A, b)
    zero = torch.zeros(2, 2, dtype=torch.float64)
    symmetric = (Q + Q.mT) / 2
    matrix = torch.cat([torch.cat([symmetric, A.mT], -1), torch.cat([A, zero], -1)])
    exact = torch.linalg.solve(matrix, torch.cat([-c, b]))
    torch.testing.assert_close(fit.value.primal, exact[:6])
    torch.testing.assert_close(fit.value.equality, exact[6:])
    weights = randn(6, seed=9)
    found = torch.autograd.grad(fit.value.primal @ weights, (Q, c, A, b))
    for one, other in zip(found, torch.autograd.grad(exact[:6] @ weights, (Q, c, A, b)), strict=True):
        assert relative_error(one, other) <= 1e-10


def test_gradcheck_towards_all_data():
    data = tuple(t.requires_grad_() for t in program(seed=20))
    assert (quadratic_program(*data).value.inequality > 0).sum() >= 1

    def solve(*data):
        return tuple(quadratic_program(*data, throw="ignore").value)

    assert torch.autograd.gradcheck(solve, data, rtol=1e-5, atol=1e-7)


UNITS = [(1e-25, 1, 1), (1e12, 1, 1), (1, 1e-12, 1), (1, 1e12, 1), (1, 1, 1e-12), (1, 1, 1e12), (1e-6, 1e6, 1e-6)]


@pytest.mark.parametrize(("objective", "rows", "length"), UNITS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_units_do_not_matter(objective, rows, length, dtype, tolerance):
    """The objective, the constraints and z measured in other units: the same solution, and the same derivatives."""

    def solve(objective, rows, length):
        Q, c, A, b, G, h = data = [t.to(dtype).requires_grad_() for t in program()]
        measured = [objective * Q, objective * length * c, rows * A, rows * length * b, rows * G, rows * length * h]
        fit = quadratic_program(*measured, throw="raise")
        assert not fit.stats["degenerate"]
        z = fit.value.primal / length
        return [z, *torch.autograd.grad(z @ randn(6, seed=9).to(dtype), data)]

    for found, truth in zip(solve(objective, rows, length), solve(1, 1, 1), strict=True):
        assert relative_error(found, truth) <= tolerance


def test_second_derivatives_and_transforms():
    Q, c, A, b, G, h = program(seed=20)

    def solve(c, h):
        return quadratic_program(Q, c, A, b, G, h, throw="ignore").value.primal

    inputs = (c.clone().requires_grad_(), h.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(solve, inputs, rtol=1e-4, atol=1e-6)
    jacobian = torch.func.jacrev(solve)(c, h)
    torch.testing.assert_close(torch.func.jacfwd(solve)(c, h), jacobian)
    costs = c + 0.1 * randn(3, 6, seed=5)
    each = torch.stack([torch.func.jacrev(solve)(cost, h) for cost in costs])
    torch.testing.assert_close(torch.vmap(torch.func.jacrev(solve), in_dims=(0, None))(costs, h), each)


def test_a_batch_is_its_programs():
    many = [program(seed=s) for s in (0, 10, 20)]
    together = quadratic_program(*(torch.stack(parts) for parts in zip(*many, strict=True)))
    for index, data in enumerate(many):
        assert relative_error(together.value.primal[index], quadratic_program(*data).value.primal) <= 1e-10
    assert together.stats["num_steps"].shape == (3,)
    Q, c, A, b, G, h = many[0]
    shared = quadratic_program(Q, torch.stack([c, 2 * c]), A, b, G, h)  # what is the same needs no T
    assert relative_error(shared.value.primal[0], quadratic_program(*many[0]).value.primal) <= 1e-10


def test_a_portfolio_learns_its_risk_aversion():
    """The weights of least risk, whose outer loss prefers a return: the risk aversion falls."""
    root, gain = randn(5, 5, seed=3), randn(5, seed=4)
    risk = root @ root.mT + 0.1 * torch.eye(5, dtype=torch.float64)
    ones, eye = torch.ones(1, 5, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    aversion = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    nothing = torch.zeros(5, dtype=torch.float64)
    fit = quadratic_program(aversion.exp() * risk, -gain, ones, ones[0, :1], -eye, nothing)
    (grad,) = torch.autograd.grad(-(gain * fit.value.primal).sum(), aversion)
    assert fit.value.primal.sum().item() == pytest.approx(1.0)
    assert (fit.value.primal >= -1e-12).all()
    assert grad > 0


def test_float32_and_asymmetric_matrices():
    double = quadratic_program(*program())
    single = quadratic_program(*(t.float() for t in program()))
    assert single.value.primal.dtype is torch.float32
    assert relative_error(single.value.primal.double(), double.value.primal) <= 1e-5
    mixed = quadratic_program(*(t.float() if i % 2 else t for i, t in enumerate(program())))
    assert mixed.value.primal.dtype is torch.float64
    assert relative_error(mixed.value.primal, double.value.primal) <= 1e-5  # half of the data are rounded
    Q, *rest = program()
    twisted = Q + torch.triu(torch.ones_like(Q), 1) - torch.tril(torch.ones_like(Q), -1)
    assert relative_error(quadratic_program(twisted, *rest).value.primal, double.value.primal) <= 1e-10


def test_degenerate_programs_are_flagged():
    """min (z - 1)^2 with z <= 1: the constraint touches, and pushes with no force."""
    one = torch.ones(1, dtype=torch.float64)
    c = (-one).requires_grad_()
    with pytest.warns(bl.SolveWarning, match="degenerate"):
        fit = quadratic_program(one.unsqueeze(0), c, G=one.unsqueeze(0), h=one)
    assert fit.stats["degenerate"]
    assert not quadratic_program(one.unsqueeze(0), c, G=one.unsqueeze(0), h=2 * one).stats["degenerate"]
    # Every point of an edge is a solution of this linear program.
    eye, ones = torch.eye(2, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    edge = quadratic_program(0 * eye, eye[0], G=torch.cat([eye, -eye]), h=ones, throw="ignore")
    assert edge.stats["degenerate"]


def test_only_degenerate_programs_that_are_differentiated_warn(recwarn):
    one = torch.ones(1, dtype=torch.float64)
    assert quadratic_program(one.unsqueeze(0), -one, G=one.unsqueeze(0), h=one, hypergrad=None).stats["degenerate"]
    assert not recwarn.list


def repeated(kind, data):
    """The program with constraints that depend on others."""
    Q, c, A, b, G, h = data
    on = (quadratic_program(*data, hypergrad=None).value.inequality > 1e-6).nonzero()[:1, 0]
    if kind == "equality":
        return Q, c, torch.cat([A, 3 * A, A[:1] - A[1:]]), torch.cat([b, 3 * b, b[:1] - b[1:]]), G, h
    if kind == "inequality":
        return Q, c, A, b, torch.cat([G, 3 * G]), torch.cat([h, 3 * h])
    if kind == "both":  # an equation, and the inequality of the same plane
        return Q, c, A, b, torch.cat([G, A[:1]]), torch.cat([h, b[:1]])
    return Q, c, torch.cat([A, G[on]]), torch.cat([b, h[on]]), G, h  # what is active anyway, as an equation too


REPEATED = ["equality", "inequality", "both", "active"]


@pytest.mark.parametrize("kind", REPEATED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_redundant_constraints(kind, dtype, tolerance):
    """The solution and all derivatives along consistent changes are those without them, by default and silently."""
    given = [t.to(dtype) for t in program(seed=20)]
    leaves, weights = [t.requires_grad_() for t in given], randn(6, seed=9).to(dtype)
    once = quadratic_program(*leaves)
    # A multiplier of zero may be chosen there, or where rounding makes the planes two.
    throw = "ignore" if kind == "both" or dtype is torch.float32 else "raise"
    fit = quadratic_program(*repeated(kind, leaves), throw=throw)
    assert fit.stats["degenerate"]
    assert not once.stats["degenerate"]
    assert relative_error(fit.value.primal, once.value.primal) <= tolerance
    found = torch.autograd.grad(fit.value.primal @ weights, leaves)
    for one, other in zip(found, torch.autograd.grad(once.value.primal @ weights, leaves), strict=True):
        assert relative_error(one, other) <= tolerance


@pytest.mark.parametrize("kind", REPEATED)
def test_second_derivatives_with_redundant_constraints(kind):
    Q, c, A, b, G, h = program(seed=20)

    def solve(c, again):
        data = (Q, c, A, b, G, h)
        fit = quadratic_program(*(repeated(kind, data) if again else data), throw="ignore")
        return (fit.value.primal**3).sum()

    found, truth = (torch.func.hessian(lambda c, a=again: solve(c, a))(c) for again in (True, False))
    assert relative_error(found, truth) <= 1e-7


def test_a_batch_with_redundant_constraints_in_one_program():
    Q, c, A, b, G, h = program(seed=20)
    As, bs = torch.stack([A, A[:1].expand(2, -1)]), torch.stack([b, b[:1].expand(2)])
    c = c.requires_grad_()
    fit = quadratic_program(Q, c, As, bs, G, h, throw="raise")
    assert fit.stats["degenerate"].tolist() == [False, True]
    alone = [quadratic_program(Q, c, A, b, G, h), quadratic_program(Q, c, A[:1], b[:1], G, h)]
    for index, one in enumerate(alone):
        assert relative_error(fit.value.primal[index], one.value.primal) <= 1e-9
        found, truth = (
            torch.autograd.grad(z.square().sum(), c, retain_graph=True)[0]
            for z in (fit.value.primal[index], one.value.primal)
        )
        assert relative_error(found, truth) <= 1e-9


def test_multipliers_of_redundant_constraints_have_no_derivative():
    Q, c, A, b, _, _ = program(seed=20)
    c = c.requires_grad_()
    fit = quadratic_program(Q, c, torch.cat([A, A]), torch.cat([b, b]))
    with pytest.warns(bl.SolveWarning, match="adjoint solve"):
        torch.autograd.grad(fit.value.equality[0], c)


def test_infinite_bounds_are_no_constraints():
    """In each program of a batch others; of the solution, its multipliers, and the derivatives."""
    Q, c, A, b, G, h = (t.requires_grad_() for t in program(seed=20))
    loose = torch.tensor([[False, True, False, True, False], [True, False, True, False, True]])
    bounds = torch.where(loose, torch.inf, h)
    fit = quadratic_program(Q, c, A, b, G, bounds, throw="raise")
    weights = randn(6, seed=9)
    for index in range(2):
        kept = ~loose[index]
        alone = quadratic_program(Q, c, A, b, G[kept], h[kept])
        assert relative_error(fit.value.primal[index], alone.value.primal) <= 1e-10
        assert relative_error(fit.value.inequality[index][kept], alone.value.inequality) <= 1e-9
        assert not fit.value.inequality[index][loose[index]].any()
        found, truth = (
            torch.autograd.grad(z @ weights, (Q, c, A, b, G, h), retain_graph=True)
            for z in (fit.value.primal[index], alone.value.primal)
        )
        for one, other in zip(found, truth, strict=True):
            assert relative_error(one, other) <= 1e-9
    free = quadratic_program(Q, c, A, b, G, torch.full_like(h, torch.inf))
    assert relative_error(free.value.primal, quadratic_program(Q, c, A, b).value.primal) <= 1e-10
    box = quadratic_program(1e-9 * Q, 1e-9 * c, G=torch.cat([G, -G]), h=torch.cat([1e-6 * h.abs(), h + torch.inf]))
    assert box.result.ok


def test_what_cannot_be_solved_is_told():
    one, eye = torch.ones(1, dtype=torch.float64), torch.eye(1, dtype=torch.float64)
    infeasible = {"G": torch.cat([eye, -eye]), "h": torch.tensor([-1.0, -1.0], dtype=torch.float64)}
    with pytest.raises(bl.SolveError, match=r"quadratic program: .*infeasible"):
        quadratic_program(eye, one, **infeasible, throw="raise")
    for bound in ({"G": eye, "h": one}, {}):
        with pytest.raises(bl.SolveError, match=r"quadratic program: .*unbounded"):
            quadratic_program(0 * eye, one, **bound, throw="raise")
    with pytest.raises(bl.SolveError, match="infeasible"):  # equations that contradict each other
        quadratic_program(eye, one, torch.ones(2, 1).double(), torch.tensor([0.0, 1.0]).double(), throw="raise")
    with pytest.warns(bl.SolveWarning, match="step limit"):
        assert quadratic_program(*program(), max_steps=1).result is bl.Result.MAX_STEPS
    batch = quadratic_program(
        eye,
        torch.stack([one, one]),
        G=torch.cat([eye, -eye]),
        h=torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).double(),
        throw="ignore",
        hypergrad=None,
    )
    assert [int(code) == 0 for code in batch.stats["result"]] == [False, True]


def test_a_linear_program():
    """Q = 0: the vertex of least cost."""
    cost = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    eye, ones = torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    fit = quadratic_program(0 * eye, cost, G=torch.cat([eye, -eye]), h=torch.cat([ones, 0 * ones]))
    torch.testing.assert_close(fit.value.primal, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Q": torch.eye(5)}, r"Q has shape \(5, 5\)"),
        ({"c": torch.tensor(1.0)}, r"c has shape \(\)"),
        ({"b": None}, "A and b belong together"),
        ({"G": torch.ones(5, 4)}, r"G has shape \(5, 4\)"),
        ({"h": torch.full((5,), torch.nan)}, "h contains NaN or infinite"),
        ({"h": torch.full((5,), -torch.inf)}, "h contains NaN or infinite"),
        ({"b": torch.full((2,), torch.inf)}, "b contains NaN or infinite"),
        ({"Q": -torch.eye(6)}, r"smallest eigenvalue is -1"),
        ({"c": torch.ones(2, 6), "b": torch.ones(3, 2)}, "the data are for"),
        ({"c": torch.ones(0, 6)}, "for 0 programs"),
        ({"tol": 0.0}, "tol is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    given = dict(zip(("Q", "c", "A", "b", "G", "h"), (t.float() for t in program()), strict=True))
    with pytest.raises(ValueError, match=message):
        quadratic_program(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Q": torch.eye(6, dtype=torch.int64)}, "Q is torch.int64"),
        ({"A": [[1.0] * 6] * 2}, "A is list"),
        ({"hypergrad": bl.Unroll()}, "hypergrad is Unroll"),
        ({"max_steps": 1.5}, "max_steps is 1.5"),
        ({"tol": "small"}, "tol is 'small'"),
        (dict.fromkeys("QcAbGh", torch.ones(1, dtype=torch.float16)), "float16"),
    ],
)
def test_bad_types_name_the_argument(change, message):
    given = dict(zip(("Q", "c", "A", "b", "G", "h"), program(), strict=True))
    with pytest.raises(TypeError, match=message):
        quadratic_program(**{**given, **change})


def test_params_in_units_of_their_own():
    """At a spread of 1e3 the KKT residual was 6e-10 and the hypergradient 53 % off."""
    Q, c, A, b, G, h = program(seed=20)
    units = torch.logspace(0, 5, 6, dtype=torch.float64)
    shared = quadratic_program(Q, c, A, b, G, h, throw="raise").value.primal
    own = quadratic_program(Q / units[:, None] / units, c / units, A / units, b, G / units, h, throw="raise")
    assert relative_error(own.value.primal / units, shared) <= 1e-9


def test_a_small_residual_far_from_the_solution_is_told(monkeypatch):
    """A nearly free direction, in a program that is not polished: the Newton step that is left is looked at."""
    monkeypatch.setattr(Program, "polished", lambda self, at, tol: (at, torch.zeros(at.z.shape[:-1], dtype=torch.bool)))
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    Q = turn @ torch.diag(torch.tensor([1.0, 1e-10], dtype=torch.float64)) @ turn.mT
    box = torch.cat([torch.eye(2), -torch.eye(2)]).double()
    data = Q, -Q @ torch.tensor([1.0, 2.0], dtype=torch.float64), None, None, box, torch.full((4,), 5.0).double()
    with pytest.warns(bl.SolveWarning, match="less accurate than its data"):
        fit = quadratic_program(*data)
    assert fit.result is bl.Result.INACCURATE
    assert quadratic_program(*data, tol=1e-6).result is bl.Result.CONVERGED


def test_what_rounding_the_solution_loses_is_told():
    """Q is singular but for the rounding of its data, and nothing bounds z: 3.7e7 in float32, its residual 2.7."""
    root = torch.tensor([[1.0, 2.0, 0.5], [0.3, -1.0, 2.0]], dtype=torch.float64)
    Q, c = (root.mT @ root).float(), torch.tensor([1.0, 0.7, -0.4])
    with pytest.warns(bl.SolveWarning, match="less accurate than its data"):
        fit = quadratic_program(Q, c)
    assert fit.result is bl.Result.INACCURATE
    assert quadratic_program(Q + 0.01 * torch.eye(3), c, throw="raise").result is bl.Result.CONVERGED


def test_a_solution_of_zero_has_no_units():
    """The only feasible point of a budget of zero: it was right to 1e-15, and INACCURATE."""
    c, eye = torch.tensor([-1.0, -2.0, 0.5], dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    nothing = torch.zeros(3, dtype=torch.float64)
    fit = quadratic_program(eye, c, torch.ones_like(eye[:1]), nothing[:1], -eye, nothing, throw="ignore")
    assert fit.result is bl.Result.CONVERGED
    assert fit.value.primal.abs().max() <= 1e-12


def test_where_no_point_is_nothing_falls_for_ever():
    """Infeasible, and unbounded along a direction that its constraints leave free."""
    data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    c, h = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([[0.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    fit = quadratic_program(torch.diag(data[0]), c, G=data, h=h, throw="ignore")
    assert fit.stats["infeasible"].tolist() == [True, False]
    assert fit.stats["unbounded"].tolist() == [False, True]


def test_a_second_cause_at_the_same_line_is_told_too():
    """Unbounded and infeasible programs have one result; each is told once."""
    eye, one = torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    flat = torch.zeros(2, 2, dtype=torch.float64)
    programs = [
        {"Q": flat, "G": eye, "h": one},  # falls without end
        {"Q": eye, "G": torch.cat([eye, -eye]), "h": -torch.ones(4, dtype=torch.float64)},
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for program in 2 * programs:
            quadratic_program(c=one, **program)
    told = [str(warning.message) for warning in caught]
    assert len(told) == 2
    assert "unbounded" in told[0]
    assert "infeasible" in told[1]


@pytest.mark.parametrize("names", ["Ab", "Gh"])
@pytest.mark.parametrize("matrix", [torch.ones(2), torch.ones(1, 2)], ids=str)
def test_one_constraint_as_a_number_is_told(names, matrix):
    constraint = dict(zip(names, (matrix, torch.tensor(1.0)), strict=True))
    with pytest.raises(
        ValueError, match=rf"{names[1]} has shape \(\).*write {names[0]} as \[1, 2\] and {names[1]} as \[1\]"
    ):
        bl.quadratic_program(torch.eye(2), -torch.ones(2), **constraint)
    constraint = dict(zip(names, (matrix.reshape(1, 2), torch.ones(1)), strict=True))
    torch.testing.assert_close(
        bl.quadratic_program(torch.eye(2), -torch.ones(2), **constraint).value.primal, torch.full((2,), 0.5)
    )


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_concave_programs_are_refused_in_any_units(scale):
    Q, c = -scale * torch.eye(2, dtype=torch.float64), scale * torch.tensor([0.1, 0.2], dtype=torch.float64)
    with pytest.raises(ValueError, match="Q is not positive semi-definite"):
        bl.quadratic_program(Q, c)
    semidefinite = torch.diag(torch.tensor([scale, 0.0], dtype=torch.float64))
    box = torch.cat([torch.eye(2), -torch.eye(2)]).double()
    found = bl.quadratic_program(semidefinite, c, G=box, h=torch.ones(4, dtype=torch.float64), hypergrad=None)
    torch.testing.assert_close(found.value.primal, torch.tensor([-0.1, -1.0], dtype=torch.float64))


@pytest.mark.parametrize("bad", ["concave", "nan", "inf"])
def test_values_are_checked_below_transforms(bad):
    """Of the data that are mapped over or differentiated, and of those that are not."""
    eye, cs = torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    Qs = torch.stack([eye, -eye if bad == "concave" else eye], -1)  # the programs count last
    if bad != "concave":
        cs = cs.clone()
        cs[1, 1] = float(bad)

    def primal(Q, c):
        return bl.quadratic_program(Q, c).value.primal

    message = "Q is not positive" if bad == "concave" else "c contains NaN or infinite"
    with pytest.raises(ValueError, match=message):
        torch.vmap(primal, (2, 0))(Qs, cs)
    with pytest.raises(ValueError, match=message):
        torch.vmap(primal, (None, 0))(Qs[..., 1], cs)
    with pytest.raises(ValueError, match=message):
        torch.func.grad(lambda c: primal(Qs[..., 1], c).sum())(cs[1])
    with pytest.raises(ValueError, match=message):
        torch.vmap(torch.func.jacrev(primal, (0, 1)), (2, 0))(Qs, cs)
