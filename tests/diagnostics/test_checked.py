"""The error estimate and the bound, against the true error on problems with closed forms."""

from __future__ import annotations

import math

import pytest
import torch

import bilevel as bl
from bilevel.diagnostics import BilevelProblem, Constants, hypergradient
from bilevel.problems import LassoPath, Portfolio, Quadratics, Ridge, WeightedRidge
from tests.conformance import randn
from tests.diagnostics.error_estimate import measure, share


def random_case(seed):
    """A problem, an inner solver that stops early, and a linear solver that stops early, all at random."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand((), generator=generator).item()

    problems = [
        lambda: Ridge(seed=seed),
        lambda: Ridge(per_feature=True, seed=seed),
        lambda: WeightedRidge(seed=seed),
        lambda: Quadratics(conditions=(10 ** uniform(0, 3),), size=12, seed=seed),
        lambda: Quadratics(conditions=(3.0, 10 ** uniform(0, 2)), size=8, seed=seed),
    ]
    problem = problems[seed % len(problems)]()
    problem.hparams = problem.hparams + 0.5 * torch.randn(
        problem.hparams.shape, generator=generator, dtype=torch.float64
    )
    solver = bl.LBFGS(gtol=10 ** uniform(-6, -1))
    hypergrad = bl.Implicit(bl.CG(rtol=10 ** uniform(-6, -1)))
    return problem, solver, hypergrad


def true_error(problem, found):
    return float((found - problem.hypergradient(problem.hparams)).norm())


def test_the_estimate_is_within_a_factor_of_three_in_95_percent_of_200_cases():
    ratios = []
    for seed in range(200):
        problem, solver, hypergrad = random_case(seed)
        checked = hypergradient(problem, solver=solver, hypergrad=hypergrad, throw="ignore")
        truth = true_error(problem, checked.value)
        if truth > 1e-14:
            ratios.append(float(checked.stats["error"]) / truth)
    assert len(ratios) >= 190
    within = sum(1 / 3 <= ratio <= 3 for ratio in ratios) / len(ratios)
    assert within >= 0.95, sorted(ratios)[:10] + sorted(ratios)[-10:]


def ridge_constants(problem, x, checked, found, exact):
    """Constants of per-feature ridge: H = A'A/m + diag(exp x), d_xy g = diag(exp(x) y), f quadratic."""
    m, d = problem.a_train.shape
    penalty = x.exp().expand(d)
    hessian = problem.a_train.mT @ problem.a_train / m + torch.diag(penalty)
    outer = problem.a_val.mT @ problem.a_val / m
    gradients = [problem.a_val.mT @ (problem.a_val @ y - problem.b_val) / m for y in (found, exact)]
    # Between the two points: the largest of the ends, since the gradient of a quadratic is affine.
    return Constants(
        strong_convexity=torch.linalg.eigvalsh(hessian)[0].item(),
        cross=max((penalty * y).abs().max().item() for y in (found, exact)) * (1 if x.dim() else math.sqrt(d)),
        cross_lipschitz=penalty.max().item(),
        outer_gradient=max(g.norm().item() for g in gradients),
        outer_smoothness=torch.linalg.eigvalsh(outer)[-1].item(),
    )


@pytest.mark.parametrize("per_feature", [True, False])
def test_the_bound_is_never_violated(per_feature):
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        problem = Ridge(per_feature=per_feature, seed=seed)
        gtol, rtol = (10 ** (-5 * torch.rand((), generator=generator).item()) for _ in range(2))
        solver, hypergrad = bl.LBFGS(gtol=gtol), bl.Implicit(bl.CG(rtol=0.9 * rtol))
        fit = bl.argmin(problem.inner, problem.init, problem.hparams, solver=solver, throw="ignore")
        exact = problem.solution(problem.hparams)
        constants = ridge_constants(problem, problem.hparams, None, fit.value, exact)
        checked = hypergradient(problem, solver=solver, hypergrad=hypergrad, constants=constants, throw="ignore")
        assert true_error(problem, checked.value) <= float(checked.stats["bound"]) * (1 + 1e-9) + 1e-14


def test_quadratics_with_a_linear_hyperparameter_have_a_tight_bound():
    problem = Quadratics(conditions=(10.0,))
    constants = Constants(strong_convexity=1.0, cross=1.0, outer_smoothness=1.0)
    for gtol in (1e-1, 1e-3, 1e-6):
        checked = hypergradient(problem, solver=bl.LBFGS(gtol=gtol), constants=constants)
        truth, bound = true_error(problem, checked.value), float(checked.stats["bound"])
        assert truth <= bound <= 1e3 * max(truth, 1e-12)


def test_the_correction_is_better_than_what_it_corrects():
    for problem in (Ridge(per_feature=True), WeightedRidge()):
        checked = hypergradient(problem, solver=bl.LBFGS(gtol=1e-2), throw="ignore")
        assert true_error(problem, checked.state) <= 0.05 * true_error(problem, checked.value)


def test_what_it_carries():
    problem = Quadratics(conditions=(10.0, 100.0))
    checked = hypergradient(problem, hypergrad=bl.Implicit(bl.CG(rtol=1e-8)))
    assert checked.stats["num_steps"].shape == (2,)
    assert checked.stats["linear_steps"].shape == (2,)
    assert checked.result is bl.Result.CONVERGED
    # Ritz values after convergence: the ends of the spectrum, to the accuracy of the solve.
    torch.testing.assert_close(
        checked.stats["smallest_curvature"], torch.ones(2, dtype=torch.float64), rtol=0.1, atol=0
    )
    expected = torch.tensor([10.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(checked.stats["largest_curvature"], expected, rtol=1e-3, atol=0)
    assert torch.isinf(checked.stats["bound"])


def test_a_hypergradient_by_an_approximate_operator_shows_its_error():
    """Damping is a bias that no residual tells of."""
    problem = Ridge(per_feature=True)
    damped = hypergradient(problem, solver=bl.NewtonCG(), hypergrad=bl.Implicit(bl.CG(rtol=1e-12), damping=0.1))
    assert float(damped.stats["error"]) == pytest.approx(true_error(problem, damped.value), rel=1e-2)


def test_roots_too():
    weight = 0.4 * torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = BilevelProblem(
        inner=lambda z, x: torch.tanh(weight @ z + x),
        outer=lambda z, x: z.square().sum() + x.sum(),
        init=torch.zeros(5, dtype=torch.float64),
        hparams=torch.linspace(-1, 1, 5, dtype=torch.float64),
        kind="fixed_point",
    )
    rough = hypergradient(problem, solver=bl.Picard(tol=1e-2), hypergrad=bl.Implicit(bl.GMRES(rtol=1e-2)))
    fine = hypergradient(problem, solver=bl.Newton(tol=1e-13), hypergrad=bl.Implicit(bl.LU()))
    truth = float((rough.value - fine.value).norm())
    assert 1 / 3 <= float(rough.stats["error"]) / truth <= 3


def test_bad_constants():
    with pytest.raises(ValueError, match="strong_convexity is 0"):
        Constants(strong_convexity=0.0, cross=1.0)


def test_the_estimate_holds_whatever_the_problem_its_units_and_its_start_are():
    """A small count of the command ``python -m tests.diagnostics.error_estimate``."""
    verdicts = measure(count=120, seed=3)
    assert verdicts["refused"] == 0
    assert verdicts["holds"] >= 60
    assert share(verdicts) >= 0.95, verdicts


def test_rounding_in_float32_is_part_of_the_error():
    problem, exact = Quadratics(conditions=(1e4,), dtype=torch.float32), Quadratics(conditions=(1e4,))
    exact.matrix, exact.c, exact.target = (t.double() for t in (problem.matrix, problem.c, problem.target))
    checked = hypergradient(problem, solver=bl.NewtonCG(), hypergrad=bl.Implicit(bl.LU()), throw="ignore")
    truth = exact.hypergradient(problem.hparams.double())
    error = float((checked.value.double() - truth).norm())
    assert error / float(truth.norm()) > 1e-7
    assert 1 / 3 <= float(checked.stats["error"]) / error <= 3


def test_many_unknowns_are_not_factorised():
    problem = Quadratics(conditions=(1e5,), size=600)
    rough = hypergradient(problem, solver=bl.LBFGS(gtol=0.0, max_steps=40), throw="ignore")
    assert 0.9 <= float(rough.stats["error"]) / true_error(problem, rough.value) <= 1.1


@pytest.mark.parametrize("problem", [LassoPath(), Portfolio()])
def test_kinks_and_constraints_too(problem):
    rough = hypergradient(problem, hypergrad=bl.Implicit(bl.GMRES(rtol=0.1)), throw="ignore")
    truth = true_error(problem, rough.value)
    assert truth > 1e-12 or float(rough.stats["error"]) < 1e-10
    assert truth <= 1e-12 or 1 / 3 <= float(rough.stats["error"]) / truth <= 3


def test_the_error_is_unknown_where_there_is_no_solution():
    """The logistic loss of separable data has no minimum: every Newton step is as long as the one before."""
    label = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    problem = BilevelProblem(
        inner=lambda y, x: (x.exp() * torch.nn.functional.softplus(-label * y * label)).mean(),
        outer=lambda y, x: y.square().sum(),
        init=torch.zeros((), dtype=torch.float64),
        hparams=torch.zeros(3, dtype=torch.float64),
    )
    assert torch.isinf(hypergradient(problem, throw="ignore").stats["error"])


def test_an_inner_problem_without_hparams_leaves_the_direct_gradient():
    problem = BilevelProblem(
        inner=lambda y, x: (y - 1).square().sum(),
        outer=lambda y, x: (y * x).sum(),
        init=torch.zeros(2, dtype=torch.float64),
        hparams=torch.ones(2, dtype=torch.float64),
    )
    checked = hypergradient(problem)
    torch.testing.assert_close(checked.value, torch.ones(2, dtype=torch.float64))
    assert float(checked.stats["error"]) <= 1e-9


@pytest.mark.parametrize(
    "solver",
    [
        bl.TorchOptim(torch.optim.SGD, lr=0.1, weight_decay=0.5, max_steps=2000, gtol=1e-11),
        bl.Steps(bl.SGD(lr=0.1, weight_decay=0.5), max_steps=2000, gtol=1e-11),
    ],
    ids=repr,
)
def test_the_weight_decay_of_an_optimizer_is_a_part_of_the_problem(solver):
    x = torch.tensor(0.5, dtype=torch.float64)
    goal = torch.arange(1.0, 4.0, dtype=torch.float64)
    inner = lambda y, x: (y - goal).square().sum() + x * y.square().sum()  # noqa: E731
    problem = BilevelProblem(inner, lambda y, x: y.square().sum(), torch.zeros(3, dtype=torch.float64), x)
    exact = -2 * goal.square().sum() / (1 + x + 0.25) ** 3  # y = goal / (1 + x + 0.5 / 2)
    found = bl.diagnostics.hypergradient(problem, solver=solver)
    assert found.value.item() == pytest.approx(exact.item(), rel=1e-8)
    assert float(found.stats["error"]) < 1e-8 * abs(exact)
    assert bl.diagnostics.check_hypergradient(problem, solver=solver).ok
    assert bl.diagnostics.advise(problem, solver=solver).predicted_error <= 1e-6


class TestBoundsAndProxes:
    """They are a part of the problem that is solved, so of the one that is looked at."""

    problem = BilevelProblem(
        lambda w, x: ((w - x) ** 2).sum(),
        lambda w, x: (w - 0.3).square().sum(),
        torch.zeros(2, dtype=torch.float64),
        torch.tensor([2.0, 0.5], dtype=torch.float64),
    )
    solvers = pytest.mark.parametrize(
        ("solver", "exact"),
        [
            (bl.LBFGS(bounds=(0.0, 1.0)), [0.0, 0.4]),
            (bl.ScipyMinimize(bounds=(0.0, 1.0)), [0.0, 0.4]),
            (bl.ProximalGradient(bl.prox.L1(0.1)), [3.3, 0.3]),
        ],
        ids=lambda case: type(case).__name__,
    )

    @solvers
    def test_the_error_is_that_of_what_was_solved(self, solver, exact):
        found = hypergradient(self.problem, solver=solver)
        torch.testing.assert_close(found.value, torch.tensor(exact, dtype=torch.float64))
        assert float(found.stats["error"]) < 1e-9

    @solvers
    def test_checks_and_advice(self, solver, exact):
        assert bl.diagnostics.check_hypergradient(self.problem, solver=solver).verdict == "right"
        advice = bl.diagnostics.advise(self.problem, solver=solver)
        assert advice.predicted_error <= 1e-6
        assert "bl.argmin(inner, params" in str(advice)
        with pytest.raises(ValueError, match="without the bounds or the prox"):
            bl.diagnostics.check_hypergradient(self.problem, solver=solver, reference_solver=bl.NewtonCG())

    @solvers
    def test_methods_are_compared_with_it(self, solver, exact):
        rows = bl.diagnostics.compare_methods(self.problem, solver=solver, repeats=1).rows
        assert len(rows) >= 5
        assert all(row.error < 1e-9 and row.evaluations > 0 for row in rows)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_a_batch(self, dtype):
        problem = BilevelProblem(
            lambda w, x: ((w - x) ** 2).sum(-1),
            lambda w, x: (w - 0.3).square().sum(),
            torch.zeros(3, 2, dtype=dtype),
            torch.tensor([2.0, 0.5], dtype=dtype),
        )
        found = hypergradient(problem, solver=bl.LBFGS(bounds=(0.0, 1.0)))
        torch.testing.assert_close(found.value, torch.tensor([0.0, 1.2], dtype=dtype))
        assert float(found.stats["error"]) < 1e-6


def test_an_adjoint_system_without_a_solution_has_no_estimate():
    """An outer loss that the null space of an overparameterised problem changes: every answer leaves something."""
    data, target = randn(3, 5, seed=0), randn(3, seed=1)
    problem = BilevelProblem(
        inner=lambda y, x: ((data * x) @ y - target).square().sum() / 2,
        outer=lambda y, x: (y - 1).square().sum(),
        init=torch.zeros(5, dtype=torch.float64),
        hparams=torch.full((5,), 1.2, dtype=torch.float64),
    )
    for solver in (bl.MINRES(), bl.LeastNorm()):
        checked = hypergradient(problem, hypergrad=bl.Implicit(solver), throw="ignore")
        assert checked.stats["error"].item() == torch.inf
