"""What solves that went well hide: saddles on a symmetry, kinks about which ordered steps turn, coupled batches."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

import bilevel as bl
from bilevel.inner import first_look
from bilevel.inner.first_look import Known

F64 = torch.float64
SADDLE, KINK, COUPLED = "bends down from there", "it has a kink", "The problems of the batch depend on each other"


def randn(*shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(0))


def two_means(x, means):
    """Negative log-likelihood of two components of equal weight."""
    return -torch.logsumexp(-((x[:, None] - means) ** 2) / 2, 1).mean()


def told(solve):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solve()
    return [str(warning.message) for warning in caught if issubclass(warning.category, bl.SolveWarning)]


class TestSaddles:
    x = torch.cat([randn(50) - 2, randn(50) + 2])

    @pytest.mark.parametrize("solver", [None, bl.NewtonCG(), bl.ScipyMinimize()], ids=str)
    def test_equal_components(self, solver):
        def loss(means):
            return two_means(self.x, means)

        with pytest.warns(bl.SolveWarning, match=SADDLE):
            fit = bl.argmin(loss, torch.ones(2, dtype=F64), solver=solver)
        assert fit.value[0].item() == pytest.approx(fit.value[1].item())

    def test_unequal_components_are_a_minimum(self):
        assert not told(lambda: bl.argmin(lambda m: two_means(self.x, m), torch.tensor([1.0, 1.01], dtype=F64)))

    def test_a_network_of_zeros(self):
        x = randn(30, 2)
        net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        zeros = {name: torch.zeros_like(param) for name, param in net.named_parameters()}
        y = (x[:, :1] * x[:, 1:]).tanh() + 0.3

        def loss(params):
            return mse_loss(functional_call(net, params, (x,)), y) + 1e-3 * sum(
                p.square().sum() for p in params.values()
            )

        assert any(SADDLE in text for text in told(lambda: bl.argmin(loss, zeros)))

    def test_it_is_looked_at_once_for_a_function_and_raised_where_that_is_asked_for(self):
        def loss(shift, means):
            return two_means(self.x + shift, means)

        start = torch.ones(2, dtype=F64)
        with pytest.raises(bl.SolveError, match=SADDLE):
            bl.argmin(partial(loss, 0.0), start, throw="raise")
        assert not told(lambda: bl.argmin(partial(loss, 0.1), start))
        assert told(lambda: bl.argmin(partial(loss, 0.1), start, solver=bl.NewtonCG()))
        assert not told(lambda: bl.argmin(lambda m: two_means(self.x, m), start, throw="ignore"))

    def test_a_solve_that_is_to_say_nothing_leaves_the_look_to_the_next(self):
        def loss(means):
            return two_means(self.x, means)

        start = torch.ones(2, dtype=F64)
        assert not told(lambda: bl.argmin(loss, start, throw="ignore"))
        assert told(lambda: bl.argmin(loss, start))

    def test_with_aux(self):
        with pytest.warns(bl.SolveWarning, match=SADDLE):
            bl.argmin(lambda m: (two_means(self.x, m), m), torch.ones(2, dtype=F64), has_aux=True)

    def test_a_tolerance_of_ones_own_may_end_anywhere(self):
        start = torch.tensor([1.0, 1.001], dtype=F64)
        assert not told(lambda: bl.argmin(lambda m: two_means(self.x, m), start, solver=bl.LBFGS(gtol=1e-2)))


class TestKinks:
    x = randn(40, 5)
    y = x[:, 0] + 0.3 * torch.randn(40, dtype=F64, generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize(
        "solver",
        [bl.Steps(bl.Adam(1e-2), max_steps=600), bl.Steps(bl.SGD(1e-2), max_steps=600), bl.GradientDescent(1e-2, 600)],
        ids=str,
    )
    def test_the_lasso_by_ordered_steps(self, solver):
        start = torch.full((5,), 0.1, dtype=F64)

        def lasso(w):
            return (self.x @ w - self.y).square().mean() + 0.14 * w.abs().sum()

        with pytest.warns(bl.SolveWarning, match=KINK):
            bl.argmin(lasso, start, solver=solver)

    def test_a_kink_where_the_default_says_that_it_has_converged(self):
        """Forward mode solves no system that would doubt it: the derivative of the minimum, x, is 1, and not 0."""
        x = torch.tensor(2.0, dtype=F64)

        def minimum(x):
            return bl.argmin(lambda y: (y - x).abs() + 0.1 * y**2, torch.tensor(0.0, dtype=F64)).value

        with pytest.warns(bl.SolveWarning, match=KINK):
            torch.func.jvp(minimum, (x,), (torch.ones_like(x),))

    def test_a_random_objective_that_is_trained_alone_has_none(self, monkeypatch):
        draws = torch.Generator().manual_seed(0)

        def loss(w):
            batch = torch.randint(40, (4,), generator=draws)
            return (self.x[batch] @ w - self.y[batch]).square().mean()

        for _ in range(20):
            monkeypatch.setattr(first_look, "LOOKED", first_look.Known())
            solve = partial(bl.argmin, partial(loss), torch.zeros(5, dtype=F64), solver=bl.GradientDescent(0.05, 20))
            assert not told(lambda solve=solve: solve(hypergrad=None))

    @pytest.mark.parametrize("dtype", [torch.float32, F64])
    @pytest.mark.parametrize("steps", [3, 100])
    def test_a_network_of_relus_is_no_such_thing(self, dtype, steps):
        x = randn(60, 4).to(dtype)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 1)).to(dtype)
        y = x.prod(1, keepdim=True).sin()

        def loss(params):
            return mse_loss(functional_call(net, params, (x,)), y)

        params = dict(net.named_parameters())
        for solver in (bl.GradientDescent(0.1, steps), bl.Steps(bl.Adam(1e-2), max_steps=steps)):
            assert not told(lambda solver=solver: bl.argmin(partial(loss), params, solver=solver))


class TestStepsThatNobodyAskedFor:
    SLOW = (bl.GradientDescent(1e-3), bl.Steps(bl.SGD(1e-3)), bl.TorchOptim(torch.optim.SGD, lr=1e-3))

    @pytest.mark.parametrize("solver", SLOW, ids=str)
    def test_they_are_told_where_they_came_nowhere(self, solver):
        start = torch.zeros(2, dtype=F64)
        (text,) = told(lambda: bl.argmin(lambda y: (y - 1).square().sum(), start, solver=solver))
        assert "100 steps were made, the default of this solver, and the gradient there is 0.82 of that" in text

    @pytest.mark.parametrize(
        "solver",
        [bl.GradientDescent(1e-3, 100), bl.Steps(bl.SGD(1e-3), max_steps=100), bl.GradientDescent(0.3)],
        ids=str,
    )
    def test_an_order_is_not_questioned_and_an_arrival_neither(self, solver):
        assert not told(lambda: bl.argmin(lambda y: (y - 1).square().sum(), torch.zeros(2, dtype=F64), solver=solver))

    def test_the_default_is_a_number_like_others(self):
        assert bl.GradientDescent(0.1) == bl.GradientDescent(0.1, 100)
        assert repr(bl.GradientDescent(0.1)) == repr(bl.GradientDescent(0.1, 100))


class TestCoupledBatches:
    matrix = torch.tensor([[2.0, 0.5], [0.5, 3.0]], dtype=F64)
    start = torch.zeros(2, dtype=F64)

    def test_losses(self):
        solver = bl.GradientDescent(lr=0.1, max_steps=500)
        with pytest.warns(bl.SolveWarning, match=COUPLED):
            bl.argmin(lambda y: y * (self.matrix @ y) / 2 - y, self.start, solver=solver)
        assert not told(
            lambda: bl.argmin(lambda y: y * (self.matrix.diagonal() * y) / 2 - y, self.start, solver=solver)
        )

    def test_systems(self):
        with pytest.warns(bl.SolveWarning, match=COUPLED):
            bl.root(lambda y: self.matrix @ y - 1, self.start, batched=True)
        with pytest.warns(bl.SolveWarning, match=COUPLED):
            bl.fixed_point(lambda y: (0.2 * self.matrix @ y).tanh() + 1, self.start, batched=True)
        assert not told(lambda: bl.root(lambda y: self.matrix.diagonal() * y - 1, self.start, batched=True))
        assert not told(lambda: bl.root(lambda y: self.matrix @ y - 1, self.start))


class TestSymmetry:
    matrix = 3 * torch.eye(4, dtype=F64) + 0.01 * randn(4, 4)

    @pytest.mark.parametrize("dtype", [torch.float32, F64])
    @pytest.mark.parametrize("batched", [False, True])
    def test_a_jacobian_that_is_not_symmetric_although_it_is_said(self, dtype, batched):
        matrix = self.matrix.to(dtype)
        start = torch.zeros(2, 4, dtype=dtype) if batched else torch.zeros(4, dtype=dtype)

        def solve(symmetric):
            return bl.root(lambda y: y @ matrix - 1, start, batched=batched, symmetric=symmetric)

        assert not told(lambda: solve(False))
        first_look.LOOKED = first_look.Known()
        (message,) = told(lambda: solve(True))
        assert "although symmetric=True says that it is" in message

    @pytest.mark.parametrize("dtype", [torch.float32, F64])
    def test_gradients_are_symmetric(self, dtype):
        matrix = randn(30, 30).to(dtype)
        target = {"a": randn(3).to(dtype), "b": randn(9, 3).to(dtype)}

        def loss(y):
            flat = torch.cat([leaf.flatten() for leaf in y.values()])
            return (matrix @ (flat - 1)).square().sum() / 2 + flat.pow(4).sum()

        start = {name: torch.zeros_like(leaf) for name, leaf in target.items()}
        assert not told(lambda: bl.root(torch.func.grad(loss), start, symmetric=True))

    def test_a_residual_of_wrong_derivatives(self):
        """As Cholesky takes one half of the matrix, its hypergradient would be wrong by six percent, without a word."""
        b = torch.ones(4, dtype=F64, requires_grad=True)
        matrix = 3 * torch.eye(4, dtype=F64) + 0.1 * randn(4, 4)
        hypergrad = bl.Implicit(bl.Cholesky())
        with pytest.warns(bl.SolveWarning, match="not symmetric"):
            bl.root(lambda y: matrix @ y - b, torch.zeros(4, dtype=F64), hypergrad=hypergrad, symmetric=True)


class TestSteps:
    @pytest.mark.parametrize(
        "solver",
        [
            bl.GradientDescent(0.3, max_steps=20),
            bl.Steps(bl.SGD(0.3), max_steps=20),
            bl.TorchOptim(torch.optim.SGD, lr=0.3, max_steps=20),
        ],
        ids=lambda solver: type(solver).__name__,
    )
    def test_that_raised_the_loss(self, solver):
        start = torch.zeros(2, dtype=F64)
        (message,) = told(lambda: bl.argmin(lambda y: 10 * (y - 1).square().sum(), start, solver=solver))
        assert "raised the loss, from 20 to" in message

    @pytest.mark.parametrize(
        "method",
        [bl.Unroll(), bl.Unroll(checkpoint=True), bl.Truncated(3), bl.ForwardMode(), bl.ForwardGradient()],
        ids=str,
    )
    def test_of_a_path_that_raised_it(self, method, monkeypatch):
        """Its derivative is right, and is that of a solver that runs away; told once."""
        monkeypatch.setattr("bilevel.hypergrad.path.LOOKED", Known())  # all methods have one objective here
        x, start = torch.ones((), dtype=F64, requires_grad=True), torch.zeros(2, dtype=F64)

        def objective(y, x):
            return 10 * (y - x).square().sum()

        def solved(lr, throw="warn"):
            solver = bl.Steps(bl.SGD(lr), max_steps=8)
            return lambda: bl.argmin(objective, start, x, solver=solver, hypergrad=method, throw=throw)

        assert not told(solved(0.3, "ignore"))
        (message,) = told(solved(0.3))
        assert "raised the loss, from 20 to" in message
        assert not told(solved(0.3))

    def test_of_a_path_that_lowered_it(self):
        x, solver = torch.ones((), dtype=F64, requires_grad=True), bl.Steps(bl.SGD(0.03), max_steps=8)
        start = torch.zeros(2, dtype=F64)
        fit = lambda: bl.argmin(  # noqa: E731
            lambda y, x: 10 * (y - x).square().sum(), start, x, solver=solver, hypergrad=bl.Unroll()
        )
        assert not told(fit)

    def test_one_problem_of_a_batch(self):
        scale, start = torch.tensor([0.1, 10.0], dtype=F64), torch.zeros(2, dtype=F64)
        solver = bl.GradientDescent(0.3, max_steps=20)
        (message,) = told(lambda: bl.argmin(lambda y: scale * (y - 1).square(), start, solver=solver))
        assert "raised the loss, from 10 to" in message

    def test_that_lowered_it(self):
        solver = bl.GradientDescent(0.03, max_steps=3)
        assert not told(lambda: bl.argmin(lambda y: (y - 1).square().sum(), torch.zeros(2, dtype=F64), solver=solver))


class TestNoEnd:
    @pytest.mark.parametrize("solver", [None, bl.NewtonCG()], ids=str)
    def test_a_loss_that_falls_for_ever(self, solver):
        (message,) = told(lambda: bl.argmin(lambda y: y.atan(), torch.tensor(2.0, dtype=F64), solver=solver))
        assert "falls or is flat without end" in message

    @pytest.mark.parametrize(
        ("loss", "start"),
        [
            (lambda y: y**4, 1.0),
            (lambda y: (y**2 - 1) ** 2, 3.0),
            (lambda y: torch.exp(-y) + 1e-3 * y, -5.0),
            (lambda y: -torch.cos(y), 1.5),
            (lambda y: 1e12 * (y - 1e6) ** 2, 1e6 + 1e-3),
            (lambda y: y - torch.log(y), 1e-3),
        ],
        ids=range(6),
    )
    def test_minima_are_minima(self, loss, start):
        assert not told(lambda: bl.argmin(loss, torch.tensor(start, dtype=F64), hypergrad=None))


@pytest.mark.parametrize("solver", [None, bl.NewtonCG(), bl.GradientDescent(0.3, 60)], ids=str)
def test_losses_that_share_a_linear_term_are_told(solver):
    """Each moved by three times its part of the price, as Hessian products do not see it."""
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def shared(y):
        return (y - x[:, None]).square().sum(1) + 0.5 * y.mean()

    def own(y):
        return (y - x[:, None]).square().sum(1) + 0.5 * y.mean(1)

    start = torch.zeros(3, 2, dtype=torch.float64)
    with pytest.warns(bl.SolveWarning, match=COUPLED):
        bl.argmin(shared, start, solver=solver, hypergrad=None)
    bl.argmin(own, start, solver=bl.GradientDescent(0.3, 200), hypergrad=None, throw="raise")
