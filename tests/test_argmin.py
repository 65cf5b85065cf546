from __future__ import annotations

import gc
import itertools
import math
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

import bilevel as bl
from bilevel.problems import Quadratics, Ridge, WeightedRidge
from tests.conformance import no_tensors_left, randn, relative_error

PROBLEMS = [
    Ridge(),
    Ridge(per_feature=True),
    WeightedRidge(),
    Quadratics(conditions=(1.0, 10.0, 100.0)),
]
F64 = torch.float64
EXACT = bl.NewtonCG(gtol=1e-13)


def hypergradient(problem, solver, hypergrad, throw="raise"):
    x = problem.hparams.clone().requires_grad_()
    fit = bl.argmin(problem.inner, problem.init, x, solver=solver, hypergrad=hypergrad, throw=throw)
    problem.outer(fit.value, x).backward()
    return x.grad, fit


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("hessian", ["graph", "func"])
@pytest.mark.parametrize("linear", [bl.Cholesky(), bl.LU(), bl.CG(rtol=1e-13)], ids=repr)
def test_closed_form_direct_and_cg(problem, linear, hessian):
    grad, fit = hypergradient(problem, EXACT, bl.Implicit(linear, operator=hessian), throw="ignore")
    assert relative_error(grad, problem.hypergradient(problem.hparams)) <= 1e-10
    assert fit.stats["residual_norm"].max() <= 1e-12


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    "linear",
    [
        bl.MINRES(rtol=1e-10),
        bl.GMRES(rtol=1e-10),
        bl.BiCGSTAB(rtol=1e-10),
        bl.LSMR(rtol=1e-10),
        bl.Neumann(rtol=1e-11, max_steps=10000),
    ],
    ids=repr,
)
def test_closed_form_scipy_and_neumann(problem, linear):
    # 1e-10 is at the edge of what rounding leaves of these algorithms: one may end a little above it and say so.
    grad, fit = hypergradient(problem, EXACT, bl.Implicit(linear), throw="ignore")
    assert relative_error(grad, problem.hypergradient(problem.hparams)) <= 1e-8
    assert (fit.adjoint.stats["relative_residual"] <= 1e-9).all()


@pytest.mark.parametrize(
    "solver",
    [bl.LBFGS(), bl.GradientDescent(0.3, 3000, 1e-10), bl.ScipyMinimize("BFGS", gtol=1e-8), EXACT],
    ids=repr,
)
def test_the_solver_does_not_matter(solver):
    problem = Ridge(per_feature=True)
    grad, _ = hypergradient(problem, solver, bl.Implicit(bl.CG(rtol=1e-10)), throw="raise")
    assert relative_error(grad, problem.hypergradient(problem.hparams)) <= 1e-7


def test_float32():
    exact = Ridge(per_feature=True)
    problem = Ridge(per_feature=True, dtype=torch.float32)
    grad, _ = hypergradient(problem, bl.NewtonCG(gtol=1e-6), bl.Implicit(bl.CG(rtol=1e-6)), throw="ignore")
    assert relative_error(grad.double(), exact.hypergradient(exact.hparams)) <= 1e-5


def test_gradcheck_arguments_and_captured_tensors():
    a, b, captured = randn(12, 4, seed=1), randn(12, seed=2), randn(4, seed=3)

    def solve(x, decay):
        def inner(params, x):
            fit = (x @ params["w"] - b).square().mean() + (x.mean(0) @ params["w"] + params["c"]).pow(4)
            return fit + (decay.exp() * params["w"].square()).sum() + params["c"].square()

        init = {"w": torch.zeros(4, dtype=torch.float64), "c": torch.zeros((), dtype=torch.float64)}
        hypergrad = bl.Implicit(bl.CG(rtol=1e-13))
        fit = bl.argmin(inner, init, x, solver=bl.NewtonCG(gtol=1e-13), hypergrad=hypergrad, throw="ignore")
        return fit.value["w"], fit.value["c"]

    inputs = (a.requires_grad_(), captured.requires_grad_())
    assert torch.autograd.gradcheck(solve, inputs, rtol=1e-6, atol=1e-8)


def test_gradcheck_batched():
    quadratics = Quadratics(conditions=(1.0, 10.0), size=3)

    def solve(x):
        fit = bl.argmin(
            lambda y, x: quadratics.inner(y, x) + y.pow(4).sum(-1),
            quadratics.init,
            x,
            solver=bl.NewtonCG(gtol=1e-13),
            hypergrad=bl.Implicit(bl.Cholesky()),
            throw="ignore",
        )
        return fit.value

    assert torch.autograd.gradcheck(solve, (quadratics.hparams.requires_grad_(),), rtol=1e-6, atol=1e-8)


def small_network():
    """A network of 2-4-2 on 10 points, with a log weight decay: the inner and outer loss."""
    x, y = randn(10, 2, seed=1), torch.arange(10) % 2
    x_val, y_val = randn(10, 2, seed=2), torch.arange(10) % 2
    init = {"a": 0.5 * randn(2, 4, seed=3), "b": 0.5 * randn(4, 2, seed=4)}

    def predict(params, x):
        return torch.tanh(x @ params["a"]) @ params["b"]

    def inner(params, log_decay):
        penalty = sum(p.square().sum() for p in params.values())
        return cross_entropy(predict(params, x), y) + log_decay.exp() * penalty

    def outer(params):
        return cross_entropy(predict(params, x_val), y_val)

    return inner, outer, init


def test_implicit_is_unrolled_to_convergence_is_finite_difference():
    inner, outer, init = small_network()

    def value_and_grad(at, solver, hypergrad):
        log_decay = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        fit = bl.argmin(inner, init, log_decay, solver=solver, hypergrad=hypergrad, throw="ignore")
        loss = outer(fit.value)
        (grad,) = torch.autograd.grad(loss, log_decay)
        return loss.item(), grad.item()

    at, step = -2.0, 1e-4
    _, implicit = value_and_grad(at, bl.NewtonCG(gtol=1e-12), bl.Implicit(bl.CG(rtol=1e-12)))
    _, unrolled = value_and_grad(at, bl.GradientDescent(0.5, 600, momentum=0.5), bl.Unroll())
    above, below = (value_and_grad(at + h, bl.NewtonCG(gtol=1e-12), bl.Implicit())[0] for h in (step, -step))
    assert implicit == pytest.approx((above - below) / (2 * step), rel=1e-5)
    assert implicit == pytest.approx(unrolled, rel=1e-7)


def test_implicit_approaches_unrolled_at_the_rate_of_the_solver():
    problem = Quadratics(conditions=(10.0,))
    gaps = []
    for steps in (25, 50, 100, 200):
        grads = []
        for hypergrad in (bl.Implicit(bl.Cholesky()), bl.Unroll()):
            grads.append(hypergradient(problem, bl.GradientDescent(0.15, steps), hypergrad)[0])
        gaps.append(relative_error(*grads))
    assert gaps[-1] <= 1e-8
    assert all(later < 0.2 * earlier for earlier, later in itertools.pairwise(gaps))


def test_five_cg_steps_on_well_conditioned_problems():
    """Figure 2a of the iMAML paper: the terminal error of few CG steps vanishes with five."""
    problem = Quadratics(conditions=(5.0, 5.0))
    truth = problem.hypergradient(problem.hparams)
    few, many = (hypergradient(problem, EXACT, bl.Implicit(bl.CG(max_steps=k)))[0] for k in (5, 20))
    assert relative_error(few, truth) <= 1e-2
    assert relative_error(many, truth) <= 1e-6


def test_conditions_from_1_to_1e4_each_meet_the_tolerance():
    problem = Quadratics()
    _, fit = hypergradient(problem, bl.NewtonCG(gtol=1e-9), bl.Implicit(bl.CG(rtol=1e-8)))
    assert (fit.stats["residual_norm"] <= 1e-9).all()
    assert (fit.adjoint.stats["relative_residual"] <= 1e-8).all()
    assert len(set(fit.stats["num_steps"].tolist())) >= 3
    assert len(set(fit.adjoint.stats["num_steps"].tolist())) == 5
    assert fit.adjoint.value.shape == problem.init.shape


def test_every_kind_of_hyperparameter_gets_its_gradient():
    """Captured leaf, captured non-leaf, module parameter, argument, 0-d: TorchOpt loses the first and the last."""
    a, b = randn(10, 3, seed=1), randn(10, seed=2)
    leaf = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    root = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    non_leaf = root * 2
    module = torch.nn.Linear(3, 3, dtype=torch.float64)
    argument = randn(3, seed=3).requires_grad_()

    def inner(w, argument):
        return (module(a) @ w - b).square().mean() + (leaf + non_leaf.exp()) * (w - argument).square().sum()

    init = torch.zeros(3, dtype=torch.float64)
    fit = bl.argmin(inner, init, argument, solver=EXACT, hypergrad=bl.Implicit(bl.Cholesky()), throw="ignore")
    wanted = [leaf, root, non_leaf, module.weight, module.bias, argument]
    got = torch.autograd.grad(fit.value.square().sum(), wanted, retain_graph=True)

    with torch.enable_grad():
        design = module(a)
        strength = leaf + non_leaf.exp()
        system = design.mT @ design / 10 + strength * torch.eye(3, dtype=torch.float64)
        exact = torch.linalg.solve(system, design.mT @ b / 10 + strength * argument)
        truth = torch.autograd.grad(exact.square().sum(), wanted)
    for found, expected in zip(got, truth, strict=True):
        assert relative_error(found, expected) <= 1e-9


@pytest.mark.parametrize(
    "init",
    [
        torch.zeros((), dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
        (torch.zeros(2, dtype=torch.float64), [torch.zeros((), dtype=torch.float64)]),
        {"a": {"b": torch.zeros(2, 2, dtype=torch.float64)}, "c": torch.zeros(1, dtype=torch.float64)},
    ],
    ids=["0-d", "vector", "tuple", "nested dict"],
)
def test_any_tree(init):
    x = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def inner(params):
        return sum(((p - x) ** 2).sum() for p in bl.tree.leaves(params))

    fit = bl.argmin(inner, init)
    total = sum(p.sum() for p in bl.tree.leaves(fit.value))
    total.backward()
    assert x.grad == pytest.approx(sum(p.numel() for p in bl.tree.leaves(init)))
    assert type(fit.value) is type(init)


def test_mixed_precision_tree():
    x = torch.tensor(1.5, requires_grad=True)
    init = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float64)}
    fit = bl.argmin(lambda p: (p["a"] - x).square().sum().double() + (p["b"] + x).square().sum(), init)
    assert (fit.value["a"].dtype, fit.value["b"].dtype) == (torch.float32, torch.float64)
    (fit.value["a"].sum() + fit.value["b"].sum()).backward()
    assert x.grad == pytest.approx(0.0, abs=1e-6)


def test_unused_and_frozen_params_get_zeros_not_none():
    x = torch.ones(2, requires_grad=True)
    init = {"used": torch.zeros(2), "unused": torch.full((3,), 7.0)}
    fit = bl.argmin(lambda p: (p["used"] - x).square().sum(), init)
    assert torch.equal(fit.value["unused"], init["unused"])
    fit.value["used"].sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(2))


def test_no_hyperparameter_gives_a_plain_value():
    fit = bl.argmin(lambda y: (y - 1).square().sum(), torch.zeros(2))
    assert not fit.value.requires_grad
    with torch.no_grad():
        x = torch.ones(2, requires_grad=True)
        assert not bl.argmin(lambda y: (y - x).square().sum(), torch.zeros(2)).value.requires_grad
    assert not bl.argmin(lambda y: (y - x).square().sum(), torch.zeros(2), hypergrad=None).value.requires_grad


def test_params_of_the_module_itself_stay_untouched():
    model = torch.nn.Linear(3, 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.zeros((), requires_grad=True)
    data = torch.randn(5, 3)

    def inner(params):
        predicted = torch.func.functional_call(model, params, (data,))
        return mse_loss(predicted, torch.ones(5, 1)) + x.exp() * params["weight"].square().sum()

    fit = bl.argmin(inner, dict(model.named_parameters()))
    fit.value["weight"].sum().backward()
    assert x.grad is not None
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


def test_backward_twice_and_partial_outputs():
    problem = Ridge(per_feature=True)
    x = problem.hparams.clone().requires_grad_()
    fit = bl.argmin(problem.inner, problem.init, x, solver=EXACT, throw="ignore")
    outer = problem.outer(fit.value, x)
    (first,) = torch.autograd.grad(outer, x, retain_graph=True)
    (second,) = torch.autograd.grad(outer, x)
    assert torch.equal(first, second)


def test_second_derivative_by_unrolling():
    h = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def inner(w):
        return w.pow(4) / 4 + h * w.square() / 2 - w

    init = torch.ones((), dtype=torch.float64)
    fit = bl.argmin(inner, init, solver=bl.GradientDescent(0.3, 80), hypergrad=bl.Unroll())
    (first,) = torch.autograd.grad(fit.value, h, create_graph=True)
    (second,) = torch.autograd.grad(first, h)
    w = fit.value.item()
    slope = -w / (3 * w**2 + 1)
    assert first.item() == pytest.approx(slope, rel=1e-9)
    assert second.item() == pytest.approx(-slope * (6 * w * slope + 2) / (3 * w**2 + 1), rel=1e-7)


def test_unrolled_momentum_is_right():
    """torch's differentiable SGD detaches its first momentum buffer: +0.07 for +0.21."""
    inner, outer, init = small_network()

    def loss_at(log_decay):
        solver = bl.GradientDescent(0.1, 20, momentum=0.9)
        return outer(bl.argmin(inner, init, log_decay, solver=solver, hypergrad=bl.Unroll()).value)

    log_decay = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss_at, (log_decay,), rtol=1e-6, atol=1e-9)


def test_unroll_reaches_init():
    start = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    fit = bl.argmin(lambda y: y.square() / 2, start * 1.0, solver=bl.GradientDescent(0.1, 5), hypergrad=bl.Unroll())
    fit.value.backward()
    assert start.grad.item() == pytest.approx(0.9**5)


def test_unroll_needs_gradient_descent():
    with pytest.raises(TypeError, match="needs Steps"):
        bl.argmin(lambda y: y.square().sum(), torch.ones(2), solver=bl.LBFGS(), hypergrad=bl.Unroll())


def saddle(y, x):
    return (y[0] ** 2 - 0.5 * y[1] ** 2 + y[1] ** 4 / 4 + x * y.sum()) / 2


class TestThrow:
    """At the start, a saddle: one gradient step leaves the Hessian indefinite."""

    def run(self, throw, linear=None):
        x = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        init = torch.zeros(2, dtype=torch.float64)
        hypergrad = bl.Implicit(linear or bl.CG(rtol=1e-8))
        fit = bl.argmin(saddle, init, x, solver=bl.GradientDescent(0.1, 1), hypergrad=hypergrad, throw=throw)
        fit.value.square().sum().backward()
        return fit, x

    def test_raise(self):
        with pytest.raises(bl.SolveError, match=r"adjoint.*negative curvature.*MINRES") as caught:
            self.run("raise")
        assert caught.value.solution.result is bl.Result.NEGATIVE_CURVATURE

    def test_warn(self):
        with pytest.warns(bl.SolveWarning, match=r"adjoint.*negative curvature"):
            fit, _ = self.run("warn")
        assert fit.adjoint.result is bl.Result.NEGATIVE_CURVATURE

    def test_fallback_solves_the_indefinite_system_and_tells(self):
        fit, x = self.run("fallback")
        assert fit.adjoint.result is bl.Result.CONVERGED
        assert fit.adjoint.recovered == ("MINRES",)
        _, reference = self.run("raise", bl.LU())
        assert x.grad.item() == pytest.approx(reference.grad.item(), rel=1e-3)

    def test_ignore_keeps_the_record(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit, _ = self.run("ignore")
        assert not fit.adjoint.result.ok

    def test_inner_solve(self):
        def solve(throw, lr=1e-4):
            problem = Ridge()
            solver = bl.GradientDescent(lr, 10, gtol=1e-8)
            return bl.argmin(problem.inner, problem.init, problem.hparams, solver=solver, throw=throw)

        with pytest.raises(bl.SolveError, match=r"inner solve: the step limit.*residual norm"):
            solve("raise")
        with pytest.warns(bl.SolveWarning, match="inner solve"):
            solve("warn")
        fit = solve("fallback")
        assert fit.recovered == ("NewtonCG",)
        assert fit.result is bl.Result.CONVERGED

    def test_divergence_raises_even_where_warnings_are_asked_for(self):
        problem = Quadratics(conditions=(1.0, 1e4))
        solver = bl.GradientDescent(1.0, 500)
        with pytest.raises(bl.SolveError, match=r"NaN or an infinity .* in 1 of 2 problems"):
            bl.argmin(problem.inner, problem.init, problem.hparams, solver=solver, throw="warn")
        recovered = bl.argmin(problem.inner, problem.init, problem.hparams, solver=solver, throw="fallback")
        assert recovered.result is bl.Result.CONVERGED

    def test_nonfinite_outer_gradient(self):
        x = torch.ones(2, requires_grad=True)
        fit = bl.argmin(lambda y: (y - x).square().sum(), torch.zeros(2))
        with pytest.raises(bl.SolveError, match=r"adjoint.*NaN"):
            (fit.value.sum() * torch.nan).backward()

    def test_unknown(self):
        with pytest.raises(ValueError, match="throw is 'maybe'"):
            self.run("maybe")


def test_damping_makes_a_singular_hessian_solvable():
    x = torch.ones((), dtype=torch.float64, requires_grad=True)
    init = torch.zeros(2, dtype=torch.float64)

    def inner(y):
        return (y.sum() - x).square()

    with pytest.raises(bl.SolveError, match="adjoint"):
        bl.argmin(inner, init, throw="raise").value[0].backward()
    bl.argmin(inner, init, hypergrad=bl.Implicit(damping=1e-3), throw="raise").value[0].backward()
    assert x.grad.item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_loss_scale_does_not_matter(factor):
    """b^T b underflows in TorchOpt and JAXopt: a hypergradient of exactly zero."""
    x = torch.tensor([0.5, 2.0], requires_grad=True)
    fit = bl.argmin(lambda y: (y - x).square().sum(), torch.zeros(2), hypergrad=bl.Implicit(bl.CG(rtol=1e-5)))
    (factor * fit.value.sum()).backward()
    torch.testing.assert_close(x.grad / factor, torch.ones(2))


def test_vmapped_objective_equals_a_loop():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    meta = dict(net.named_parameters())
    x, y = randn(3, 6, 4), torch.arange(18).view(3, 6) % 3

    def adapt_loss(params, x, y):
        prox = sum((p - meta[name]).square().sum() for name, p in params.items())
        return cross_entropy(torch.func.functional_call(net, params, (x,)), y) + prox

    def gradient(objective, init, *args):
        hypergrad = bl.Implicit(bl.CG(rtol=1e-12))
        fit = bl.argmin(objective, init, *args, solver=bl.LBFGS(gtol=1e-10), hypergrad=hypergrad)
        loss = sum(p.square().sum() for p in fit.value.values())
        return torch.autograd.grad(loss, list(meta.values()))

    together = gradient(torch.vmap(adapt_loss), bl.stack(meta, 3), x, y)
    alone = [gradient(adapt_loss, meta, x[t], y[t]) for t in range(3)]
    for index, grad in enumerate(together):
        assert relative_error(grad, sum(task[index] for task in alone)) <= 1e-9


class TestBadInput:
    def solve(self, objective=lambda y: y.square().sum(), init=None, *args, **kwargs):
        return bl.argmin(objective, torch.ones(3) if init is None else init, *args, **kwargs)

    @pytest.mark.parametrize("init", [{}, (), []])
    def test_empty_tree(self, init):
        with pytest.raises(ValueError, match="init is empty"):
            self.solve(init=init)

    def test_no_numbers(self):
        with pytest.raises(ValueError, match="init holds no numbers"):
            self.solve(init=torch.ones(0, 3))

    def test_params_without_values(self):
        with pytest.raises(ValueError, match="meta device"):
            self.solve(init=torch.ones(3, device="meta"))

    def test_integer_params(self):
        with pytest.raises(TypeError, match=r"init contains a tensor of torch.int64"):
            self.solve(init={"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64)})

    def test_not_a_tensor(self):
        with pytest.raises(TypeError, match="init contains a float"):
            self.solve(init={"a": 1.0})

    def test_nan_init(self):
        with pytest.raises(ValueError, match="init contains NaN"):
            self.solve(init=torch.tensor([1.0, torch.nan]))

    def test_nan_data(self):
        data = torch.tensor([1.0, torch.nan, 2.0])
        with pytest.raises(ValueError, match=r"args\[0\] contains NaN"):
            self.solve(lambda y, x: (y - x).square().sum(), torch.ones(3), data)

    def test_nan_captured(self):
        data = torch.tensor([1.0, torch.nan, 2.0])
        with pytest.raises(ValueError, match=r"objective is NaN .* captures"):
            self.solve(lambda y: (y - data).square().sum())

    def test_no_gradient_path(self):
        other = torch.ones(3, requires_grad=True)
        with pytest.raises(ValueError, match="objective has no gradient path to init"):
            self.solve(lambda y: y.detach().sum())
        with pytest.raises(ValueError, match="objective has no gradient path to init"):
            self.solve(lambda y: other.sum())

    def test_shape_of_the_objective(self):
        with pytest.raises(ValueError, match=r"objective returned a tensor of shape \(3, 3\)"):
            self.solve(lambda y: y.outer(y))
        with pytest.raises(ValueError, match="objective returned"):
            self.solve(lambda y: 1.0)

    def test_shape_mismatch_between_tasks(self):
        init = {"a": torch.ones(4, 2), "b": torch.ones(3, 2)}
        with pytest.raises(ValueError, match=r"init has a leaf of shape \(3, 2\).* T = 4"):
            self.solve(lambda p: p["a"].sum(-1) + p["b"].sum(), init)

    def test_negative_tolerances(self):
        with pytest.raises(ValueError, match="gtol is -1"):
            self.solve(solver=bl.LBFGS(gtol=-1))
        with pytest.raises(ValueError, match="rtol is -1"):
            self.solve(hypergrad=bl.Implicit(bl.CG(rtol=-1)))
        with pytest.raises(ValueError, match="damping is -1"):
            self.solve(hypergrad=bl.Implicit(damping=-1))

    def test_step_sizes_of_another_batch(self):
        with pytest.raises(ValueError, match="lr has 2 step sizes"):
            self.solve(solver=bl.GradientDescent(lr=(0.1, 0.2)))

    def test_stack_of_no_tasks(self):
        with pytest.raises(ValueError, match="num_tasks is 0"):
            bl.stack({"a": torch.ones(2)}, 0)


def test_no_leak():
    """1000 hypergradients: no tensor stays alive, without help from the garbage collector."""
    problem = Ridge(num_examples=5, num_features=3)

    def once():
        hypergradient(problem, bl.GradientDescent(0.1, 2), bl.Implicit(bl.CG(max_steps=2)))

    once()
    with no_tensors_left(most=5):
        for _ in range(1000):
            once()


def test_same_inputs_same_bits():
    problem = Quadratics(conditions=(1.0, 100.0))
    one, other = (hypergradient(problem, bl.LBFGS(), bl.Implicit())[0] for _ in range(2))
    assert torch.equal(one, other)


def test_fallback_keeps_what_was_solved():
    """One problem of two is indefinite: MINRES repairs it, and the other keeps its accurate solution."""
    x = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    signs = torch.tensor([[1.0, 2.0], [1.0, -0.5]], dtype=torch.float64)

    def inner(y):
        return (signs * y.square() + x * y).sum(-1) / 2

    init = torch.ones(2, 2, dtype=torch.float64)
    fit = bl.argmin(inner, init, solver=bl.GradientDescent(0.1, 1), throw="fallback")
    fit.value.square().sum().backward()
    assert fit.adjoint.recovered == ("MINRES",)
    assert fit.adjoint.stats["relative_residual"][0] < 1e-10
    torch.testing.assert_close(fit.adjoint.value, 2 * fit.value.detach() / signs, rtol=1e-3, atol=0)


def test_the_start_may_be_the_hyperparameter_itself():
    """Converged at the start, so solution and captured tensor would share their memory."""
    x = torch.ones(3, requires_grad=True)
    fit = bl.argmin(lambda y: (y - x).square().sum(), x)
    assert fit.stats["num_steps"] == 0
    (grad,) = torch.autograd.grad(fit.value.sum(), x)
    torch.testing.assert_close(grad, torch.ones(3))
    plain = bl.argmin(lambda y: (y - 1).square().sum(), x, hypergrad=None)
    with torch.no_grad():
        x.zero_()
    assert plain.value.sum() == 3


@pytest.mark.parametrize(
    "settings",
    [{}, {"solver": bl.Steps(bl.Adam(0.1), max_steps=3)}, {"solver": bl.ProximalGradient(bl.prox.L1(0.1))}],
)
def test_a_warm_start_with_its_graph_keeps_no_earlier_solution_alive(settings):
    x, params, alive = torch.tensor(0.5, requires_grad=True), torch.zeros(3), []
    for _ in range(4):
        fit = bl.argmin(lambda y: ((y - 3) ** 2 + x.exp() * y**2).sum(), params, **settings)
        torch.autograd.grad(fit.value.square().sum(), x)
        params = fit.value
        alive.append(weakref.ref(params))
    gc.collect()
    assert [ref() is None for ref in alive] == [True, True, True, False]
    with pytest.raises(ValueError, match="another order than those of init"):
        bl.root(lambda y: {"b": y["b"], "a": y["a"]}, {"a": torch.ones(2), "b": torch.ones(2)})


class TestHyperparametersThatWereDetached:
    start = torch.zeros(3, dtype=torch.float64)

    @pytest.mark.parametrize(
        "value",
        [
            lambda x: x.detach().exp(),
            lambda x: x.data.exp(),
            lambda x: math.exp(x.item()),
            lambda x: math.exp(float(x)),
            lambda x: float(np.exp(x.detach().numpy())),
            lambda x: torch.tensor(x.tolist()).exp(),
        ],
    )
    def test_it_is_told_where_no_gradient_reaches_any(self, value):
        log_decay = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        with pytest.warns(UserWarning, match=r"Of log_decay, the problem uses the values alone .* none will arrive"):
            fit = bl.argmin(lambda w: (w - 1).square().sum() + value(log_decay) * w.square().sum(), self.start)
        assert fit.captured == ()

    def test_it_is_missing_among_what_is_captured(self):
        kept, lost = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit = bl.argmin(
                lambda w: (w - 1).square().sum() + (kept.exp() + lost.detach().exp()) * w.square().sum(), self.start
            )
            bl.argmin(lambda w: (w - 1).square().sum() + lost.detach() * w.square().sum(), self.start, hypergrad=None)
        assert [one.name for one in fit.captured] == ["kept"]

    def test_systems_too(self):
        x = torch.ones((), dtype=torch.float64, requires_grad=True)
        with pytest.warns(UserWarning, match="Of x, the problem uses the values alone"):
            bl.root(lambda y: y - x.detach(), self.start)


class TestSettingsThatRequireGrad:
    """The solution does not depend on how it was found: no gradient by the steps is made up, and it is told."""

    @pytest.mark.parametrize("hypergrad", [bl.Implicit(), bl.OneStep(0.1), bl.Penalty(), bl.FirstOrder()])
    @pytest.mark.parametrize("captures", [False, True])
    @pytest.mark.parametrize("name", ["lr", "momentum"])
    def test_of_steps(self, hypergrad, captures, name):
        setting, x = (torch.tensor(0.1, dtype=F64, requires_grad=True) for _ in range(2))
        rule = bl.SGD(**{"lr": 0.1, name: setting})
        start = torch.zeros(2, dtype=F64)

        def objective(w):
            return (w - 1).square().sum() + (x * w.square().sum() if captures else 0.0)

        with pytest.warns(UserWarning, match=f"Settings of Steps require grad .{name}."):
            fit = bl.argmin(objective, start, solver=bl.Steps(rule, max_steps=5), hypergrad=hypergrad)
        if fit.value.requires_grad:
            (grad,) = torch.autograd.grad(fit.value.sum(), setting, allow_unused=True)
            assert grad is None
        assert fit.value.requires_grad == captures

    def test_where_they_are_meant_or_no_gradient_is(self, recwarn):
        setting = torch.tensor(0.1, dtype=F64, requires_grad=True)

        def solve(**settings):
            solver = bl.Steps(bl.SGD(lr=setting), max_steps=5)
            return bl.argmin(lambda w: (w - 1).square().sum(), torch.zeros(2, dtype=F64), solver=solver, **settings)

        assert solve(hypergrad=bl.Unroll()).value.requires_grad
        assert not solve(hypergrad=None).value.requires_grad
        with torch.no_grad():
            assert not solve().value.requires_grad
        assert [str(one.message) for one in recwarn] == []

    def test_decay_is_a_part_of_the_objective(self, recwarn):
        decay = torch.tensor(0.1, dtype=F64, requires_grad=True)
        solver = bl.Steps(bl.SGD(lr=0.1, weight_decay=decay), max_steps=500)
        fit = bl.argmin(lambda w: (w - 1).square().sum(), torch.zeros(2, dtype=F64), solver=solver)
        (grad,) = torch.autograd.grad(fit.value.sum(), decay)
        assert grad.item() == pytest.approx(-2 * 2 / 2.1**2)
        assert [str(one.message) for one in recwarn] == []

    @pytest.mark.parametrize("solver", [bl.Picard, bl.Anderson])
    def test_of_fixed_points(self, solver):
        damping = torch.tensor(0.5, dtype=F64, requires_grad=True)
        with pytest.warns(UserWarning, match=r"require grad \(damping\)"):
            fit = bl.fixed_point(torch.cos, torch.zeros(2, dtype=F64), solver=solver(damping=damping))
        assert not fit.value.requires_grad

    @pytest.mark.parametrize("settings", [{"weight_decay": 0.1}, {"betas": (0.9, 0.99)}, {"eps": 1e-8}])
    def test_of_torchs_own_optimizers(self, settings):
        settings = torch.utils._pytree.tree_map(lambda one: torch.tensor(one, requires_grad=True), settings)
        with pytest.raises(TypeError, match=r"requires grad: torch\.optim passes no derivative"):
            bl.TorchOptim(torch.optim.Adam, lr=0.1, **settings)

    def test_of_proximal_steps(self):
        x, size = (torch.tensor(0.3, dtype=F64, requires_grad=True) for _ in range(2))
        solver = bl.ProximalGradient(bl.prox.L1(x), step_size=size)
        fit = bl.argmin(lambda w: (w - 1).square().sum(), torch.zeros(2, dtype=F64), solver=solver)
        grads = torch.autograd.grad(fit.value.sum(), [x, size], allow_unused=True)
        assert grads[0].item() == pytest.approx(-1.0)
        assert grads[1] is None


def test_frozen_parameters_in_init_are_told():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)).double()
    inputs = torch.ones(3, 2, dtype=F64)

    def loss(params):
        return torch.func.functional_call(net, params, (inputs,)).square().mean()

    net[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="beside frozen ones, and all of them are trained"):
        bl.argmin(loss, dict(net.named_parameters()), hypergrad=None, throw="ignore")
    rest = {name: p for name, p in net.named_parameters() if p.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        bl.argmin(loss, rest, hypergrad=None, throw="ignore")
        bl.argmin(loss, dict(net.requires_grad_(False).named_parameters()), hypergrad=None, throw="ignore")


@pytest.mark.parametrize("kind", ["argmin", "root", "fixed_point", "least_squares"])
def test_one_problem_that_cannot_begin_loses_no_other_where_failures_are_ignored(kind):
    b, init = torch.tensor([[1.0], [math.nan], [2.0]], dtype=F64), torch.zeros(3, 1, dtype=F64)

    def solve(throw, b=b):
        return {
            "argmin": lambda: bl.argmin(lambda y: (y - b).square().sum(1), init, throw=throw),
            "root": lambda: bl.root(lambda y: y - b, init, batched=True, throw=throw),
            "fixed_point": lambda: bl.fixed_point(lambda y: 0.5 * y + 0.5 * b, init, batched=True, throw=throw),
            "least_squares": lambda: bl.least_squares(lambda y: y - b, init, batched=True, throw=throw),
        }[kind]()

    fit = solve("ignore")
    assert [bl.Result(int(code)).name for code in fit.stats["result"]] == ["CONVERGED", "NONFINITE", "CONVERGED"]
    assert fit.value[0, 0].item() == pytest.approx(1.0)
    assert fit.value[2, 0].item() == pytest.approx(2.0)
    for throw in ("warn", "raise"):
        with pytest.raises(bl.NonFiniteError):
            solve(throw)
    with pytest.raises(bl.NonFiniteError):
        solve("ignore", torch.full_like(b, math.nan))
