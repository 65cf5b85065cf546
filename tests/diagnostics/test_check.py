from __future__ import annotations

import math

import pytest
import torch

import bilevel as bl
from bilevel.diagnostics import BilevelProblem, HypergradientError, check_hypergradient
from bilevel.problems import Quadratics, Ridge
from tests.conformance import randn

EXACT = bl.NewtonCG(gtol=1e-13)


def with_penalty(penalty):
    """``|y - x|^2`` and the penalty, of three params and as many hyperparameters."""
    return BilevelProblem(
        inner=lambda y, x: (y - x).square().sum() + penalty(y, x),
        outer=lambda y, x: (y - 1).square().sum(),
        init=torch.zeros(3, dtype=torch.float64),
        hparams=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64),
    )


@pytest.mark.parametrize("problem", [Ridge(), Ridge(per_feature=True), Quadratics(conditions=(3.0, 30.0))])
def test_a_right_one_passes(problem):
    report = check_hypergradient(problem, solver=EXACT, throw="ignore")
    assert report.ok
    assert report.relative_error < 1e-6
    assert report.exact_error < 1e-9
    assert str(report).startswith("right: relative error")


def test_a_wrong_one_is_an_error_with_both_slopes():
    problem = Quadratics(conditions=(1.0, 30.0))
    identity = bl.Implicit(bl.Identity())
    with pytest.raises(HypergradientError, match=r"WRONG: .* Slopes along 3 random directions"):
        check_hypergradient(problem, solver=EXACT, hypergrad=identity, throw="ignore")
    report = check_hypergradient(problem, solver=EXACT, hypergrad=identity, throw="ignore", raise_exception=False)
    assert not report.ok
    assert report.relative_error == pytest.approx(report.exact_error, rel=1.0)


def test_a_detached_objective_is_found_out():
    """The classic mistake: a hyperparameter that enters through detached values."""
    problem = with_penalty(lambda y, x: (x.detach() * y.square()).sum())
    with pytest.raises(HypergradientError, match="parts of the objective that are detached"):
        check_hypergradient(problem, solver=EXACT, throw="ignore")


def test_an_inaccurate_solver_leaves_it_open_and_a_better_one_for_the_differences_settles_it():
    rough, ridge = bl.GradientDescent(0.1, 3), Ridge()
    problem = BilevelProblem(ridge.inner, ridge.outer, ridge.init, ridge.hparams)
    with pytest.warns(bl.SolveWarning, match="the inner solves are not accurate enough"):
        report = check_hypergradient(problem, solver=rough)
    assert (report.verdict, report.ok) == ("inconclusive", False)
    settled = check_hypergradient(problem, solver=rough, reference_solver=EXACT, throw="ignore", raise_exception=False)
    assert settled.verdict == "wrong"
    assert str(settled).startswith("WRONG")


def test_a_path_is_right_by_its_own_steps():
    """Three steps are no minimum; the derivative of three steps is that of three steps all the same."""
    problem = with_penalty(lambda y, x: (x.exp() * y.square()).sum())
    steps = bl.GradientDescent(0.05, 3)
    assert check_hypergradient(problem, solver=steps, hypergrad=bl.Unroll()).ok
    implicit = check_hypergradient(problem, solver=steps, throw="ignore", raise_exception=False)
    assert not implicit.ok


def noisy(where, size):
    def noise(value):
        return value + size * torch.randn((), dtype=torch.float64)

    return BilevelProblem(
        inner=lambda y, x: (noise if where == "inner" else float)(1.0) * (y - x).square().sum(),
        outer=lambda y, x: (y - 1).square().sum() * (noise if where == "outer" else float)(1.0),
        init=torch.zeros(3, dtype=torch.float64),
        hparams=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64),
    )


@pytest.mark.parametrize("where", ["inner", "outer"])
@pytest.mark.parametrize("size", [1e-9, 0.3])
@pytest.mark.parametrize("method", [bl.Implicit(), bl.FirstOrder()])
def test_a_random_problem_is_named_and_never_right(where, size, method):
    torch.manual_seed(0)
    report = check_hypergradient(noisy(where, size), hypergrad=method, throw="ignore")
    assert (report.verdict, report.ok) == ("inconclusive", False)
    assert f"the {where} function is random" in str(report)


def test_randomness_is_a_warning():
    with pytest.warns(bl.SolveWarning, match="inconclusive: .* the inner function is random"):
        check_hypergradient(noisy("inner", 0.3))


def test_a_random_solver_is_told():
    generator = torch.Generator().manual_seed(0)

    def solve(objective, start):
        return torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64) + 1e-3 * torch.randn(3, generator=generator)

    problem = noisy("nowhere", 0.0)
    solver = bl.External(solve)
    report = check_hypergradient(problem, solver=solver, throw="ignore", raise_exception=False)
    assert not report.ok
    assert "a second inner solve at one point gives another answer" in str(report) or report.verdict == "wrong"


def test_no_gradient_against_uncertain_differences_is_not_right():
    """Separable data have no minimum: the zero of `FirstOrder` is within what the differences are uncertain by."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    label = data.sum(-1).sign()
    problem = BilevelProblem(
        inner=lambda y, x: (torch.nn.functional.softplus(-label * (data @ y)) * torch.sigmoid(x)).mean(),
        outer=lambda y, x: y.square().sum(),
        init=torch.zeros(4, dtype=torch.float64),
        hparams=torch.randn(30, generator=generator, dtype=torch.float64),
    )
    settings = {"solver": bl.LBFGS(max_steps=100), "num_directions": 1, "throw": "ignore", "raise_exception": False}
    for method in (bl.FirstOrder(), bl.Implicit()):
        report = check_hypergradient(problem, hypergrad=method, **settings)
        assert not report.ok, str(report)


def test_a_zero_gradient_where_the_loss_does_not_move_is_inconclusive():
    problem = BilevelProblem(
        inner=lambda y, x: (y - 1).square().sum() + 0 * x.sum(),
        outer=lambda y, x: y.square().sum(),
        init=torch.zeros(3, dtype=torch.float64),
        hparams=torch.ones(2, dtype=torch.float64),
    )
    report = check_hypergradient(problem, throw="ignore")
    assert report.verdict == "inconclusive"
    assert "hardly changes by more than rounding" in str(report)


def test_one_missing_leaf_among_large_ones_is_found():
    problem = BilevelProblem(
        inner=lambda y, x: (y - 1e3 * x["a"]).square().sum() + 1e-6 * (x["b"].detach() * y).sum(),
        outer=lambda y, x: y.square().sum(),
        init=torch.zeros(3, dtype=torch.float64),
        hparams={"a": torch.ones(3, dtype=torch.float64), "b": torch.ones((), dtype=torch.float64)},
    )
    with pytest.raises(HypergradientError, match="the gradient of leaf 1 of hparams is missing"):
        check_hypergradient(problem, solver=EXACT, throw="ignore")


def test_an_outer_loss_without_any_gradient_is_wrong():
    problem = BilevelProblem(
        inner=lambda y, x: (y - x).square().sum(),
        outer=lambda y, x: y.detach().square().sum(),
        init=torch.zeros(3, dtype=torch.float64),
        hparams=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64),
    )
    with pytest.raises(HypergradientError, match="leaf 0 of hparams is missing"):
        check_hypergradient(problem, throw="ignore")


def test_a_nan_is_wrong():
    problem = BilevelProblem(
        inner=lambda y, x: (y - x).square().sum(),
        outer=lambda y, x: y.square().sum() + torch.where(x > 0, 0.0, (x - x).sqrt() * 0).sum(),
        init=torch.zeros(3, dtype=torch.float64),
        hparams=torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64),
    )
    assert check_hypergradient(problem, throw="ignore", raise_exception=False).verdict == "wrong"


@pytest.mark.parametrize("units", [1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_do_not_matter(units, dtype):
    problem = BilevelProblem(
        inner=lambda y, x: units * ((y - x).square().sum() + (x / 3 * y).square().sum()),
        outer=lambda y, x: units * (y - 1).square().sum(),
        init=torch.zeros(3, dtype=dtype),
        hparams=torch.tensor([0.5, 1.0, 2.0], dtype=dtype),
    )
    accurate = bl.NewtonCG(gtol=0.0, max_steps=8)
    report = check_hypergradient(problem, solver=accurate, hypergrad=bl.Implicit(bl.LU()), throw="ignore")
    assert report.ok, str(report)


def test_trees_and_roots():
    weight = torch.linspace(-0.3, 0.3, 9, dtype=torch.float64).view(3, 3)
    problem = BilevelProblem(
        inner=lambda z, x: {"z": torch.tanh(weight @ z["z"] + x["a"]) * x["b"]},
        outer=lambda z, x: z["z"].sum() * x["b"],
        init={"z": torch.zeros(3, dtype=torch.float64)},
        hparams={"a": torch.ones(3, dtype=torch.float64), "b": torch.tensor(0.7, dtype=torch.float64)},
        kind="fixed_point",
    )
    assert check_hypergradient(problem, solver=bl.Newton(tol=1e-13), throw="ignore").relative_error < 1e-6


def test_float32_knows_its_limits():
    problem = Ridge(per_feature=True, dtype=torch.float32)
    report = check_hypergradient(problem, solver=bl.NewtonCG(gtol=1e-6), tolerance=1e-2, throw="ignore")
    assert report.exact_error < 1e-4


def test_complex_hyperparameters_are_refused_in_words():
    c = torch.ones(2, dtype=torch.complex128)
    with pytest.raises(TypeError, match="hparams contains a complex tensor"):
        BilevelProblem(lambda y, c: (y * c).abs().square().sum(), lambda y, c: y.sum(), init=torch.zeros(2), hparams=c)


class TestAtAnOptimum:
    """Where the gradient vanishes nothing is small beside it, and a report must not contradict itself."""

    @staticmethod
    def ridge(distance):
        """One penalty, at a distance from the best one."""
        ridge, low, high = Ridge(), torch.tensor(-4.0).double(), torch.tensor(4.0).double()
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if ridge.hypergradient(middle) > 0 else (middle, high)
        return BilevelProblem(ridge.inner, ridge.outer, ridge.init, low + distance)

    @pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-7, 1e-5, 0.3])
    @pytest.mark.parametrize("solver", [EXACT, bl.LBFGS()])
    def test_a_right_one_is_right(self, distance, solver):
        report = check_hypergradient(self.ridge(distance), solver=solver)
        assert report.verdict == "right"
        assert report.relative_error <= report.tolerance
        assert report.optimum == (distance <= 1e-5)
        assert ("near an optimum" in str(report)) == report.optimum

    @pytest.mark.parametrize("distance", [1e-4, 1e-3, 1e-2])
    def test_a_wrong_one_is_wrong_there_too(self, distance):
        identity = bl.Implicit(bl.Identity(1e-3))
        report = check_hypergradient(
            self.ridge(distance), solver=EXACT, hypergrad=identity, throw="ignore", raise_exception=False
        )
        assert report.verdict == "wrong"

    @pytest.mark.parametrize("distance", [0.0, 1e-5, 1e-3])
    def test_single_precision_is_right_to_its_own_noise(self, distance):
        """The default inner solve ends at 3e-5 of the params there, which the slopes of an optimum are not above."""
        problem, single = self.ridge(distance), Ridge(dtype=torch.float32)
        report = check_hypergradient(
            BilevelProblem(single.inner, single.outer, single.init, problem.hparams.float()), throw="ignore"
        )
        assert report.verdict == "right", str(report)
        assert 1e-5 < report.noise < 1e-3
        assert report.relative_error <= report.allowed < 3e-3
        assert "raised to" in str(report)

    def test_noise_excuses_no_wrong_one(self):
        problem, single = self.ridge(1e-3), Ridge(dtype=torch.float32)
        report = check_hypergradient(
            BilevelProblem(single.inner, single.outer, single.init, problem.hparams.float()),
            hypergrad=bl.Implicit(bl.Identity(1e-3)),
            throw="ignore",
            raise_exception=False,
        )
        assert report.verdict == "wrong", str(report)

    def test_inner_errors_that_newton_steps_mend_leave_it_right(self):
        """Differences between inner solutions that are this rough hide the slopes, those after Newton steps do not."""
        report = check_hypergradient(self.ridge(1e-3), solver=EXACT, reference_solver=bl.LBFGS(gtol=1e-2))
        assert report.verdict == "right", str(report)
        assert report.uncertainty <= report.tolerance < report.inner


def test_where_no_solution_is_near_it_cannot_tell_and_says_what_to_check():
    """A network of more unknowns than are factorised, far from a minimum: few Newton steps are spent on it."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1))
    x, y = torch.randn(50, 20), torch.randn(50, 1)
    log_decay = torch.tensor(-5.0, requires_grad=True)

    def loss(params):
        return torch.nn.functional.mse_loss(torch.func.functional_call(net, params, (x,)), y)

    def inner(params):
        return loss(params) + log_decay.exp() * sum(p.square().sum() for p in params.values())

    problem = BilevelProblem(inner, loss, dict(net.named_parameters()))
    steps = bl.Steps(bl.SGD(lr=0.1), max_steps=3)
    with (
        pytest.warns(bl.SolveWarning, match=r"no solution is near.*check a short path"),
        pytest.warns(bl.SolveWarning, match=r"The adjoint solve"),
    ):
        report = check_hypergradient(problem, solver=steps, num_directions=1)
    assert report.verdict == "inconclusive"
    assert check_hypergradient(problem, solver=steps, hypergrad=bl.Unroll(), num_directions=1).verdict == "right"


def ridges(share=1.0, unit=1.0):
    """Log penalties whose gradient is a share of the right one, and an offset of the targets in other units."""
    data, targets, held_out, held_targets = randn(20, 6), randn(20, seed=2), randn(15, 6, seed=3), randn(15, seed=4)

    def inner(w, h):
        penalty = share * h["log_penalty"] + (1 - share) * h["log_penalty"].detach()
        return ((data @ w - targets) ** 2).sum() / 2 + (penalty.exp() * w**2).sum() / 2

    def outer(w, h):
        return ((held_out @ w - held_targets - unit * h["offset"]) ** 2).mean()

    zeros = torch.zeros(6, dtype=torch.float64)
    return BilevelProblem(inner, outer, zeros, {"log_penalty": zeros, "offset": zeros.new_ones(())})


@pytest.mark.parametrize("unit", [1.0, 1e2, 1e3])
def test_a_leaf_that_is_half_detached_beside_a_large_gradient_is_found(unit):
    with pytest.raises(HypergradientError, match="WRONG"):
        check_hypergradient(ridges(0.5, unit))
    assert check_hypergradient(ridges(1.0, unit)).verdict == "right"


def test_a_linear_solve_that_is_exact_enough_for_the_whole_is_no_wrong_leaf():
    report = check_hypergradient(ridges(1.0, 1e3), hypergrad=bl.Implicit(bl.CG(rtol=1e-2)), raise_exception=False)
    assert report.verdict == "right"


def test_hyperparameters_move_in_their_own_sizes():
    """A step for the largest made penalties of one negative."""
    data, targets = randn(20, 6), randn(20, seed=2)
    x = torch.tensor([1e6, 1e-3, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    problem = BilevelProblem(
        lambda w, x: ((data @ w - targets) ** 2).sum() / 2 + (x * w**2).sum() / 2,
        lambda w, x: ((data @ w) ** 2).mean() + w.sum(),
        torch.zeros(6, dtype=torch.float64),
        x,
    )
    assert check_hypergradient(problem).verdict == "right"


@pytest.mark.parametrize(
    "outer",
    [
        lambda w: w.relu().sum() + w.sum(),
        lambda w: w.abs().sum() + w.sum(),
        lambda w: torch.where(w > 0, 3 * w, w).sum(),
        lambda w: w.max(),
    ],
    ids=["relu", "abs", "where", "max"],
)
def test_at_a_kink_it_cannot_tell(outer):
    """Central differences are certain there, and are none of the slopes."""
    zeros = torch.zeros(6, dtype=torch.float64)
    problem = BilevelProblem(lambda w, x: ((w - x) ** 2).sum() / 2, lambda w, x: outer(w), zeros, zeros)
    with pytest.warns(bl.SolveWarning, match="kink"):
        assert check_hypergradient(problem).verdict == "inconclusive"
    smooth = BilevelProblem(problem.inner, problem.outer, zeros, randn(6))
    assert check_hypergradient(smooth).verdict == "right"


@pytest.mark.parametrize(
    ("name", "values"),
    [("num_directions", (0, 1.5)), ("step", (0.0, math.inf)), ("tolerance", (-1.0, math.inf, math.nan))],
)
def test_settings_that_mean_nothing_are_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} is "):
            check_hypergradient(ridges(), **{name: value})


def test_what_agrees_at_a_maximum_is_not_right():
    problem = BilevelProblem(
        inner=lambda y, x: (y.square() - x).square().sum(),  # zero is a maximum between two minima
        outer=lambda y, x: (y.sum() - 2).square() * x,
        init=torch.zeros(2, dtype=torch.float64),
        hparams=torch.tensor(1.5, dtype=torch.float64),
    )
    report = check_hypergradient(problem, throw="ignore", raise_exception=False)
    assert report.verdict == "inconclusive"
    assert "a saddle or a maximum" in str(report)


class _Scaled(torch.autograd.Function):
    """``|y|^2`` with a backward pass that is off by a factor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y, factor):
        return y.square().sum()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.y, ctx.factor = inputs

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.factor * ctx.y * grad, None


@pytest.mark.parametrize("factor", [1.0, 1.001, 1.5])
def test_a_gradient_that_is_not_that_of_the_inner_function_is_told(factor):
    """Differences follow the root of the wrong gradient, as the hypergradient does."""
    problem = BilevelProblem(
        inner=lambda y, x: (y - 1).square().sum() + x.exp() * _Scaled.apply(y, factor),
        outer=lambda y, x: (y - 0.3).square().sum(),
        init=torch.zeros(3, dtype=torch.float64),
        hparams=torch.tensor(0.2, dtype=torch.float64),
    )
    report = check_hypergradient(problem, solver=bl.NewtonCG(gtol=1e-8), throw="ignore", raise_exception=False)
    assert report.verdict == ("right" if factor == 1 else "inconclusive"), str(report)
    assert ("is not that of its values" in str(report)) == (factor != 1)


@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e-5, 1e-6])
def test_hyperparameters_of_a_small_unit_at_zero(unit):
    """What is small beside their curvature times one is not small, where they themselves never come to one."""
    data, target = randn(20, 6, seed=1), randn(20, seed=2)
    other, wanted = randn(20, 6, seed=3), randn(20, seed=4)
    problem = BilevelProblem(
        inner=lambda y, x: (data @ y - target).square().mean() + ((x / unit).exp() * y.square()).sum(),
        outer=lambda y, x: (other @ y - wanted).square().mean(),
        init=torch.zeros(6, dtype=torch.float64),
        hparams=torch.zeros(6, dtype=torch.float64),
    )
    exact, damped = (  # damped: 8 % off
        check_hypergradient(problem, solver=EXACT, hypergrad=hypergrad, throw="ignore", raise_exception=False)
        for hypergrad in (bl.Implicit(bl.Cholesky()), bl.Implicit(damping=0.3))
    )
    assert exact.ok or (unit == 1e-6 and exact.verdict == "inconclusive"), str(exact)
    assert damped.verdict == "wrong" or (unit == 1e-6 and damped.verdict == "inconclusive"), str(damped)


@pytest.mark.parametrize("outer", [lambda w, x: (w.sum(),), lambda w, x: w, lambda w, x: w.sum().long()])
def test_an_outer_function_that_is_no_scalar_is_told(outer):
    zeros = torch.zeros(6, dtype=torch.float64)
    with pytest.raises(TypeError, match="outer returned"):
        check_hypergradient(BilevelProblem(lambda w, x: ((w - x) ** 2).sum(), outer, zeros, zeros))
    with pytest.raises(TypeError, match=r"hparams contains a tensor of torch\.int64"):
        BilevelProblem(lambda w, x: ((w - x) ** 2).sum(), outer, zeros, zeros.long())


def test_a_step_out_of_the_domain_is_followed_by_a_smaller_one():
    """A scale of 1e-4 under a square root."""
    x = torch.full((3,), 5e-5, dtype=torch.float64)
    problem = BilevelProblem(
        lambda w, x: ((w - x.sqrt()) ** 2).sum(), lambda w, x: (w**2).sum() + w.sum(), torch.zeros_like(x), x
    )
    assert check_hypergradient(problem, solver=EXACT, tolerance=1e-3).verdict == "right"


@pytest.mark.parametrize("hparams", [3.0, {"a": torch.ones(()), "b": None}])
def test_hyperparameters_that_are_no_tensors_are_named(hparams):
    problem = BilevelProblem(lambda y, x: y.square().sum(), lambda y, x: y.sum(), torch.zeros(2), hparams)
    with pytest.raises(TypeError, match="a tensor, or a tree of tensors, is needed"):
        check_hypergradient(problem)
