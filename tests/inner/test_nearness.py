"""Solves without a tolerance: right in any units and from any start, or they say that they are not."""

import math
import warnings

import pytest
import torch

import bilevel as bl
from bilevel.problems import Logistic, Ridge, WeightedRidge

DTYPES = [torch.float32, torch.float64]
PROMISED = {torch.float32: 1e-3, torch.float64: 1e-6}
SOLVERS = [bl.LBFGS(), bl.NewtonCG(), bl.ScipyMinimize("L-BFGS-B")]


def gradient(value, x):
    return torch.autograd.grad(value, x)[0]


def relative(found, exact):
    exact = torch.as_tensor(exact, dtype=torch.float64)
    return float((found.double() - exact).norm() / exact.norm())


def exponential(y, x):
    """Minimum at 0 for x = 1, with dy/dx = 1/2."""
    return (y.exp() - x * y + y.square() / 2).sum()


class TestMinimisers:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("solver", SOLVERS[:2], ids=repr)
    @pytest.mark.parametrize("start", [-30.0, 1e-12, 0.5, 3.0, 10.0, 30.0])
    def test_a_start_far_away_does_not_loosen_the_tolerance(self, solver, start, dtype):
        x = torch.tensor(1.0, dtype=dtype, requires_grad=True)
        fit = bl.argmin(exponential, torch.tensor(start, dtype=dtype), x, solver=solver)
        assert fit.result is bl.Result.CONVERGED
        assert relative(gradient(fit.value, x), 0.5) < PROMISED[dtype]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("loss", [1e-20, 1e-6, 1e6, 1e20])
    @pytest.mark.parametrize("params", [1e-6, 1.0, 1e6])
    def test_units_of_loss_and_params_do_not_matter(self, loss, params, dtype):
        problem = Ridge(dtype=dtype)
        exact = Ridge(dtype=torch.float64)
        x = problem.hparams.clone().requires_grad_()
        steps = {}
        for unit in (1.0, loss):
            fit = bl.argmin(lambda y, x, u=unit: u * problem.inner(y / params, x), problem.init, x)
            assert fit.result is bl.Result.CONVERGED
            found = gradient(problem.outer(fit.value / params, x), x)
            assert relative(found, exact.hypergradient(exact.hparams)) < PROMISED[dtype]
            steps[unit] = int(fit.stats["num_steps"])
        assert abs(steps[1.0] - steps[loss]) <= 2

    @pytest.mark.parametrize("scale", [1e-12, 1e-5, 1e5])
    def test_small_and_large_targets_take_steps(self, scale):
        generator = torch.Generator().manual_seed(1)
        a = torch.randn(30, 4, generator=generator)
        b = scale * a.sum(1)

        def hypergradient(a, b, solve):
            x = torch.tensor(0.1, dtype=a.dtype, requires_grad=True)
            w = solve(a, b, x)
            return gradient((a @ w - b).square().mean(), x)

        def exactly(a, b, x):
            return torch.linalg.solve(a.T @ a / 30 + x * torch.eye(4, dtype=a.dtype), a.T @ b / 30)

        def solved(a, b, x):
            fit = bl.argmin(lambda w: (a @ w - b).square().mean() + x * w.square().sum(), torch.zeros(4))
            assert fit.stats["num_steps"] > 0
            return fit.value

        assert relative(hypergradient(a, b, solved), hypergradient(a.double(), b.double(), exactly)) < 1e-3

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_raw_features_with_a_robust_loss_are_right_or_told(self, dtype):
        """L-BFGS sees flat directions too late; the gradient over the smallest curvature does not."""
        from sklearn.datasets import load_diabetes

        a, b = (torch.tensor(part, dtype=torch.float64) for part in load_diabetes(return_X_y=True, scaled=False))
        loss = torch.nn.functional.huber_loss

        def hypergradient(dtype, **settings):
            x, features, targets = torch.tensor(-2.0, dtype=dtype, requires_grad=True), a.to(dtype), b.to(dtype)

            def inner(w):
                return loss(features[:309] @ w, targets[:309]) + x.exp() / 2 * w.square().sum()

            fit = bl.argmin(inner, torch.zeros(10, dtype=dtype), **settings)
            return gradient(loss(features[309:] @ fit.value, targets[309:]), x)

        exact = hypergradient(torch.float64, solver=bl.NewtonCG(), hypergrad=bl.Implicit(bl.Cholesky()))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = hypergradient(dtype)
        assert relative(found, exact) < PROMISED[dtype] or any(issubclass(w.category, bl.SolveWarning) for w in told)

    def test_features_in_different_units(self):
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(100, 2, generator=generator) * torch.tensor([3000.0, 1.0])
        b = a @ torch.tensor([0.01, 1.0])
        x = torch.tensor([0.1, 0.1], requires_grad=True)
        fit = bl.argmin(
            lambda w: (a @ w - b).square().mean() + (x * w * w).sum(), torch.zeros(2), hypergrad=bl.Implicit(bl.LU())
        )
        exact = torch.linalg.solve(
            a.double().T @ a.double() / 100 + 0.1 * torch.eye(2), a.double().T @ b.double() / 100
        )
        assert relative(fit.value.detach(), exact) < 1e-3

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_raw_medical_data_are_right_or_told(self, dtype):
        from sklearn.datasets import load_breast_cancer

        a, b = (torch.tensor(part, dtype=torch.float32) for part in load_breast_cancer(return_X_y=True))
        loss = torch.nn.functional.binary_cross_entropy_with_logits

        def hypergradient(dtype, **settings):
            x = torch.tensor(-2.0, dtype=dtype, requires_grad=True)
            features, labels = a.to(dtype), b.to(dtype)

            def inner(w):
                return loss(features[:300] @ w, labels[:300]) + x.exp() / 2 * w.square().sum()

            fit = bl.argmin(inner, torch.zeros(30, dtype=dtype), **settings)
            return gradient(loss(features[300:] @ fit.value, labels[300:]), x)

        accurate = {"solver": bl.NewtonCG(gtol=1e-10, max_steps=500), "hypergrad": bl.Implicit(bl.Cholesky())}
        exact = hypergradient(torch.float64, **accurate)
        if dtype is torch.float64:  # the gradient that is left, over the smallest curvature, is just above the promise
            with pytest.warns(bl.SolveWarning, match="less accurate"):
                found = hypergradient(dtype)
            assert relative(found, exact) < 1e-5
        else:
            with pytest.warns(bl.SolveWarning, match="less accurate.*condition"):
                found = hypergradient(dtype)
            assert relative(found, exact) < 2e-2

    @pytest.mark.parametrize("start", [0.0, 3.0, 5.0, 8.0])
    def test_poisson_regression_from_starts_where_the_loss_explodes(self, start):
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(60, 3, dtype=torch.float64, generator=generator)
        counts = torch.poisson((a @ torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)).exp(), generator)

        def hypergradient(start, **settings):
            x = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
            fit = bl.argmin(
                lambda w: ((a @ w).exp() - counts * (a @ w)).mean() + x * w.square().sum(),
                torch.full((3,), start, dtype=torch.float64),
                **settings,
            )
            return gradient(fit.value.square().sum(), x)

        exact = hypergradient(0.0, solver=bl.NewtonCG(gtol=1e-12), hypergrad=bl.Implicit(bl.Cholesky()))
        assert relative(hypergradient(start), exact) < 1e-6

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("solver", SOLVERS, ids=repr)
    def test_a_warm_start_at_the_solution_makes_no_step(self, solver, dtype):
        for problem in (Ridge(dtype=dtype), WeightedRidge(dtype=dtype), Logistic(dtype=dtype)):
            x = problem.hparams.clone().requires_grad_()
            first = bl.argmin(problem.inner, problem.init, x, solver=bl.NewtonCG(), throw="raise")
            again = bl.argmin(problem.inner, first.value.detach(), x, solver=solver, throw="raise")
            assert again.stats["num_steps"] == 0
            assert again.result is bl.Result.CONVERGED
            truth = type(problem)(dtype=torch.float64)
            found = gradient(problem.outer(again.value, x), x)
            assert relative(found, truth.hypergradient(truth.hparams)) < 2 * PROMISED[dtype]

    def test_each_problem_of_a_batch_has_its_own_units(self):
        units = torch.tensor([1e-8, 1.0, 1e8], dtype=torch.float64)
        start = torch.tensor([[3.0, -2.0], [0.1, 0.2], [1e3, 0.0]], dtype=torch.float64)
        x = torch.ones(3, dtype=torch.float64, requires_grad=True)

        def inner(y, x):
            return units * (y.exp() - x.unsqueeze(-1) * y + y.square() / 2).sum(-1)

        fit = bl.argmin(inner, start.clamp_max(30), x)
        assert (fit.stats["result"] == 0).all()
        assert gradient(fit.value.sum(), x).tolist() == pytest.approx([1.0] * 3, rel=1e-6)

    def test_params_that_end_at_zero(self):
        for dtype in DTYPES:
            x = torch.tensor(2.0, dtype=dtype, requires_grad=True)
            fit = bl.argmin(lambda y, x: x * y.square().sum(), torch.ones(3, dtype=dtype), x)
            assert fit.result is bl.Result.CONVERGED
            assert gradient(fit.value.sum(), x).abs() < 1e-6

    def test_the_distance_that_is_left_is_told(self):
        problem = Ridge()
        fit = bl.argmin(problem.inner, problem.init, problem.hparams, hypergrad=None)
        exact = problem.solution(problem.hparams)
        assert float(fit.stats["step_norm"]) <= 1e-9 * float(exact.norm())
        assert float((fit.value - exact).norm()) <= 1e-8 * float(exact.norm())

    def test_the_adjoint_solve_sees_what_the_inner_solver_did_not(self):
        """A flat direction that no step went along: the gradient vanishes beside that of the steep one."""
        curvature = torch.tensor([1.0, 1e-12], dtype=torch.float64)
        x = torch.tensor([1.0, 1e-12], dtype=torch.float64, requires_grad=True)

        def inner(y):
            return (curvature * y.square()).sum() / 2 - (x * y).sum()

        near = torch.tensor([1.0 + 1e-10, 0.0], dtype=torch.float64)
        fit = bl.argmin(inner, near, hypergrad=bl.Implicit(bl.LU()))
        assert fit.stats["num_steps"] == 0
        with pytest.warns(bl.SolveWarning, match="less accurate"):
            gradient(fit.value.sum(), x)

    @pytest.mark.parametrize("solver", [None, bl.NewtonCG(), bl.LBFGS(callback=bl.History())], ids=repr)
    def test_params_far_from_their_origin(self, solver):
        """The frequency of a peak in Hz: a step of a billionth of it is a thousandth of the width, which counts."""
        origin, times = 2.4e9, torch.linspace(-3e3, 3e3, 100, dtype=torch.float64)
        heights = torch.exp(-(((times - 120) / 1e3) ** 2)) + 0.05 * torch.sin(torch.arange(100).double())

        def solve(origin):
            x = heights.clone().requires_grad_()
            fit = bl.argmin(
                lambda y: (torch.exp(-(((times + origin - y) / 1e3) ** 2)) - x).square().sum(),
                torch.tensor(origin + 600.0, dtype=torch.float64),
                solver=solver,
            )
            return gradient(fit.value, x)

        assert relative(solve(origin), solve(0.0)) < 1e-6


class TestSystems:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("unit", [1.0, 1e6, 1e9])
    def test_unknowns_of_other_units_do_not_hide_each_other(self, unit, dtype):
        x, start = torch.tensor(2.0, dtype=dtype, requires_grad=True), torch.zeros(2, dtype=dtype)
        unit = min(unit, 1e6) if dtype == torch.float32 else unit
        for weight in (1.0, 1 / unit):
            fit = bl.root(lambda y, w=weight: torch.stack([w * (y[0] - unit), y[1].exp() - x]), start, throw="raise")
            assert relative(gradient(fit.value[1], x), 0.5) < PROMISED[dtype]
        fit = bl.fixed_point(lambda y: torch.stack([y[0] / 2 + unit, 0.45 * x * y[1].cos()]), start, throw="raise")
        y = float(fit.value[1])
        exact = 0.45 * math.cos(y) / (1 + 0.9 * math.sin(y))
        assert y == pytest.approx(0.9 * math.cos(y), rel=PROMISED[dtype])
        assert relative(gradient(fit.value[1], x), exact) < PROMISED[dtype]

    def test_an_unknown_far_from_its_origin(self):
        x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        fit = bl.root(lambda y: torch.exp(y - 1e8) - x, torch.tensor(1e8, dtype=torch.float64), throw="raise")
        assert relative(gradient(fit.value, x), 0.5) < 1e-6

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("x", [1e-22, 1e-11, 1.0, 1e8])
    @pytest.mark.parametrize("start", [1e-5, 1.0, 1e3])
    @pytest.mark.parametrize("solver", [bl.Newton(), bl.ScipyRoot()], ids=repr)
    def test_square_roots_of_any_size(self, solver, start, x, dtype):
        if dtype is torch.float32 and x == 1e-22:
            pytest.skip("x and the residual underflow beside each other")
        x = torch.tensor(x, dtype=dtype, requires_grad=True)
        try:
            fit = bl.root(lambda y, x: y**2 - x, torch.tensor(start, dtype=dtype), x, solver=solver, throw="raise")
        except bl.SolveError:
            assert isinstance(solver, bl.ScipyRoot)  # SciPy gives up where the curvature changes by orders of magnitude
            return
        exact = 0.5 / x.detach().double().sqrt()
        assert relative(gradient(fit.value, x).abs(), exact) < PROMISED[dtype]

    @pytest.mark.parametrize("start", [1.0, 10.0, 30.0])
    def test_an_exponential_from_far(self, start):
        x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        fit = bl.root(lambda y: y.exp() - x, torch.tensor(start, dtype=torch.float64), throw="raise")
        assert relative(gradient(fit.value, x), 0.5) < 1e-8

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("solver", [bl.Anderson(), bl.Picard()], ids=repr)
    @pytest.mark.parametrize("start", [1e-3, 1.0, 1e12])
    @pytest.mark.parametrize("x", [1e-8, 2.0, 1e8])
    def test_fixed_points_from_far(self, x, start, solver, dtype):
        x = torch.tensor(x, dtype=dtype, requires_grad=True)
        fit = bl.fixed_point(
            lambda y: 0.5 * (y + x / y), torch.tensor(start, dtype=dtype), solver=solver, throw="raise"
        )
        assert relative(fit.value.detach(), math.sqrt(float(x))) < PROMISED[dtype]

    def test_a_slow_contraction_is_not_taken_for_its_limit(self):
        """The residual is a hundredth of the distance where the map contracts by 0.99."""
        x = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        fit = bl.fixed_point(
            lambda y: 0.99 * y + 0.01 * x, torch.tensor(0.0, dtype=torch.float64), solver=bl.Picard(max_steps=5000)
        )
        assert fit.result is bl.Result.CONVERGED
        assert relative(fit.value.detach(), 1.0) < 1e-7

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("start", [1.0, 1e5, 1e8])
    def test_a_slow_contraction_from_far_is_not_taken_for_rounding(self, start, dtype):
        x = torch.tensor(1.0, dtype=dtype, requires_grad=True)
        fit = bl.fixed_point(
            lambda y: 0.98 * y + 0.02 * x, torch.tensor(start, dtype=dtype), solver=bl.Picard(max_steps=5000)
        )
        assert fit.result is bl.Result.CONVERGED
        assert relative(fit.value.detach(), 1.0) < PROMISED[dtype]

    def test_a_warm_start_at_the_solution_makes_hardly_a_step(self):
        """A map has to be seen to move before its short residual says that the fixed point is near."""
        for solve, fn in ((bl.root, lambda y: y.exp() - 2), (bl.fixed_point, lambda y: (y + 2 / y) / 2)):
            first = solve(fn, torch.tensor(1.0, dtype=torch.float64))
            assert solve(fn, first.value).stats["num_steps"] <= (solve is bl.fixed_point)
        torch.manual_seed(0)
        weights, bias = torch.randn(40, 40).double() / 16, torch.randn(40).double()
        first = bl.fixed_point(lambda y: torch.tanh(weights @ y + bias), torch.zeros(40).double())
        again = bl.fixed_point(lambda y: torch.tanh(weights @ y + bias), first.value)
        assert first.result is bl.Result.CONVERGED
        assert again.stats["num_steps"] <= 2 < first.stats["num_steps"]


@pytest.mark.parametrize("solver", [None, bl.NewtonCG(), bl.ScipyMinimize("L-BFGS-B")])
def test_params_of_two_precisions_seldom_stagnate(solver):
    """The rounding of the coarser ones is the end, whatever the data: for one in five it was none."""
    converged = 0
    for seed in range(24):
        data = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

        def inner(y, data=data):
            fit = (data @ y["fine"] - 1).square().sum() + (y["fine"].sum() - y["coarse"].sum()).square()
            return fit + 0.1 * (y["coarse"].square().sum() + y["fine"].square().sum())

        init = {"fine": torch.zeros(3, dtype=torch.float64), "coarse": torch.zeros(2)}
        converged += bl.argmin(inner, init, solver=solver, throw="ignore").result is bl.Result.CONVERGED
    assert converged >= 23


@pytest.mark.parametrize("solver", [None, bl.NewtonCG()])
@pytest.mark.parametrize("units", [1.0, 1e3])
def test_params_of_two_precisions_converge_to_what_the_coarser_allows(solver, units):
    torch.manual_seed(0)
    data, x = torch.randn(6, 3, dtype=torch.float64), torch.tensor(0.1, requires_grad=True)

    def inner(y):
        fit = (data @ y["fine"] - 1).square().sum() + (y["fine"].sum() - y["coarse"].sum()).square()
        return units * (fit + x * (y["coarse"].square().sum() + y["fine"].square().sum()))

    def solve(dtype):
        init = {"fine": torch.zeros(3, dtype=torch.float64), "coarse": torch.zeros(2, dtype=dtype)}
        fit = bl.argmin(inner, init, solver=solver)  # no warning: they are errors here
        return fit, *torch.autograd.grad(fit.value["coarse"].sum(), x)

    (mixed, grad), (_, exact) = solve(torch.float32), solve(torch.float64)
    assert (mixed.result, mixed.adjoint.result) == (bl.Result.CONVERGED, bl.Result.CONVERGED)
    assert float(grad) == pytest.approx(float(exact), rel=1e-4)
