"""The parts of line-search descent against what defines them: BFGS, Wolfe's conditions, curvature along a line."""

from __future__ import annotations

import math

import pytest
import torch

import bilevel as bl
from bilevel.inner.bounded import Bounds, snapped
from bilevel.inner.descent import LineSearch
from bilevel.inner.pairs import Memory, first_step, two_loops
from bilevel.inner.proximal import _step, curvature_seen, inverse_curvature
from bilevel.inner.roots import _backtrack
from bilevel.problem import Evaluation, Problem, RootProblem
from tests.conformance import randn, relative_error

EYE = torch.eye(5, dtype=torch.float64)


def test_two_loops_are_the_matrix_of_bfgs():
    """``H <- (I - rho s y^T) H (I - rho y s^T) + rho s s^T`` from ``gamma I``; a pair with rho = 0 counts as none."""
    gamma, g = torch.tensor([0.7, 2.0], dtype=torch.float64), randn(2, 5, seed=1)
    pairs, matrices = [], gamma.view(2, 1, 1) * EYE
    for seed in range(2, 6):
        s, y = randn(2, 5, seed=seed), randn(2, 5, seed=seed + 10)
        rho = 1 / (s * y).sum(-1).abs() * torch.tensor([1.0, 0.0 if seed == 3 else 1.0])
        pairs.append((s, y, rho))
        left = EYE - rho.view(2, 1, 1) * s.unsqueeze(-1) * y.unsqueeze(-2)
        matrices = left @ matrices @ left.mT + rho.view(2, 1, 1) * s.unsqueeze(-1) * s.unsqueeze(-2)
    truth = (matrices @ g.unsqueeze(-1)).squeeze(-1)
    assert relative_error(two_loops(pairs, gamma, g), truth) <= 1e-12
    assert relative_error(two_loops([], gamma, g), gamma.unsqueeze(-1) * g) == 0


def bowls(y, matrix, slope):
    return torch.stack([0.5 * row @ matrix @ row - slope @ row + 3 for row in y])


MATRIX = torch.diag(torch.tensor([1.0, 2.0, 5.0, 10.0, 30.0], dtype=torch.float64))


def test_lbfgs_meets_the_newest_secant_equation_and_forgets():
    """``H (g_k - g_{k-1}) = y_k - y_{k-1}``, in units of the first gradient; ``-H g`` is of two pairs."""
    slope = randn(5, seed=3)
    points = [randn(2, 5, seed=seed) for seed in range(5)]
    problem = Problem(lambda y: 1e-3 * bowls(y, MATRIX, slope), points[0], ())
    memory = Memory(2, problem)
    for y in points:
        at = problem.evaluate(y)
        towards, size, useful = memory(at, at.f)
    assert size.tolist() == [1.0, 1.0]
    assert useful.tolist() == [True, True]
    assert len(memory.pairs) == 2
    change = problem.evaluate(points[4]).g - problem.evaluate(points[3]).g
    unit = 1 / problem.start.g.norm(dim=-1, keepdim=True)
    assert relative_error(two_loops(memory.pairs, memory.gamma, unit * change), points[4] - points[3]) <= 1e-12
    (s, y), (s1, y1) = ((points[k + 1] - points[k], 1e-3 * (points[k + 1] - points[k]) @ MATRIX) for k in (3, 2))
    gamma = (s * y).sum(-1, keepdim=True) / (y * y).sum(-1, keepdim=True)
    pairs = [(s1, y1, 1 / (s1 * y1).sum(-1)), (s, y, 1 / (s * y).sum(-1))]
    assert relative_error(towards, -two_loops(pairs, gamma.squeeze(-1), at.g)) <= 1e-10


def test_a_pair_without_positive_curvature_counts_as_none():
    """In the second problem, which is concave: its direction is the plain one."""
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64)
    problem = Problem(lambda y: sign * y.square().sum(-1), randn(2, 5, seed=1), ())
    memory = Memory(3, problem, probe=False)
    memory(problem.start, problem.start.f)
    towards, _, useful = memory(problem.evaluate(randn(2, 5, seed=2)), problem.start.f)
    assert useful.tolist() == [True, False]
    g = problem.evaluate(randn(2, 5, seed=2)).g
    assert relative_error(towards[1], -g[1] / problem.start.g[1].norm()) <= 1e-12
    assert relative_error(towards[0], -g[0] / 2) <= 1e-12  # the Hessian is 2 I


def test_the_first_step_is_the_minimum_along_the_gradient():
    """Of bowls; where the curvature is negative or none, that which would bring the loss to zero; at rest none."""
    start = torch.stack([randn(5, seed=1), torch.zeros(5).double(), randn(5, seed=3), randn(5, seed=4), EYE[0]])
    slope = randn(5, seed=5)

    def losses(y):
        bowl, empty, concave, line, rest = y
        return torch.stack(
            [
                0.5 * bowl @ MATRIX @ bowl - slope @ bowl,
                0.5 * empty @ MATRIX @ empty - slope @ empty + 1,
                3 - concave.square().sum(),
                slope @ line + 7 + 0 * line.square().sum(),
                (rest - EYE[0]).square().sum(),
            ]
        )

    problem = Problem(losses, start, ())
    downhill, length, curved = first_step(problem)
    assert curved.tolist() == [True, True, False, False, False]
    f, g = problem.start.f, problem.start.g
    size = g.norm(dim=-1)
    along = size**3 / (g * (g @ MATRIX)).sum(-1)
    truth = torch.stack([along[0], along[1], f[2].abs() / size[2], f[3].abs() / size[3], 0 * f[4]])
    torch.testing.assert_close(length, truth, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(downhill[:4], -(g / size.unsqueeze(-1))[:4])
    assert downhill[4].tolist() == [0.0] * 5


@pytest.mark.parametrize("start", [1e-6, 1e-2, 1.0, 30.0, 1e4])
def test_a_line_search_ends_at_a_weak_wolfe_point(start):
    """From first sizes that are far too short and too long, along directions of any length; uphill nothing moves."""
    y = torch.tensor([[2.0], [-3.0], [0.5], [2.0]], dtype=torch.float64)

    def loss(y):
        return (y.pow(4) / 4 + y.square() / 2 - y).sum(-1)

    problem = Problem(loss, y, ())
    at = problem.start
    direction = -at.g * torch.tensor([[1.0], [0.1], [50.0], [-1.0]], dtype=torch.float64)
    sizes, active = torch.full((4,), start, dtype=torch.float64), torch.ones(4, dtype=torch.bool)
    search = LineSearch(problem, at, direction, sizes, active).run()
    new, taken, moved = search.best, search.taken, search.moved
    slope, new_slope = (at.g * direction).sum(-1), (new.g * direction).sum(-1)
    assert moved.tolist() == [True, True, True, False]
    torch.testing.assert_close(new.y, y + taken.unsqueeze(-1) * direction)
    assert taken[3] == 0
    assert bool((new.f <= at.f + 1e-4 * taken * slope)[:3].all())
    assert bool((new_slope >= 0.9 * slope)[:3].all())
    only = torch.tensor([False, True, False, False])
    search = LineSearch(problem, at, direction, sizes, only).run()
    assert search.moved.tolist() == only.tolist()
    assert torch.equal(search.best.y[~only], y[~only])


@pytest.mark.parametrize("lr", [0.003, 0.01, 0.02])
def test_gradient_descent_tries_twice_the_last_step_first(lr):
    """After ``lr`` at the start; each problem by itself."""
    tried, curvature = [], torch.tensor([[40.0, 3.0], [10.0, 1.0]], dtype=torch.float64)

    def loss(y):
        tried.append(y.detach().clone())
        return (curvature * (y - 1).square()).sum(-1) / 2

    def solved(max_steps):
        tried.clear()
        solver = bl.GradientDescent(lr, max_steps=max_steps, line_search=True)
        return solver.minimize(Problem(loss, torch.zeros(2, 2, dtype=torch.float64), ()))

    first = solved(1)
    begun = len(tried)
    solved(2)
    slope = curvature * (first.value - 1)
    assert any(torch.equal(y, lr * curvature) for y in tried)
    torch.testing.assert_close(tried[begun], first.value - 2 * first.stats["step_size"].unsqueeze(-1) * slope)


def test_newton_goes_back_to_the_first_half_that_lowers_the_residual():
    """``arctan(y)`` from 1 to 50: Newton's step overshoots, the more the farther."""
    y = torch.tensor([[1.0], [2.0], [50.0], [0.0]], dtype=torch.float64)
    problem = RootProblem(torch.atan, y, batch_dims=1)
    r = torch.atan(y)
    move = -r * (1 + y.square())
    new_y, new_r, moved = _backtrack(problem, y, r, move, torch.tensor([True, True, True, False]))
    for start, step, found in zip(y[:3], move[:3], new_y[:3], strict=True):
        halves = (start + step / 2**k for k in range(30))
        lower = next(
            (k, point) for k, point in enumerate(halves) if abs(point.atan()) < (1 - 1e-4 / 2**k) * start.atan()
        )
        assert found.item() == pytest.approx(lower[1].item(), rel=1e-12)
    assert torch.equal(new_y[3], y[3])
    assert moved.tolist() == [True, True, True, False]
    torch.testing.assert_close(new_r, torch.atan(new_y))
    stuck = _backtrack(problem, y, r, -move, torch.ones(4, dtype=torch.bool))  # uphill
    assert not stuck[2].any()
    assert torch.equal(stuck[0], y)


@pytest.mark.parametrize("size", [1.0, 0.0, 1e3])
def test_the_inverse_curvature_is_that_of_any_direction_for_a_sphere(size):
    y = size * randn(2, 7, seed=1)

    def gradient(y):
        return torch.tensor([[0.25], [40.0]]).double() * y

    torch.testing.assert_close(inverse_curvature(gradient, y, gradient(y)), torch.tensor([4.0, 1 / 40]).double())
    flat, seen = curvature_seen(torch.zeros_like, y, torch.zeros_like(y), y.norm(dim=-1))
    assert flat.tolist() == [1.0, 1.0]
    assert not seen.any()


def test_the_curvature_is_looked_for_in_all_params():
    """The direction of signs has an entry of one size in each, whichever of them the function depends on."""
    for index in range(7):
        weights = torch.zeros(7).double()
        weights[index] = 3.0
        step = inverse_curvature(lambda y: weights * y, torch.ones(1, 7).double(), weights.expand(1, 7))  # noqa: B023
        assert step.item() == pytest.approx(math.sqrt(7) / 3, rel=1e-6)


def test_a_change_of_the_gradient_by_rounding_is_not_seen():
    y, g = torch.ones(2, 4).double(), randn(2, 4, seed=1)
    off = torch.tensor([[5.0], [20.0]]).double() * torch.finfo(torch.float64).eps
    _, seen = curvature_seen(lambda y: g * (1 + off), y, g, y.norm(dim=-1))
    assert seen.tolist() == [False, True]


def test_a_proximal_step_is_halved_until_the_model_is_an_upper_bound():
    """Of ``c |y|^2 / 2`` that is where the step is at most 1 / c: 1, 1/4, 1/32."""
    curvature = torch.tensor([0.5, 3.0, 20.0, 20.0], dtype=torch.float64)
    problem = Problem(lambda y: curvature * y.square().sum(-1) / 2, randn(4, 3, seed=1), ())
    active = torch.tensor([True, True, True, False])
    new, step, moved = _step(problem, lambda z, step: z, problem.start, torch.ones(4).double(), active)
    assert step.tolist() == [1.0, 0.25, 1 / 32, 1.0]
    assert moved.tolist() == active.tolist()
    torch.testing.assert_close(new.y[:3], (problem.start.y - step.unsqueeze(-1) * problem.start.g)[:3])
    assert torch.equal(new.y[3], problem.start.y[3])


def test_bounds_hold_what_is_pulled_against_them():
    """At the lower bound a positive slope, at the upper one a negative; and what is as near as the gap."""
    y = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.5, 0.1, 0.9]], dtype=torch.float64)
    g = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0]], dtype=torch.float64)
    box, at = Bounds(torch.zeros_like(y), torch.ones_like(y)), Evaluation(y, torch.zeros(1), g)
    assert box.held(at).tolist() == [[True, False, False, True, False, False, False]]
    assert box.held(at, torch.tensor([0.1])).tolist() == [[True, False, False, True, False, True, True]]
    assert box.slope(at).tolist() == [[0.0, -1.0, 1.0, 0.0, 1.0, 1.0, -1.0]]
    assert box.clip(3 * y - 1)[0].tolist() == pytest.approx([0.0, 0.0, 1.0, 1.0, 0.5, 0.0, 1.0])
    near = torch.tensor([[1e-7, 1e-7, 1 - 1e-7, 1 - 1e-7, 0.5, 2.0, -1.0]], dtype=torch.float64)
    assert snapped(box, near, g)[0].tolist() == [0.0, 1e-7, 1 - 1e-7, 1.0, 0.5, 1.0, 0.0]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "solver", [bl.LBFGS(), bl.LBFGS(gtol=1e-2), bl.LBFGS(bounds=(-1e6, 1e6)), bl.NewtonCG()], ids=str
)
def test_a_step_onto_a_plateau_is_none_where_the_loss_is_large(solver, count):
    """The rise of 0.13 was taken for rounding of a loss of 2,000, and the plateau for a minimum: CONVERGED."""
    random = torch.Generator().manual_seed(0)
    inliers, outliers = 1 + 0.3 * torch.randn(10, generator=random), 50 + 500 * torch.rand(1990, generator=random)
    data = torch.cat([inliers, outliers])

    def welsch(y):
        return (1 - torch.exp(-(y - data).square() / 2)).sum(-1)

    start = torch.full((count, 1), 4.0)
    fit = bl.argmin(welsch, start, solver=solver, hypergrad=None, throw="raise")
    assert (fit.value - inliers.mean()).abs().max() < 0.1
    assert (welsch(fit.value) < welsch(start) - 5).all()


@pytest.mark.parametrize("solver", [bl.LBFGS(), bl.LBFGS(bounds=(-1e12, 1e12)), bl.NewtonCG()], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_a_constant_in_the_loss_hides_no_minimum_above_rounding(solver, count):
    """The first step, a guess from loss and slope, is 1e10 long, and thirty halvings did not bring it back."""

    def loss(y):
        return 1e9 - torch.exp(-(y - 1).square() / 2).sum(-1)

    start = torch.full((count, 1), 3.0, dtype=torch.float64)
    fit = bl.argmin(loss, start, solver=solver, hypergrad=None, throw="raise")
    torch.testing.assert_close(fit.value, torch.ones_like(start), atol=1e-4, rtol=0)
