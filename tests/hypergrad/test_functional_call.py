"""A solve inside of a module that is called with other parameters.

Its derivatives are taken when the module has its own back, and are those of the parameters of the call all the same.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, vmap

import bilevel as bl

F64 = torch.float64
ONE, C = torch.zeros((), dtype=F64), 2.0

LAYERS = {
    "argmin": lambda m: bl.argmin(lambda y: (y - m.c) ** 2 + m.s**2 * y**2, ONE, solver=bl.NewtonCG(gtol=1e-12)).value,
    "argmin, func": lambda m: (
        bl.argmin(
            lambda y: (y - m.c) ** 2 + m.s**2 * y**2,
            ONE,
            solver=bl.NewtonCG(gtol=1e-12),
            hypergrad=bl.Implicit(bl.CG(), operator="func"),
        ).value
    ),
    "root": lambda m: bl.root(lambda y: (y - m.c) + m.s**2 * y, ONE).value,
    "fixed_point": lambda m: bl.fixed_point(lambda y: m.c - m.s**2 * y, ONE).value,
    "least_squares": lambda m: bl.least_squares(lambda y: torch.stack([y - m.c, m.s * y]), ONE).value,
    "quadratic_program": lambda m: bl.quadratic_program(
        (1 + m.s**2).reshape(1, 1), -m.c.reshape(1)
    ).value.primal.squeeze(),
    "constrained": lambda m: bl.constrained(
        lambda y: (y[0] - m.c) ** 2 + y[1] ** 2,
        lambda y: y[1:] - m.s * y[:1],
        torch.zeros(2, dtype=F64),
    ).value.params[0],
}


class Layer(nn.Module):
    """``c / (1 + s^2)``"""

    def __init__(self, name: str):
        super().__init__()
        self.s = nn.Parameter(torch.tensor(0.5, dtype=F64))
        self.c = nn.Parameter(torch.tensor(C, dtype=F64))
        self.name = name

    def forward(self):
        return LAYERS[self.name](self)


def exact(s):
    return C / (1 + s**2)


@pytest.mark.parametrize("value", [0.5, 0.7], ids=["the module's own", "another"])
@pytest.mark.parametrize("name", LAYERS)
def test_derivatives_are_those_at_the_parameters_of_the_call(name, value):
    layer, s = Layer(name), torch.tensor(value, dtype=F64, requires_grad=True)

    def called(s):
        return functional_call(layer, {"s": s}, ())

    slope, curvature = float(grad(exact)(s.detach())), float(hessian(exact)(s.detach()))
    y = called(s)
    for _ in range(2):  # the second backward pass evaluates again
        assert torch.autograd.grad(y, s, retain_graph=True)[0].item() == pytest.approx(slope, rel=1e-6)
    (first,) = torch.autograd.grad(called(s), s, create_graph=True)
    assert torch.autograd.grad(first, s)[0].item() == pytest.approx(curvature, rel=1e-5)
    for derivative in (grad, jacrev):
        assert derivative(called)(s.detach()).item() == pytest.approx(slope, rel=1e-6)
    assert hessian(called)(s.detach()).item() == pytest.approx(curvature, rel=1e-5)
    many = torch.tensor([0.3, value], dtype=F64)
    assert torch.allclose(vmap(grad(called))(many), vmap(grad(exact))(many), rtol=1e-6)
    assert layer.s.item() == 0.5
    assert isinstance(layer.s, nn.Parameter)


class Net(nn.Module):
    """A layer inside of a model, whose output is shifted by a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.inside, self.shift = Layer("root"), nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x):
        return x * (self.inside() + self.shift)


def fitted(layer, strength):
    """Parameters of a model that contains a solve, as the params of a solve."""
    net = Net()
    start = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def objective(params, strength):
        y = functional_call(net, params, (1.0,)) if layer else exact_net(params)
        return (y - 1) ** 2 + strength * sum((value**2).sum() for value in params.values())

    fit = bl.argmin(objective, start, strength, solver=bl.NewtonCG(gtol=1e-11), hypergrad=bl.Implicit(bl.Cholesky()))
    assert fit.result is bl.Result.CONVERGED
    return fit.value["shift"]


def exact_net(params):
    return params["inside.c"] / (1 + params["inside.s"] ** 2) + params["shift"]


def test_a_model_with_a_solve_in_it_as_an_inner_problem():
    strength = torch.tensor(0.3, dtype=F64, requires_grad=True)
    slopes = [torch.autograd.grad(fitted(layer, strength), strength)[0] for layer in (True, False)]
    assert torch.allclose(*slopes, rtol=1e-8)


@pytest.mark.parametrize("hypergrad", [bl.Unroll(), bl.Unroll(checkpoint=True), bl.Unroll(mode="mixed")], ids=repr)
def test_a_path_inside_of_a_functional_call(hypergrad):
    """What it makes again when it is differentiated, it makes with the parameters of the call."""
    net = nn.Linear(2, 1, bias=False, dtype=F64)

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.rate = net, nn.Parameter(torch.tensor(0.2, dtype=F64))

        def forward(self, x):
            solver = bl.Steps(bl.SGD(lr=0.3), max_steps=5)
            objective = lambda y: (y - self.net(x)).square().sum() + self.rate * y.square().sum()  # noqa: E731
            return bl.argmin(objective, torch.zeros(1, dtype=F64), solver=solver, hypergrad=hypergrad).value.sum()

    model, x = Adapted(), torch.tensor([1.0, 2.0], dtype=F64)
    given = {name: (2 * value).detach().requires_grad_() for name, value in model.named_parameters()}
    found = torch.autograd.grad(functional_call(model, given, (x,)), list(given.values()))
    twice = Adapted()
    twice.net = nn.Linear(2, 1, bias=False, dtype=F64)
    twice.load_state_dict(given)
    wanted = torch.autograd.grad(twice(x), [dict(twice.named_parameters())[name] for name in given])
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-10)


def test_an_operator_of_outputs_inside_of_a_functional_call():
    """The outputs of `GaussNewton` are evaluated in the backward pass, outside of the problem's own objective."""
    layer = Layer("root")

    class Outputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = layer

        def forward(self):
            operator = bl.GaussNewton(lambda y: torch.stack([y - layer.c, layer.s * y]), lambda z: z.square().sum())
            objective = lambda y: (y - layer.c) ** 2 + (layer.s * y) ** 2  # noqa: E731
            hypergrad = bl.Implicit(bl.LU(), operator=operator)
            return bl.argmin(objective, ONE, solver=bl.NewtonCG(gtol=1e-12), hypergrad=hypergrad).value

    s = torch.tensor(0.9, dtype=F64, requires_grad=True)
    y = functional_call(Outputs(), {"inside.s": s}, ())
    assert torch.autograd.grad(y, s)[0].item() == pytest.approx(float(grad(exact)(s.detach())), rel=1e-8)


def test_a_single_loop_method_on_a_model_with_a_solve_in_it():
    def trained(layer):
        net = Net()
        y = {name: parameter.detach().clone().requires_grad_() for name, parameter in net.named_parameters()}
        x = torch.tensor(0.3, dtype=F64, requires_grad=True)
        out = lambda p: functional_call(net, p, (1.0,)) if layer else exact_net(p)  # noqa: E731
        method = bl.stochastic.SOBA(
            y,
            x,
            lambda p, h, _: (out(p) - 1) ** 2 + h * sum((value**2).sum() for value in p.values()),
            lambda p, h, _: (out(p) - 1.5) ** 2,
            inner_lr=0.1,
            outer_lr=0.1,
        )
        for _ in range(20):
            method.step()
        return x.item()

    assert trained(True) == pytest.approx(trained(False), rel=1e-8)


def test_parameters_that_something_else_had_put_in_place_are_told():
    layer = Layer("root")

    @contextlib.contextmanager
    def holding(tensor):
        own = layer._parameters["s"]
        layer._parameters["s"] = tensor
        yield
        layer._parameters["s"] = own

    s = torch.tensor(0.5, dtype=F64, requires_grad=True)
    with holding(s):
        y = layer()
    assert torch.autograd.grad(y, s, retain_graph=True)[0].item() == pytest.approx(
        -1.28
    )  # over the graph that is there
    with pytest.raises(bl.ObjectiveChangedError, match="reads a parameter of a module in the place of a tensor"):
        torch.autograd.grad(y, s, create_graph=True)
    with holding(s):
        assert torch.autograd.grad(layer(), s, create_graph=True)[0].requires_grad


def test_parametrizations_that_are_cached_within_the_solve_are_told_and_those_before_are_right():
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2, bias=False, dtype=F64))
    x, leaf = torch.ones(2, dtype=F64), linear.parametrizations.weight.original1

    def layer():
        return bl.fixed_point(lambda y: 0.1 * linear(y) + x, torch.zeros(2, dtype=F64)).value.sum()

    (wanted,) = torch.autograd.grad(layer(), leaf)
    with nn.utils.parametrize.cached(), pytest.raises(ValueError, match="call the module once before the solve"):
        layer()
    with nn.utils.parametrize.cached():
        linear(x)
        (found,) = torch.autograd.grad(layer(), leaf)
    assert torch.allclose(found, wanted, rtol=1e-6)


def test_cached_parametrizations_are_told():
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2, bias=False, dtype=F64))
    x = torch.ones(2, dtype=F64)

    def layer():
        return bl.root(lambda y: y - 0.1 * linear(y) - x, torch.zeros(2, dtype=F64)).value.sum()

    (wanted,) = torch.autograd.grad(layer(), linear.parametrizations.weight.original1, create_graph=True)
    assert wanted.requires_grad
    with nn.utils.parametrize.cached():
        linear.weight  # noqa: B018
        y = layer()
    with pytest.raises(bl.ObjectiveChangedError, match=r"parametrize\.cached"):
        torch.autograd.grad(y, linear.parametrizations.weight.original1, create_graph=True)
