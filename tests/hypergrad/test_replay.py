"""Unrolled steps that are made again: gradients, second derivatives and dropout of plain unrolling, in less memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import bilevel as bl
from bilevel.diagnostics.cost import peak_mib
from bilevel.hypergrad.replay import Replay
from tests.conformance import randn, relative_error
from tests.hypergrad.test_methods import REPLAYED

F64 = torch.float64
EVERY = pytest.mark.parametrize("method", REPLAYED, ids=repr)
RULES = {
    "Adam": lambda lr: bl.Adam(lr, betas=(0.8, 0.9)),
    "momentum": lambda lr: bl.SGD(lr, momentum=0.7, nesterov=True),
}


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def gradients(method, rule, steps):
    """Of T = 3 adapted networks: by start, step sizes, captured weights and what those are made of."""
    net, x = network(), randn(3, 6, 4, seed=2)
    meta = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    rates = torch.full((steps,), 0.1, dtype=F64, requires_grad=True)
    root = torch.linspace(0.5, 1.0, 6, dtype=F64).requires_grad_()
    weights = root * 2  # both are captured, and one is made of the other

    def loss(params, x):
        outputs = torch.vmap(lambda p, x: functional_call(net, p, (x,)))(params, x)
        fit = (weights * outputs.square().sum(-1)).sum(-1) + (root * outputs[..., 0]).sum(-1)
        return fit / 6 + sum(p.square().flatten(1).sum(1) for p in params.values()) / 20

    fit = bl.argmin(loss, bl.stack(meta, 3), x, solver=bl.Steps(rule(rates), steps), hypergrad=method)
    outer = sum(p.square().sum() + p.sin().sum() for p in fit.value.values())
    return torch.autograd.grad(outer, [*meta.values(), rates, root]), fit


@EVERY
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [1, 7, 16])
def test_gradients_are_those_of_plain_unrolling(method, rule, steps):
    found, fit = gradients(method, RULES[rule], steps)
    truth, plain = gradients(bl.Unroll(), RULES[rule], steps)
    assert max(relative_error(a, b) for a, b in zip(found, truth, strict=True)) <= 1e-12
    assert fit.stats["num_steps"].tolist() == [steps] * 3
    for name, vector in plain.state.rule.items():
        torch.testing.assert_close(fit.state.rule[name], vector, rtol=1e-12, atol=1e-14)


@EVERY
def test_the_closed_form_of_a_quadratic(method):
    """``y_K = (1 - (1 - lr h)^K) x / h + (1 - lr h)^K y_0``, with its derivatives by x, h, lr and y_0."""
    x, h, lr, y0 = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (1.5, 0.8, 0.3, -0.4))
    K = 13

    def exact(x, h, lr, y0):
        kept = (1 - lr * h) ** K
        return (1 - kept) * x / h + kept * y0

    fit = bl.argmin(lambda y: h * y.square() / 2 - x * y, y0, solver=bl.Steps(bl.SGD(lr), K), hypergrad=method)
    torch.testing.assert_close(fit.value, exact(x, h, lr, y0), rtol=1e-13, atol=0)
    found = torch.autograd.grad(fit.value, (x, h, lr, y0))
    torch.testing.assert_close(found, torch.autograd.grad(exact(x, h, lr, y0), (x, h, lr, y0)), rtol=1e-12, atol=0)


@EVERY
def test_second_derivatives(method):
    def value(h, y0):
        return bl.argmin(
            lambda w: w.pow(4) / 4 + h * w.square() / 2 - w,
            y0,
            solver=bl.GradientDescent(0.3, 20),
            hypergrad=method,
        ).value

    at = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (1.0, 0.7)]
    assert torch.autograd.gradcheck(value, at)
    assert torch.autograd.gradgradcheck(value, at)


@EVERY
def test_the_gradient_of_a_gradient_in_an_objective(method):
    """A solve inside of an objective: its hyperparameters are those that stand for the outer one's."""
    x = torch.tensor(0.6, dtype=F64, requires_grad=True)

    def outer(y):
        inner = bl.argmin(lambda z: (z - y * x).square(), y * 0, solver=bl.GradientDescent(0.25, 5), hypergrad=method)
        return (inner.value - 1).square() + y.square() / 2

    fit = bl.argmin(outer, torch.tensor(0.1, dtype=F64), solver=bl.NewtonCG(gtol=1e-13))
    (found,) = torch.autograd.grad(fit.value, x)
    a = 1 - 0.5**5  # the inner value is a y x, so y = a x / (a^2 x^2 + 1/2)
    (truth,) = torch.autograd.grad(a * x / (a**2 * x**2 + 0.5), x)
    assert relative_error(found, truth) <= 1e-10


def with_dropout(method, seed=3):
    torch.manual_seed(seed)
    x = torch.linspace(0.5, 1.5, 8, dtype=F64).requires_grad_()
    fit = bl.argmin(
        lambda y: (F.dropout(y, 0.5) - x).square().sum() + y.pow(4).sum() / 9,
        torch.full((8,), 0.1, dtype=F64),
        solver=bl.GradientDescent(0.1, 9),
        hypergrad=method,
        throw="ignore",
    )
    after = torch.get_rng_state()
    (grad,) = torch.autograd.grad(fit.value.sum(), x)
    assert torch.equal(torch.get_rng_state(), after)  # the backward pass leaves no trace
    return fit.value.detach(), grad


@EVERY
def test_dropout_is_drawn_again_as_it_was(method):
    """Each step is made twice or more: with other noise, its derivative would be that of another run."""
    value, first = with_dropout(method)
    assert torch.equal(with_dropout(method)[1], first)
    assert not torch.equal(with_dropout(method, seed=4)[1], first)
    for other in REPLAYED:  # all draw in the order of the steps
        torch.testing.assert_close(with_dropout(other), (value, first), rtol=1e-12, atol=1e-14)


@EVERY
def test_an_objective_that_changes_meanwhile_is_an_error(method):
    data, x = torch.ones(3, dtype=F64), torch.ones(3, dtype=F64, requires_grad=True)
    start = torch.zeros(3, dtype=F64)
    fit = bl.argmin(lambda y: (y - data * x).square().sum(), start, solver=bl.GradientDescent(0.1, 9), hypergrad=method)
    data.mul_(2)
    with pytest.raises(RuntimeError, match="objective has changed"):
        fit.value.sum().backward()


@EVERY
def test_a_hook_on_a_hyperparameter_sees_its_gradient_once(method):
    x, seen = torch.ones(3, dtype=F64, requires_grad=True), []
    x.register_hook(lambda grad: seen.append(grad) or 2 * grad)
    fit = bl.argmin(
        lambda y: (y - x).square().sum(), torch.zeros(3, dtype=F64), solver=bl.GradientDescent(0.1, 9), hypergrad=method
    )
    (grad,) = torch.autograd.grad(fit.value.sum(), x)
    assert len(seen) == 1
    assert grad.tolist() == pytest.approx([2 * (1 - 0.8**9)] * 3)


@EVERY
def test_a_retained_graph_serves_twice(method):
    x = torch.ones(3, dtype=F64, requires_grad=True)
    fit = bl.argmin(
        lambda y: (y - x).pow(4).sum(), torch.zeros(3, dtype=F64), solver=bl.GradientDescent(0.1, 9), hypergrad=method
    )
    once, again = (torch.autograd.grad(fit.value.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)


def test_what_steps_of_unknown_number_take():
    x = torch.ones(3, dtype=F64, requires_grad=True)
    for solver, said in (
        (bl.GradientDescent(0.1, gtol=1e-3), "fixed number of steps"),
        (bl.GradientDescent(0.1, 9, safeguard=True), "fixed number of steps"),
        (bl.GradientDescent(0.1, 9, callback=lambda step: None), "callback"),
        (bl.LBFGS(), "cannot differentiate"),
    ):
        with pytest.raises(TypeError, match=said):
            bl.argmin(lambda y: (y - x).square().sum(), x.detach(), solver=solver, hypergrad=bl.Unroll(mode="mixed"))


DEEP = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.Tanh()))).double()


POINT = 8 * sum(p.numel() for p in DEEP.parameters()) / 2**20


def peak(method, steps):
    """Of a meta-gradient for a network whose activations are forty times its parameters, MiB."""
    meta = {name: p.detach().clone().requires_grad_() for name, p in DEEP.named_parameters()}
    x = randn(640, 16, seed=1)

    def run(steps):
        fit = bl.argmin(
            lambda p: functional_call(DEEP, p, (x,)).square().mean(),
            meta,
            solver=bl.GradientDescent(0.01, steps),
            hypergrad=method,
        )
        torch.autograd.grad(sum(p.square().sum() for p in fit.value.values()), list(meta.values()))

    run(1)
    return peak_mib(lambda: run(steps))


def test_memory_of_points_in_place_of_graphs():
    plain, mixed = (peak(method, 24) for method in (bl.Unroll(), bl.Unroll(mode="mixed")))
    assert mixed < plain / 8
    # What is added for a step is a point, the size of the parameters.
    assert peak(bl.Unroll(mode="mixed"), 88) - mixed == pytest.approx(64 * POINT, rel=0.1)


def test_memory_of_a_tree_grows_with_the_logarithm():
    few, many = (peak(bl.Unroll(checkpoint="tree"), steps) for steps in (8, 64))
    assert many - few <= 14 * POINT  # two for each halving, twice; 56 in mixed mode


def test_points_and_runs_of_a_tree():
    """Points that are kept at once: log2 of the steps; steps made in all: about half of that often."""
    made, most = [], 0

    class Counting(Replay):
        def run(self, spot, first, last, keep, g=None):
            nonlocal most
            made.append(last - first)
            found = super().run(spot, first, last, keep, g)
            most = max(most, len(found))
            return found

    import bilevel.hypergrad.unroll as unroll

    x = torch.ones(1, dtype=F64, requires_grad=True)
    before = unroll.Replay
    unroll.Replay = Counting
    try:
        fit = bl.argmin(
            lambda y: (y - x).square().sum(),
            torch.zeros(1, dtype=F64),
            solver=bl.GradientDescent(0.01, 256),
            hypergrad=bl.Unroll(checkpoint="tree"),
        )
        fit.value.sum().backward()
    finally:
        unroll.Replay = before
    assert x.grad.item() == pytest.approx(1 - 0.98**256, rel=1e-12)
    assert most <= 10
    assert sum(made) <= 256 * (1 + 8 / 2)
