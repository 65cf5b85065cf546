"""Weight decay of the inner optimizer is part of what is minimised, and of what is differentiated."""

from __future__ import annotations

import contextlib
import functools
import warnings

import pytest
import torch

import bilevel as bl
from tests.conformance import randn, relative_error

A, B = randn(6, 3, seed=1), torch.ones(6, dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)
START = torch.zeros(3, dtype=torch.float64)


def objective(x):
    return lambda p: (A @ p - B).square().sum() + x.exp() * p.square().sum()


def exact(x, decay):
    """The minimum with ``decay / 2 |p|^2``; ``decay`` is a number or one for each entry."""
    matrix = A.T @ A + x.exp() * EYE + torch.diag(torch.as_tensor(decay, dtype=torch.float64).expand(3)) / 2
    return torch.linalg.solve(matrix, A.T @ B)


def grouped(params):
    """Decay for the first leaf only, as people do for weights and biases."""
    return torch.optim.SGD([{"params": params[:1], "weight_decay": 1.0}, {"params": params[1:]}], lr=0.02)


OPTIM = torch.optim
COUPLED = [
    bl.TorchOptim(OPTIM.SGD, lr=0.02, weight_decay=1.0, momentum=0.5, max_steps=600),
    bl.TorchOptim(OPTIM.SGD, lr=0.02, weight_decay=1.0, gtol=1e-9, max_steps=2000),
    bl.TorchOptim(functools.partial(OPTIM.SGD, weight_decay=1.0), lr=0.02, max_steps=1000),
    bl.TorchOptim(OPTIM.Adam, lr=0.02, weight_decay=1.0, max_steps=1500),
    bl.TorchOptim(OPTIM.RAdam, lr=0.02, weight_decay=1.0, max_steps=1500),
    bl.TorchOptim(OPTIM.Adagrad, lr=0.3, weight_decay=1.0, max_steps=1500),
    bl.Steps(bl.SGD(0.02, weight_decay=1.0), 1000),
    bl.Steps(bl.Adam(0.02, weight_decay=1.0), 1500),
]


@pytest.mark.parametrize("solver", COUPLED, ids=repr)
def test_a_decay_that_enters_the_gradient_is_a_penalty(solver):
    x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = bl.argmin(objective(x), START, solver=solver)
        (grad,) = torch.autograd.grad(fit.value.square().sum(), x)
    truth = exact(x, 1.0)
    assert relative_error(fit.value, truth) < 1e-4
    assert relative_error(grad, torch.autograd.grad(truth.square().sum(), x)[0]) < 1e-3
    assert fit.stats["residual_norm"] < 1e-3


def test_the_iterates_are_those_of_the_optimizer():
    for kind, rule in ((OPTIM.SGD, bl.SGD), (OPTIM.Adam, bl.Adam)):
        y = START.clone().requires_grad_()
        optimizer = kind([y], lr=0.02, weight_decay=1.0)
        x = torch.tensor(0.5, dtype=torch.float64)
        for _ in range(5):
            optimizer.zero_grad()
            objective(x)(y).backward()
            optimizer.step()
        settings = {"lr": 0.02, "weight_decay": 1.0}
        for solver in (bl.TorchOptim(kind, max_steps=5, **settings), bl.Steps(rule(**settings), 5)):
            assert relative_error(bl.argmin(objective(x), START, solver=solver).value, y) < 1e-12


def test_groups_batches_and_trees():
    x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    init = [START[:2], START[2:]]
    fit = bl.argmin(lambda p: objective(x)(torch.cat(p)), init, solver=bl.TorchOptim(grouped, max_steps=1000))
    truth = exact(x, [1.0, 1.0, 0.0])
    (grad,) = torch.autograd.grad(torch.cat(fit.value).square().sum(), x)
    assert relative_error(grad, torch.autograd.grad(truth.square().sum(), x)[0]) < 1e-6
    many = torch.vmap(lambda p, s: objective(s * x)(p))
    scales = torch.tensor([1.0, 2.0], dtype=torch.float64)
    solver = bl.TorchOptim(OPTIM.SGD, lr=0.01, weight_decay=1.0, max_steps=2000, gtol=1e-10)
    fit = bl.argmin(many, bl.stack(START, 2), scales, solver=solver)
    (grad,) = torch.autograd.grad(fit.value.square().sum(), x)
    truth = sum(exact(s * x, 1.0).square().sum() for s in scales)
    assert relative_error(grad, torch.autograd.grad(truth, x)[0]) < 1e-6
    assert fit.result is bl.Result.CONVERGED


def test_a_decay_that_is_learned_has_its_implicit_gradient():
    decay = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    x = torch.tensor(0.5, dtype=torch.float64)
    fit = bl.argmin(objective(x), START, solver=bl.Steps(bl.SGD(0.02, weight_decay=decay), 1000))
    (grad,) = torch.autograd.grad(fit.value.square().sum(), decay)
    assert relative_error(grad, torch.autograd.grad(exact(x, decay).square().sum(), decay)[0]) < 1e-6


@pytest.mark.parametrize(
    "hypergrad",
    [
        bl.Implicit(operator="func"),
        bl.Implicit(bl.Cholesky()),
        bl.Penalty(),
        bl.Implicit(bl.CG(), operator=bl.GaussNewton(lambda p: A @ p, lambda out: (out - B).square().sum())),
        bl.Unroll(),
    ],
    ids=lambda h: repr(h)[:40],
)
def test_other_methods(hypergrad):
    gauss_newton = isinstance(hypergrad, bl.Implicit) and callable(hypergrad.operator)
    x = torch.tensor(-30.0 if gauss_newton else 0.5, dtype=torch.float64, requires_grad=True)
    solver = bl.Steps(bl.SGD(0.02, weight_decay=1.0), 1000)
    fit = bl.argmin(objective(x), START, solver=solver, hypergrad=hypergrad)
    (grad,) = torch.autograd.grad(fit.value.square().sum(), x)
    truth = torch.autograd.grad(exact(x, 1.0).square().sum(), x)[0]
    assert relative_error(grad, truth) < 1e-4


def test_the_gauss_newton_matrix_of_a_module_has_the_decay_once():
    net = torch.nn.Linear(3, 1).double()
    a = torch.arange(12, dtype=torch.float64).view(4, 3).sin()
    x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def slope(operator):
        fit = bl.argmin(
            lambda p: (torch.func.functional_call(net, p, (a,)) - x).square().mean(),
            dict(net.named_parameters()),
            solver=bl.Steps(bl.SGD(0.2, weight_decay=0.3), 2000),
            hypergrad=bl.Implicit(bl.CG(), operator=operator),
        )
        return torch.autograd.grad(fit.value["weight"].sum() + fit.value["bias"].square().sum(), x)[0]

    assert relative_error(slope(bl.GaussNewton.of(net, torch.nn.functional.mse_loss)), slope("graph")) < 1e-8


APART = [
    bl.TorchOptim(OPTIM.AdamW, lr=0.02, max_steps=3),
    bl.TorchOptim(OPTIM.Adam, lr=0.02, weight_decay=0.1, decoupled_weight_decay=True, max_steps=3),
    bl.TorchOptim(OPTIM.NAdam, lr=0.02, weight_decay=0.1, decoupled_weight_decay=True, max_steps=3),
    bl.TorchOptim(lambda params: OPTIM.AdamW(params, lr=0.1), max_steps=3),
    bl.Steps(bl.AdamW(0.02), 3),
]


@pytest.mark.parametrize("solver", APART, ids=repr)
@pytest.mark.parametrize("hypergrad", [bl.Implicit(), bl.Penalty()], ids=repr)
def test_a_decay_beside_the_gradient_is_told(solver, hypergrad):
    x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    with pytest.warns(bl.SolveWarning, match="decay"):
        bl.argmin(objective(x), START, solver=solver, hypergrad=hypergrad)


def test_where_a_decay_does_no_harm_nothing_is_told():
    x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for solver in APART:
            bl.argmin(objective(x), START, solver=solver, hypergrad=None)
            bl.argmin(objective(x), START, solver=solver, throw="ignore")
        bl.argmin(objective(x), START, solver=bl.Steps(bl.AdamW(0.02), 3), hypergrad=bl.Unroll())
        bl.argmin(objective(x), START, solver=bl.Steps(bl.AdamW(0.02), 3), hypergrad=bl.SAMA())
        bl.argmin(objective(x), START, solver=bl.Steps(bl.AdamW(0.02, weight_decay=0.0), 3))
        bl.argmin(objective(x), START, solver=bl.TorchOptim(OPTIM.AdamW, lr=0.02, weight_decay=0.0, max_steps=3))


@pytest.mark.parametrize("throw", ["warn", "raise", "fallback", "ignore"])
def test_a_decay_is_told_where_a_residual_will_be_read(throw):
    x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def told(**settings):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            # One step may fail for other reasons, which are told as well.
            with contextlib.suppress(bl.SolveError):
                bl.argmin(objective(x), START, solver=APART[0], throw=throw, **settings)
        return any("decay" in str(one.message) for one in heard)

    assert told() == (throw != "ignore")
    assert not told(hypergrad=None)
    with torch.no_grad():
        assert not told()


def test_a_parameter_without_dimensions():
    x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    solver = bl.TorchOptim(OPTIM.SGD, lr=0.1, gtol=1e-9, max_steps=500)
    fit = bl.argmin(lambda y: (y - x).square(), torch.zeros((), dtype=torch.float64), solver=solver)
    assert torch.autograd.grad(fit.value, x)[0].item() == pytest.approx(1.0)
    scales = torch.tensor([1.0, 3.0], dtype=torch.float64)
    fit = bl.argmin(lambda y, s: s * (y - x).square(), torch.zeros(2, dtype=torch.float64), scales, solver=solver)
    assert torch.autograd.grad(fit.value.sum(), x)[0].item() == pytest.approx(2.0)
    mixed = {"a": torch.zeros((), dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)}
    fit = bl.argmin(lambda p: (p["a"] - x).square() + (p["b"] - x).square().sum(), mixed, solver=solver)
    assert torch.autograd.grad(fit.value["b"].sum() + fit.value["a"], x)[0].item() == pytest.approx(4.0)
