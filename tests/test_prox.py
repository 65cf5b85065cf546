"""Proximal operators against their definition, and against each other."""

from __future__ import annotations

import math
import re

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings

import bilevel as bl
from bilevel.prox import (
    L1,
    Affine,
    Box,
    ElasticNet,
    GroupLasso,
    HalfSpace,
    L1Ball,
    L2Ball,
    NonNegative,
    Rows,
    Simplex,
)
from bilevel.prox.parts import Leaves
from tests.conformance import randn

GROUPS = torch.tensor([0, 0, 1, 1, 2, 0])
CATALOGUE = [
    L1(0.7),
    L1(torch.linspace(0, 1, 6, dtype=torch.float64)),
    ElasticNet(0.5, 2.0),
    GroupLasso(GROUPS, 0.8),
    GroupLasso(GROUPS, torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)),
    Box(-0.5, 0.3),
    NonNegative(),
    Simplex(1.5),
    L2Ball(0.9),
    L1Ball(1.2),
    Affine(randn(2, 6, seed=8), randn(2, seed=9)),
    HalfSpace(randn(6, seed=8), -0.3),
    Rows(Simplex(), 3),
    Rows(L2Ball(torch.tensor([[0.3], [0.8], [0.1]], dtype=torch.float64)), 2),
    Leaves((L1(0.4), None, L1Ball(0.7)), (2, 1, 3)),
]


@pytest.mark.parametrize("prox", CATALOGUE, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("step", [0.3, 1.0])
def test_it_is_the_minimiser(prox, step):
    """||z - y||^2 / 2 + step value(z) is no smaller anywhere near, and no smaller at random feasible points."""
    y = randn(20, 6, seed=1)
    z = prox.prox(y, step)
    best = (z - y).square().sum(-1) / 2 + step * prox.value(z)
    assert torch.isfinite(best).all()
    for seed in range(200):
        other = z + randn(20, 6, seed=seed) * 10.0 ** (-(seed % 5))
        other = prox.prox(other, 0.0) if seed % 2 else other  # a projection lands inside; step 0 leaves penalties alone
        assert ((other - y).square().sum(-1) / 2 + step * prox.value(other) >= best - 1e-9).all()


@pytest.mark.parametrize("prox", CATALOGUE, ids=lambda p: type(p).__name__)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), step=st.floats(0.01, 3.0))
def test_it_is_firmly_non_expansive(prox, seed, step):
    a, b = 2 * randn(6, seed=seed), 2 * randn(6, seed=seed + 1)
    moved = prox.prox(a, step) - prox.prox(b, step)
    assert moved.square().sum() <= (moved * (a - b)).sum() + 1e-10


@pytest.mark.parametrize("prox", CATALOGUE, ids=lambda p: type(p).__name__)
def test_a_batch_is_its_rows_and_steps_are_per_problem(prox):
    y, steps = randn(5, 6, seed=3), torch.linspace(0.1, 2, 5, dtype=torch.float64)
    together = prox.prox(y, steps)
    for row in range(5):
        torch.testing.assert_close(together[row], prox.prox(y[row], steps[row]))
    assert prox.value(together).shape == (5,)


def away_from_kinks(seed):
    return (randn(6, seed=seed) * 2).requires_grad_()


def test_derivatives_towards_vector_and_settings():
    strength = torch.linspace(0.2, 0.9, 6, dtype=torch.float64).requires_grad_()
    one, two = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.6, 1.2))
    per_group = torch.tensor([0.5, 0.7, 0.2], dtype=torch.float64, requires_grad=True)
    low, high = -strength.detach().requires_grad_(), strength
    for fn, inputs in (
        (lambda y, s: L1(s).prox(y, 0.5), (away_from_kinks(1), strength)),
        (lambda y, a, b: ElasticNet(a, b).prox(y, 0.5), (away_from_kinks(2), one, two)),
        (lambda y, s: GroupLasso(GROUPS, s).prox(y, 0.5), (away_from_kinks(3), per_group)),
        (lambda y, a, b: Box(a, b).prox(y, 0.5), (away_from_kinks(4), low, high)),
        (lambda y: NonNegative().prox(y, 0.5), (away_from_kinks(5),)),
        (lambda y, t: Simplex(t).prox(y, 0.5), (away_from_kinks(6), one)),
        (lambda y, r: L2Ball(r).prox(y, 0.5), (away_from_kinks(7), one)),
    ):
        assert torch.autograd.gradcheck(fn, inputs)


def test_zero_vectors_have_finite_derivatives():
    for prox in CATALOGUE:
        y = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(prox.prox(y, 1.0).sum(), y)
        assert torch.isfinite(grad).all(), prox


def test_projections_against_scipy():
    y = 2 * randn(6, seed=9)
    for prox, constraints in (
        (Simplex(1.5), [{"type": "eq", "fun": lambda z: z.sum() - 1.5}]),
        (L2Ball(0.9), [{"type": "ineq", "fun": lambda z: 0.81 - z @ z}]),
    ):
        bounds = [(0, None)] * 6 if isinstance(prox, Simplex) else None
        truth = scipy.optimize.minimize(
            lambda z: ((z - y.numpy()) ** 2).sum() / 2, [0.25] * 6, bounds=bounds, constraints=constraints, tol=1e-12
        ).x
        torch.testing.assert_close(prox.prox(y, 1.0), torch.from_numpy(truth), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_any_size_in_float32(size):
    """Squares of 1e-25 underflow and those of 1e25 overflow: the operators and their derivatives do not care."""
    y, groups = torch.tensor([3.0, 4.0, 1.0]), torch.tensor([0, 0, 1])
    weights = torch.tensor([1.0, 2.0, 3.0])
    for make in (lambda s: L2Ball(2 * s), lambda s: GroupLasso(groups, 2 * s), lambda s: Simplex(2 * s)):
        results = []
        for scale, at in ((1.0, y.double()), (size, y)):
            at = (scale * at).requires_grad_()
            moved = make(scale).prox(at, 1.0)
            (grad,) = torch.autograd.grad(moved @ weights.to(at), at)
            results.append((moved.detach().double() / scale, grad.double()))
        (truth, slope), (found, grad) = results
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, slope, rtol=1e-5, atol=1e-6)


def test_the_simplex_far_away_and_empty():
    far = torch.tensor([1e9, 1e9 - 64, 0.0])  # in float32 beside 1e9, a total of 1 is nothing
    torch.testing.assert_close(Simplex(1.0).prox(far, 1.0), torch.tensor([1.0, 0.0, 0.0]))
    assert not Simplex(0.0).prox(torch.tensor([3.0, 1.0, 3.0]), 1.0).any()


def test_values():
    y = torch.tensor([1.0, -2.0, 0.0, 3.0, -1.0, 0.5], dtype=torch.float64)
    assert L1(2.0).value(y) == 15.0
    assert ElasticNet(1.0, 2.0).value(y) == 7.5 + 15.25
    expected = (1 + 4 + 0.25) ** 0.5 + 3.0 + 1.0
    assert GroupLasso(GROUPS, 1.0).value(y).item() == pytest.approx(expected)
    for prox in (Box(0, 1), NonNegative(), Simplex(), L2Ball()):
        assert torch.isinf(prox.value(y))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: L1(-1.0), "strength"),
        (lambda: ElasticNet(1.0, -2.0), "l2"),
        (lambda: Box(1.0, 0.0), "lower is 1.0 and upper 0.0"),
        (lambda: Box(math.inf, math.inf), "lower is inf"),
        (lambda: Box(0.0, -math.inf), "upper -inf"),
        (lambda: Simplex(-1.0), "total"),
        (lambda: L2Ball(-1.0), "radius"),
        (lambda: GroupLasso(torch.tensor([0.0, 1.0])), "groups"),
    ],
)
def test_bad_settings_name_the_argument(make, name):
    with pytest.raises(ValueError, match=name):
        make()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: L1("a"), "strength is 'a'"),
        (lambda: L1([0.1, 0.2]), "strength is "),
        (lambda: ElasticNet(True, 1.0), "l1 is True"),
        (lambda: Simplex(None), "total is None"),
        (lambda: GroupLasso([0, 1]), "groups is "),
        (lambda: HalfSpace([1.0, 1.0]), "a is [1.0, 1.0]"),
        (lambda: HalfSpace(torch.ones(2), "a"), "b is 'a'"),
        (lambda: Affine(torch.ones(1, 2), 1.0), "b is 1.0"),
    ],
)
def test_settings_that_are_no_numbers_are_named(make, name):
    with pytest.raises(TypeError, match=re.escape(name)):
        make()


@pytest.mark.parametrize("penalty", [L1, lambda strength: ElasticNet(strength, 0.1)])
@pytest.mark.parametrize(
    ("start", "shape"),
    [(torch.zeros(2, 2), (2, 2)), (torch.zeros(3, 2), (3,)), ([torch.zeros(3), torch.zeros(4)], (3,))],
)
def test_strengths_that_do_not_fit_the_flat_params_are_told(penalty, start, shape):
    """The shape of a leaf, one for each problem without its dimension, and one leaf of several."""

    def objective(y):
        losses = [(leaf - 3).square() for leaf in (y if isinstance(y, list) else [y])]
        return losses[0].sum(-1) if shape == (3,) and len(losses) == 1 else sum(loss.sum() for loss in losses)

    with pytest.raises(ValueError, match=rf"has shape {re.escape(str(shape))}"):
        bl.argmin(objective, start, solver=bl.ProximalGradient(penalty(torch.ones(shape))))


@pytest.mark.parametrize(
    ("bounds", "words"), [((np.zeros(2), 1.0), "lower is array"), ((0, [1.0]), r"upper is \[1.0\]")]
)
def test_bounds_of_a_box_that_are_no_tensors_are_told(bounds, words):
    with pytest.raises(TypeError, match=words):
        Box(*bounds)


def test_settings_of_each_problem():
    """``[T, 1]``: a number for each of T problems, in prox and value."""
    sizes, y = torch.tensor([[0.5], [2.0]], dtype=torch.float64), 3 * randn(2, 6, seed=4)
    for make in (L1, Simplex, L2Ball):
        together = make(sizes)
        moved = together.prox(y, 1.0)
        for task in range(2):
            alone = make(sizes[task, 0])
            torch.testing.assert_close(moved[task], alone.prox(y[task], 1.0))
            torch.testing.assert_close(together.value(moved)[task], alone.value(moved[task]))


def test_equality_is_of_numbers_and_of_tensors_themselves():
    strength = torch.ones(3)
    assert L1(0.1) == L1(0.1)
    assert L1(0.1) != L1(0.2)
    assert L1(strength) == L1(strength)
    assert L1(strength) != L1(strength.clone())
    assert len({L1(0.1), L1(0.1), Box(), NonNegative()}) == 3


def test_groups_of_another_size():
    with pytest.raises(ValueError, match="groups names 6 coordinates: there are 5"):
        GroupLasso(GROUPS).prox(randn(5), 1.0)


def test_the_l1_ball_and_affine_sets_are_what_a_solver_of_programs_finds():
    A, b, y = randn(2, 5, seed=1), randn(2, seed=2), 2 * randn(5, seed=3)
    ball = scipy.optimize.minimize(
        lambda p: ((p[:5] - p[5:] - y.numpy()) ** 2).sum() / 2,
        [0.1] * 10,
        bounds=[(0, None)] * 10,
        constraints={"type": "ineq", "fun": lambda p: 1.3 - p.sum()},
        options={"ftol": 1e-15},
    ).x
    torch.testing.assert_close(L1Ball(1.3).prox(y, 1.0), torch.tensor(ball[:5] - ball[5:]), rtol=0, atol=1e-6)
    z = Affine(A, b).prox(y, 1.0)
    torch.testing.assert_close(A @ z, b)
    torch.testing.assert_close(z - y, A.T @ torch.linalg.lstsq(A.T, (z - y)[:, None]).solution[:, 0])  # along its rows
    a = A[0]
    assert a @ HalfSpace(a, 0.2).prox(y + 10 * a, 1.0) == pytest.approx(0.2)
    torch.testing.assert_close(HalfSpace(a, 0.2).prox(y - 10 * a, 1.0), y - 10 * a)


def test_settings_of_the_new_sets_are_differentiable():
    y, A = 2 * randn(3, 6, seed=3), randn(2, 6, seed=4)
    inputs = [y, A, randn(2, seed=5), torch.tensor(0.9, dtype=torch.float64)]

    def projected(y, A, b, size):
        rows = Rows(L1Ball(size), 3).prox(y, 1.0)
        return Affine(A, b).prox(y, 1.0), HalfSpace(A[0], size - 5).prox(y, 1.0), rows

    assert torch.autograd.gradcheck(projected, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: L1Ball(-1.0), "radius"),
        (lambda: Affine(torch.ones(2, 3), torch.ones(2)), "depend"),
        (lambda: Affine(torch.eye(3), torch.ones(2)), "go together"),
        (lambda: HalfSpace(torch.zeros(3)), "a is zero"),
        (lambda: Rows(Simplex(), 0), "length"),
        (lambda: Rows(Simplex(), 4).prox(torch.ones(6), 1.0), "does not divide"),
        (lambda: Affine(torch.full((1, 3), math.nan), torch.ones(1)), "A contains NaN"),
        (lambda: Affine(torch.ones(1, 3), torch.ones(1)).prox(torch.ones(4), 1.0), r"A has shape \(1, 3\)"),
        (lambda: HalfSpace(torch.ones(3), math.nan), "b is nan"),
        (lambda: HalfSpace(torch.ones(())), "a vector"),
        (lambda: HalfSpace(torch.ones(1), 1.0).prox(torch.ones(4), 1.0), r"a has shape \(1,\)"),
        (lambda: Simplex(torch.ones(4)).prox(torch.ones(4), 1.0), r"total has shape \(4,\)"),
        (lambda: L2Ball(torch.ones(4)).prox(torch.ones(4, 4), 1.0), r"radius has shape \(4,\)"),
        (lambda: L1Ball(torch.ones(4)).value(torch.ones(4)), r"radius has shape \(4,\)"),
        (lambda: Box(torch.zeros(2, 2), 1.0).prox(torch.ones(4), 1.0), r"lower has shape \(2, 2\)"),
        (lambda: GroupLasso(GROUPS, torch.ones(2, 1)).prox(torch.ones(6), 1.0), r"strength has shape \(2, 1\)"),
    ],
)
def test_sets_that_make_no_sense(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_tree_of_them_is_the_sum_of_its_leaves():
    """Batched and with a hyperparameter, against each leaf solved alone; the part without a prox is left alone."""
    target = {"a": randn(3, 4, seed=1), "b": [randn(3, 2, 3, seed=2), randn(3, 1, seed=3)]}
    strength = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    tree = {"a": L1(strength), "b": [Rows(Simplex(), 3), None]}

    def objective(p, q=target):
        pairs = [(p["a"], q["a"]), *zip(p["b"], q["b"], strict=True)]
        return sum((x - y).square().flatten(1).sum(-1) for x, y in pairs) / 2

    init = {"a": torch.zeros(3, 4).double(), "b": [torch.full((3, 2, 3), 1 / 3).double(), torch.zeros(3, 1).double()]}
    fit = bl.argmin(objective, init, solver=bl.ProximalGradient(tree), throw="raise")
    torch.testing.assert_close(fit.value["a"], L1(strength).prox(target["a"], 1.0))
    torch.testing.assert_close(fit.value["b"][0], Simplex().prox(target["b"][0], 1.0))
    torch.testing.assert_close(fit.value["b"][1], target["b"][1])
    (grad,) = torch.autograd.grad(fit.value["a"].sum(), strength)
    torch.testing.assert_close(grad, -fit.value["a"].detach().sign().sum())
    for wrong in ({"a": L1()}, {"a": L1(), "b": 3}):
        with pytest.raises((TypeError, ValueError), match="prox"):
            bl.argmin(objective, init, solver=bl.ProximalGradient(wrong))


def test_parts_are_matched_by_their_keys():
    """A dict of bounds or proxes in another order than init's acts on the leaves that it names."""
    init = {"weight": torch.zeros(2, dtype=torch.float64), "bias": torch.zeros((), dtype=torch.float64)}

    def loss(p):
        return (p["weight"] - 3).square().sum() / 2 + (p["bias"] - 5).square() / 2

    for solver in (bl.LBFGS, bl.ScipyMinimize):
        fit = bl.argmin(loss, init, solver=solver(bounds=(None, {"bias": 9.0, "weight": 1.0})))
        torch.testing.assert_close(fit.value["weight"], torch.ones(2, dtype=torch.float64))
        assert fit.value["bias"].item() == pytest.approx(5.0)
    strength = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    fit = bl.argmin(loss, init, solver=bl.ProximalGradient({"bias": None, "weight": bl.prox.L1(strength)}))
    torch.testing.assert_close(fit.value["weight"], torch.full((2,), 2.0, dtype=torch.float64), rtol=1e-4, atol=0)
    (slope,) = torch.autograd.grad(fit.value["weight"].sum(), strength)
    assert slope.item() == pytest.approx(-2.0)


def test_a_strength_for_each_coordinate_is_none_for_each_group():
    with pytest.raises(ValueError, match="for 2 groups"):
        bl.prox.GroupLasso(torch.tensor([0, 0, 1, 1]), torch.ones(4))


@pytest.mark.parametrize(
    "prox", [bl.prox.L1(0.1), bl.prox.ElasticNet(0.1, 0.2), bl.prox.NonNegative(), bl.prox.Simplex()]
)
def test_what_is_not_a_number_stays_so(prox):
    found = prox.prox(torch.tensor([math.nan, 1.0, 2.0]), 1.0)
    assert found[0].isnan()
    assert not torch.isfinite(bl.prox.Simplex().prox(torch.tensor([math.inf, 0.2, 0.3]), 1.0)).all()


@pytest.mark.parametrize(
    "make", [L1, Simplex, L2Ball, lambda bound: Box(0.0, bound)], ids=["l1", "simplex", "ball", "box"]
)
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_settings_are_looked_at_under_a_transform(make, transform):
    """A penalty of negative strength was solved, and an empty box."""

    def solved(setting):
        start = torch.zeros(2, dtype=torch.float64)
        return bl.argmin(lambda y: (y - 1).square().sum(), start, solver=bl.ProximalGradient(make(setting))).value.sum()

    bad = torch.tensor([0.5, -0.5], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"negative|empty"):
        torch.func.grad(solved)(bad[1]) if transform == "grad" else torch.func.vmap(solved)(bad)
    assert torch.isfinite(torch.func.vmap(solved)(bad.abs())).all()
