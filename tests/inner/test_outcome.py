"""What an inner solver that failed is told by name: saddles, losses without a minimum, random objectives."""

import itertools
import random
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, softplus

import bilevel as bl
from bilevel.inner.default import negative_ritz
from bilevel.inner.outcome import inner_advice
from bilevel.linalg.operator import Dense
from bilevel.problem import Problem

DTYPES = [torch.float32, torch.float64]


def double_well(y, x):
    """Minima at +-sqrt(x), a maximum at 0."""
    return ((y**2 - x) ** 2).sum()


class TestStationaryStarts:
    @pytest.mark.parametrize(
        "solver", [bl.LBFGS(), bl.NewtonCG(), bl.ScipyMinimize(), bl.GradientDescent(0.1, 20), bl.LBFGS(gtol=1e-3)]
    )
    @pytest.mark.parametrize("linear", [None, bl.LU(), bl.MINRES()])
    def test_a_maximum_is_no_minimum(self, solver, linear):
        x = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        with pytest.warns(bl.SolveWarning, match="maximum or saddle"):
            fit = bl.argmin(
                double_well, torch.zeros(2, dtype=torch.float64), x, solver=solver, hypergrad=bl.Implicit(linear)
            )
        assert fit.result is bl.Result.NEGATIVE_CURVATURE

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_saddle_that_was_reached(self, dtype):
        x = torch.tensor(1.0, dtype=dtype, requires_grad=True)

        def inner(y):
            return (y[0] ** 2 - x) ** 2 + y[1] ** 2

        with pytest.raises(bl.SolveError, match="maximum or saddle"):
            bl.argmin(inner, torch.tensor([0.0, 1.0], dtype=dtype), throw="raise")

    def test_of_a_batch_the_one(self):
        x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        start = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
        with pytest.warns(bl.SolveWarning, match="in 1 of 2 problems"):
            fit = bl.argmin(lambda y, x: ((y**2 - x.unsqueeze(-1)) ** 2).sum(-1), start, x)
        assert fit.stats["result"].tolist() == [int(bl.Result.NEGATIVE_CURVATURE), int(bl.Result.CONVERGED)]

    def test_a_minimum_passes(self):
        x = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        fit = bl.argmin(double_well, torch.ones(2, dtype=torch.float64), x)
        assert fit.result is bl.Result.CONVERGED
        assert torch.autograd.grad(fit.value.sum(), x)[0].item() == pytest.approx(1.0)


class TestWithoutAMinimum:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_separable_classes(self, dtype):
        a = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
        labels = (a @ torch.ones(4, dtype=dtype)).sign()
        with pytest.warns(bl.SolveWarning, match="no minimum.*penalty"):
            fit = bl.argmin(lambda w: softplus(-labels * (a @ w)).mean(), torch.zeros(4, dtype=dtype), hypergrad=None)
        assert fit.result is bl.Result.UNBOUNDED

    @pytest.mark.parametrize(
        "inner", [lambda y: -y.sum(), lambda y: (-y).exp().sum(), lambda y: -(1 + y**2).log().sum()]
    )
    def test_losses_that_fall_without_end(self, inner):
        with pytest.warns(bl.SolveWarning, match="may have no minimum"):
            bl.argmin(lambda y: inner(y) + 0 * y.square().sum(), torch.ones(2, dtype=torch.float64), hypergrad=None)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("solver", [None, bl.LBFGS(bounds=(-5.0, None)), bl.NewtonCG()], ids=str)
    @pytest.mark.parametrize("start", [[1.0, 0.0], [0.0, 0.0], [[1.0, 0.0], [2.0, 3.0]]], ids=str)
    def test_a_loss_that_falls_along_one_of_its_params(self, start, solver, dtype):
        """Where params have grown to 1e20 and more, every step is short beside them."""
        start = torch.tensor(start, dtype=dtype)
        with pytest.warns(bl.SolveWarning, match="no minimum"):
            fit = bl.argmin(lambda y: -y[..., 0] + (y[..., 1] - 1) ** 2, start, solver=solver, hypergrad=None)
        assert fit.result is bl.Result.UNBOUNDED

    def test_a_minimum_that_is_far_is_not_called_so(self):
        curvature = torch.logspace(0, 7, 8, dtype=torch.float64)
        target = 1e6 * torch.ones(8, dtype=torch.float64)

        def inner(y):
            return (curvature * (y - target).square()).sum()

        fit = bl.argmin(inner, torch.zeros(8, dtype=torch.float64), solver=bl.LBFGS(max_steps=40), throw="ignore")
        assert fit.result is not bl.Result.UNBOUNDED


def test_a_random_objective_is_named():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    a, b = torch.randn(32, 4), torch.randn(32, 1)

    def inner(params):
        return (torch.func.functional_call(net, params, (a,)) - b).square().mean()

    with pytest.warns(bl.SolveWarning, match="random \\(dropout"):
        bl.argmin(inner, dict(net.named_parameters()), hypergrad=None)


@pytest.mark.parametrize("solve", [bl.root, bl.fixed_point])
@pytest.mark.parametrize("solver", [None, bl.Newton(max_steps=5), bl.ScipyRoot()])
def test_a_random_system_is_named(solve, solver):
    torch.manual_seed(0)
    weight = 0.2 * torch.randn(6, 6, dtype=torch.float64)

    def function(z):
        found = torch.tanh(torch.nn.functional.dropout(z @ weight, 0.3) + 1)
        return found if solve is bl.fixed_point else z - found

    with pytest.warns(bl.SolveWarning, match="gives other values each time .* it is random"):
        solve(function, torch.zeros(10, 6, dtype=torch.float64), solver=solver, hypergrad=None)


@pytest.mark.parametrize("draw", ["torch", "numpy", "python"])
@pytest.mark.parametrize(
    "solver",
    [
        bl.GradientDescent(0.05, 20),
        bl.Steps(bl.SGD(lr=0.05), max_steps=20),
        bl.TorchOptim(torch.optim.Adam, lr=0.02, max_steps=20),
    ],
    ids=["descent", "steps", "adam"],
)
def test_a_random_objective_is_named_after_a_fixed_number_of_steps(solver, draw):
    torch.manual_seed(0)
    a, x = torch.randn(40, 5, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    draws = {
        "torch": lambda: torch.randint(40, (8,)).tolist(),
        "numpy": lambda: np.random.choice(40, 8).tolist(),  # noqa: NPY002 (as users do)
        "python": lambda: random.sample(range(40), 8),
    }

    def inner(w):
        return (a[draws[draw]()] @ w - 1).square().mean() + x * w.square().sum()

    with pytest.warns(bl.SolveWarning, match="random \\(dropout"):
        bl.argmin(inner, torch.zeros(5).double(), solver=solver)
    bl.argmin(inner, torch.zeros(5).double(), solver=solver, hypergrad=None)  # training alone may be random
    if not isinstance(solver, bl.TorchOptim):
        bl.argmin(inner, torch.zeros(5).double(), solver=solver, hypergrad=bl.Unroll())  # as may a path


def test_an_objective_with_batches_of_its_own_is_named():
    torch.manual_seed(0)
    a, x = torch.randn(48, 3, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    batches, own = itertools.cycle(a.split(8)), torch.Generator().manual_seed(0)

    def iterates(w):
        return (next(batches) @ w - 1).square().mean() + x * w.square().sum()

    def draws(w):
        return (a[torch.randint(48, (8,), generator=own)] @ w - 1).square().mean() + x * w.square().sum()

    for inner in (iterates, draws):
        with pytest.warns(bl.SolveWarning, match="random \\(dropout"):
            bl.argmin(inner, torch.zeros(3).double(), solver=bl.GradientDescent(0.05, 20))


@pytest.mark.parametrize("linear", [bl.CG(), bl.MINRES(), bl.Cholesky(), bl.LU()], ids=repr)
def test_problems_of_a_batch_that_depend_on_each_other_are_told(linear):
    """A sum that was forgotten: the blocks of the Hessian that a batch has say nothing of the others."""
    torch.manual_seed(1)
    matrix = torch.rand(4, 4).double() + 3 * torch.eye(4).double()
    b, start = torch.rand(4).double().requires_grad_(), torch.zeros(4).double()

    def inner(y):
        return (matrix @ y - b).square()

    with pytest.warns(bl.SolveWarning, match="inner solve.*depend on each other"):
        bl.argmin(inner, start, hypergrad=bl.Implicit(linear))
    with pytest.warns(bl.SolveWarning, match="inner solve.*depend on each other"):
        fit = bl.argmin(inner, start, solver=bl.GradientDescent(0.02, 1000), hypergrad=bl.Implicit(linear))
    with pytest.warns(bl.SolveWarning, match="adjoint solve.*depend on each other"):
        fit.value.sum().backward()
    fit = bl.argmin(lambda y: inner(y).sum(), start, hypergrad=bl.Implicit(linear))
    (grad,) = torch.autograd.grad(fit.value.sum(), b)
    torch.testing.assert_close(grad, torch.linalg.inv(matrix).sum(0))


def test_a_kink_is_named():
    torch.manual_seed(0)
    data = torch.randn(10, 2, dtype=torch.float64)

    def hinge(w):
        return torch.relu(1 - data[:, 0].sign() * (data @ w)).mean() + 0.1 * w.square().sum()

    def wall(y):
        return torch.where(y.sum() > 0.5, torch.inf, (y - 1).square().sum())

    for inner in (hinge, wall):
        with pytest.warns(bl.SolveWarning, match="slope of the loss jumps"):
            bl.argmin(inner, torch.zeros(2, dtype=torch.float64), hypergrad=None)


def test_a_gradient_that_is_not_finite_at_the_start_is_named():
    data = torch.tensor([[1.0, 2.0], [3.0, torch.nan]])
    with pytest.raises(bl.SolveError, match="its gradient is not"):
        bl.argmin(lambda y: torch.nansum((data * y - 1).square()) + y.square().sum(), torch.zeros(2))


def network(inputs=4, hidden=16, examples=64):
    """A network, of 97 params by default, that is not solved in a hundred steps, and its start."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(inputs, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 1))
    a, b = torch.randn(examples, inputs), torch.randn(examples, 1)

    def inner(params):
        fit = (torch.func.functional_call(net, params, (a,)) - b).square().mean()
        return fit + 1e-4 * sum(p.square().sum() for p in params.values())

    return inner, dict(net.named_parameters())


def digits_network(seed):
    """Class weights and a weight decay of a network with 1,898 params: both losses, the hyperparameters, the start."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:1200]
    x, y = images[order].float().view(-1, 1, 8, 8) / 16, labels[order].long()
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        *(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        *(torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        *(torch.nn.Flatten(), torch.nn.Linear(64, 10)),
    )
    log_weights, log_decay = torch.zeros(10, requires_grad=True), torch.tensor(-6.0, requires_grad=True)

    def train_loss(params):
        losses = cross_entropy(torch.func.functional_call(model, params, (x[:600],)), y[:600], reduction="none")
        penalty = sum(param.square().sum() for param in params.values())
        return (log_weights.exp()[y[:600]] * losses).mean() + log_decay.exp() * penalty

    def val_loss(params):
        return cross_entropy(torch.func.functional_call(model, params, (x[600:],)), y[600:])

    return train_loss, val_loss, [log_weights, log_decay], dict(model.named_parameters())


class TestAdvice:
    def told(self, solver, inner, init) -> str:
        with pytest.warns(bl.SolveWarning) as heard:
            bl.argmin(inner, init, solver=solver, hypergrad=None)
        return str(heard[0].message)

    def test_a_network_is_told_what_serves_networks(self):
        message = self.told(bl.LBFGS(max_steps=60), *network())
        assert "operator=GaussNewton.of(module, loss)" in message

    @pytest.mark.parametrize(
        ("solver", "other"), [(bl.LBFGS(max_steps=2), "take NewtonCG()"), (bl.NewtonCG(max_steps=2), "take LBFGS()")]
    )
    def test_it_never_names_the_solver_in_use(self, solver, other):
        curvature = torch.logspace(0, 4, 20)
        message = self.told(solver, lambda y: (curvature * (y - 1) ** 2).sum() + (y**4).sum(), torch.full((20,), 3.0))
        assert other in message
        assert f"take {type(solver).__name__}" not in message
        assert "raise max_steps (now 2)" in message
        assert "gtol" not in message  # none was given
        assert "step size" not in message  # it finds its own

    def test_settings_that_were_given_are_named_with_their_values(self):
        message = self.told(bl.GradientDescent(lr=1e-3, max_steps=3, gtol=1e-5), lambda y: (y**2).sum(), torch.ones(3))
        assert "raise max_steps (now 3), take another step size, loosen gtol (now 1e-05), or take LBFGS()" in message

    def test_the_residual_is_relative(self):
        messages = [
            self.told(bl.LBFGS(max_steps=2), lambda y: unit * ((y - 1) ** 4).sum(), torch.tensor([3.0, 7.0]))  # noqa: B023
            for unit in (1.0, 1e6)
        ]
        assert messages[0] == messages[1]
        assert "relative residual norm 0." in messages[0]

    @pytest.mark.parametrize(
        ("results", "steps", "for_networks"),
        [
            (("max_steps", "converged"), (60, 60), True),
            (("max_steps", "max_steps"), (50, 60), True),
            (("converged", "max_steps"), (60, 60), False),  # that which failed is convex there
            (("max_steps", "max_steps"), (49, 60), False),  # the other one has few steps
            (("max_steps", "converged"), (10, 60), False),
        ],
    )
    def test_of_a_batch_that_counts_which_failed_after_many_steps(self, results, steps, for_networks):
        """At 0.1 the double well is concave, at 0.9 it is convex."""
        problem = Problem(lambda y: ((y**2 - 1) ** 2).sum(-1), torch.tensor([[0.1] * 2, [0.9] * 2]).double(), ())
        codes = [int(bl.Result[name.upper()]) for name in results]
        stats = {"result": torch.tensor(codes, dtype=torch.int8), "num_steps": torch.tensor(steps)}
        said = inner_advice(problem, bl.Solution(problem.start.y, stats), bl.LBFGS())
        assert ("the Hessian still has negative curvature here" in said) == for_networks


class TestTheDefaultSolver:
    def test_it_gives_up_a_large_network_and_a_named_one_goes_on(self):
        inner, params = network(30, 40, 200)
        with pytest.warns(bl.SolveWarning, match="so the default solver ended") as heard:
            fit = bl.argmin(inner, params, hypergrad=None)
        assert fit.result is bl.Result.NEGATIVE_CURVATURE
        assert int(fit.stats["num_steps"]) in (50, 100)
        assert "GaussNewton.of(module, loss)" in str(heard[0].message)
        named = bl.argmin(inner, params, solver=bl.LBFGS(max_steps=130), hypergrad=None, throw="ignore")
        assert int(named.stats["num_steps"]) == 130

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", [0, 1])
    def test_all_defaults_tune_a_convolutional_network(self, seed):
        """At most three warnings, validation losses that fall, and about 40 evaluations and 20 products an outer step.

        500 steps of a solver that was named, and conjugate gradients up to negative curvature, are five times as many.
        """
        train_loss, val_loss, hparams, params = digits_network(seed)
        outer, losses, calls = torch.optim.Adam(hparams, lr=0.1), [], []

        def counted(params):
            calls.append(1)
            return train_loss(params)

        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("default")
            for _ in range(12):
                fit = bl.argmin(counted, params)
                loss = val_loss(fit.value)
                outer.zero_grad()
                loss.backward()
                outer.step()
                params = {name: param.detach() for name, param in fit.value.items()}
                losses.append(loss.item())
                assert fit.adjoint.stats["relative_residual"] <= 1
                assert fit.adjoint.stats["num_steps"] <= 5
        assert len(heard) <= 3
        assert losses[-1] < 0.7 * losses[0]
        assert len(calls) <= 12 * 40

    def test_a_named_linear_solver_makes_its_own_steps_where_the_default_gave_up(self):
        inner, params = network(30, 40, 200)
        decay = torch.tensor(1e-4, requires_grad=True)

        def decayed(params):
            return inner(params) + decay * sum(leaf.square().sum() for leaf in params.values())

        for hypergrad, steps in ((bl.Implicit(), 5), (bl.Implicit(bl.MINRES(max_steps=9)), 9)):
            fit = bl.argmin(decayed, params, hypergrad=hypergrad, throw="ignore")
            assert fit.stats["given_up"]
            sum(leaf.sum() for leaf in fit.value.values()).backward()
            assert fit.adjoint.stats["num_steps"] == steps

    def test_a_warm_start_is_looked_at_early(self):
        inner, _, _, params = digits_network(0)
        for steps in (50, 20, 20):
            fit = bl.argmin(inner, params, hypergrad=None, throw="ignore")
            params = {name: leaf.detach() for name, leaf in fit.value.items()}
            assert int(fit.stats["num_steps"]) == steps

    def test_a_warm_start_of_a_convex_problem_is_solved(self):
        curvature, random = torch.logspace(0, 3.3, 1500).double(), torch.Generator().manual_seed(0)
        start = 1 + 1e-3 * torch.randn(1500, generator=random, dtype=torch.float64)
        fit = bl.argmin(lambda y: (curvature * (y - 1).square()).sum() + 10, start, hypergrad=None)
        assert fit.result is bl.Result.CONVERGED
        assert int(fit.stats["num_steps"]) > 20
        assert (fit.value - 1).abs().max() < 1e-4  # to the rounding of a loss of 10

    def test_ritz_values_prove_negative_curvature(self):
        values = torch.linspace(-0.1, 10, 60, dtype=torch.float64)
        batch = torch.stack([values, values.abs() + 0.1])
        operator = Dense(torch.diag_embed(batch))
        start = torch.randn(2, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert negative_ritz(operator, start, 40, 1e-12).tolist() == [True, False]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_large_convex_problem_is_solved_however_long_it_takes(self, dtype):
        curvature = torch.logspace(0, 3.3, 1500, dtype=dtype)
        fit = bl.argmin(lambda y: (curvature * (y - 1).square()).sum(), torch.zeros(1500, dtype=dtype), hypergrad=None)
        assert fit.result is bl.Result.CONVERGED
        assert int(fit.stats["num_steps"]) > 100
