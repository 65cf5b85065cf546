"""Modules in objectives: a forgotten functional_call is told, checkpoints inside of one are refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import bilevel as bl
from tests.conformance import randn, relative_error

SOLVER = bl.GradientDescent(0.05, 3)
METHODS = [bl.Implicit(), None, bl.Unroll(), bl.Unroll(checkpoint=True), bl.ForwardMode()]


@pytest.fixture
def data():
    torch.manual_seed(0)
    return nn.Linear(4, 1), torch.randn(8, 4), torch.randn(8, 1), torch.tensor(0.3, requires_grad=True)


def penalty(params):
    return sum(p.square().sum() for p in (params.values() if isinstance(params, dict) else params))


STARTS = {
    "parameters": lambda net: dict(net.named_parameters()),
    "detached": lambda net: {name: p.detach() for name, p in net.named_parameters()},
    "cloned": lambda net: {name: p.detach().clone() for name, p in net.named_parameters()},
    "zeros": lambda net: {name: torch.zeros_like(p) for name, p in net.named_parameters()},
    "list": lambda net: list(net.parameters()),
    "list of copies": lambda net: [p.detach().clone() for p in net.parameters()],
}


@pytest.mark.parametrize("hypergrad", METHODS, ids=repr)
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_forgotten_functional_call_is_told(data, start, hypergrad):
    net, x, y, decay = data
    with pytest.warns(UserWarning, match="functional_call"):
        bl.argmin(lambda p: F.mse_loss(net(x), y) + decay * penalty(p), start(net), solver=SOLVER, hypergrad=hypergrad)


def test_it_is_told_of_many_problems_nested_modules_and_beside_a_proximal_term(data):
    net, x, y, decay = data
    deep = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 1)))
    own = dict(net.named_parameters())
    for objective, init in (
        (torch.vmap(lambda p: F.mse_loss(net(x), y) + decay * penalty(p)), bl.stack(own, 3)),
        (lambda p: F.mse_loss(deep(x), y) + decay * penalty(p), dict(deep.named_parameters())),
        (lambda p: F.mse_loss(net(x), y) + sum((p[k] - own[k]).square().sum() for k in p), own),
        (lambda p: sum((p[k] - own[k]).square().sum() for k in p) + F.mse_loss(net(x), y), own),
    ):
        with pytest.warns(UserWarning, match="functional_call"):
            bl.argmin(objective, init, solver=SOLVER)


def test_it_is_told_of_one_of_two_modules_and_where_params_meet_params_only(data):
    first, x, y, decay = data
    second = nn.Linear(4, 1)
    both = {"first": dict(first.named_parameters()), "second": dict(second.named_parameters())}
    copies = {name: {key: p.detach().clone() for key, p in params.items()} for name, params in both.items()}
    frozen = nn.Linear(4, 1).requires_grad_(False)
    vector = torch.cat([p.detach().flatten() for p in first.parameters()])
    by_products = lambda p: F.mse_loss(first(x), y) + decay * (p["weight"] @ p["weight"].mT).sum()  # noqa: E731

    def one(p):
        output = first(x) + functional_call(second, p["second"], (x,))
        return F.mse_loss(output, y) + decay * (penalty(p["first"]) + penalty(p["second"]))

    for objective, init in (
        (one, both),
        (by_products, {"weight": both["first"]["weight"]}),
        (lambda p: F.mse_loss(first(x), y) + decay * penalty(p["a"]), {"a": copies["first"]}),
        (lambda p: F.mse_loss(frozen(x), y) + decay * penalty(p), dict(frozen.named_parameters())),
        (
            lambda p: F.mse_loss(first(x), y) + decay * p.square().sum(),
            vector,
        ),
    ):
        with pytest.warns(UserWarning, match="functional_call"):
            bl.argmin(objective, init, solver=SOLVER)


def test_other_uses_of_a_module_are_not_told(data):
    net, x, y, decay = data
    own, teacher, body = dict(net.named_parameters()), nn.Linear(4, 1), nn.Linear(4, 4)
    clone = STARTS["cloned"](net)
    whole = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    head = {name: p for name, p in whole.named_parameters() if name.startswith("2")}

    def student(p):
        return functional_call(net, p, (x,))

    def by_hand(p):
        return F.linear(x, p["weight"], p["bias"])

    def away(p):
        return sum((p[name] - own[name]).square().sum() for name in p)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 1))

        def forward(self, x):
            def inner(p):
                return F.mse_loss(x @ p, y) + (p - self.weight).square().sum()

            return bl.argmin(inner, self.weight, solver=SOLVER).value

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for objective, init in (
            (lambda p: F.mse_loss(student(p), y) + away(p), own),  # implicit MAML
            (lambda p: F.mse_loss(student(p), net(x)) + decay * penalty(p), own),  # a proximal term on outputs
            (torch.vmap(lambda p: F.mse_loss(student(p), net(x)) + decay * penalty(p)), bl.stack(own, 3)),
            (lambda p: F.mse_loss(student({k: 1.0 * v for k, v in p.items()}), net(x)), own),
            (lambda p: F.mse_loss(student(p), teacher(x)) + decay * penalty(p), clone),  # distillation
            (lambda p: F.mse_loss(by_hand(p), net(x)) + decay * penalty(p), own),
            (lambda p: F.mse_loss(by_hand(p), teacher(x)) + decay * penalty(p), dict(teacher.named_parameters())),
            (lambda p: F.mse_loss(functional_call(net, p, (body(x),)), y), own),  # a shared representation
            (lambda p: F.mse_loss(functional_call(whole, p, (x,)), y), head),
            (lambda p: F.mse_loss(x @ p["weight"].mT + p["bias"], teacher(x)), clone),  # a view of the params
            (lambda p: F.mse_loss(student({k: p[k] - own[k] for k in p}), net(x)), own),
        ):
            bl.argmin(objective, init, solver=SOLVER)
            bl.argmin(objective, init, solver=SOLVER, hypergrad=bl.Unroll())
        Layer()(x).sum().backward()
        params = own
        for _ in range(2):  # warm starts
            params = bl.argmin(lambda p: F.mse_loss(student(p), y) + away(p), params, solver=SOLVER).value


class Checkpointed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(4, 8), nn.Linear(8, 1), kind

    def forward(self, x):
        if self.kind == "sequential":
            return self.b(checkpoint_sequential([self.a, nn.Tanh()], 2, x, use_reentrant=False))
        block = self.a if self.kind != "function" else lambda x: F.linear(x, self.a.weight, self.a.bias)
        return self.b(torch.tanh(checkpoint(block, x, use_reentrant=self.kind == "reentrant")))


@pytest.mark.filterwarnings("ignore:.*requires_grad=True. Gradients will be None")
@pytest.mark.parametrize("hypergrad", METHODS, ids=repr)
@pytest.mark.parametrize("kind", ["plain", "reentrant", "function", "sequential"])
def test_checkpoints_inside_of_functional_call_are_refused(data, kind, hypergrad):
    _, x, y, decay = data
    net = Checkpointed(kind)
    for start in ("parameters", "cloned"):
        for factor in (None, 1.0):

            def inner(p, factor=factor):
                used = p if factor is None else {name: factor * v for name, v in p.items()}
                return F.mse_loss(functional_call(net, used, (x,)), y) + decay * penalty(p)

            with pytest.raises(ValueError, match="checkpoint"):
                bl.argmin(inner, STARTS[start](net), solver=SOLVER, hypergrad=hypergrad)


def test_checkpoints_that_are_right_are_not_refused():
    x, y, decay = randn(8, 4), randn(8, 1, seed=2), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    body = nn.Linear(4, 4).double()
    grads = []
    for wrapped in (lambda fn, *args: checkpoint(fn, *args, use_reentrant=False), lambda fn, *args: fn(*args)):

        def inner(p, wrapped=wrapped):
            out = wrapped(lambda x, p: torch.tanh(x @ p), wrapped(body, x), p)
            return (out - y).square().mean() + decay * p.square().sum()

        fit = bl.argmin(inner, torch.zeros(4, 1, dtype=torch.float64), solver=bl.NewtonCG(gtol=1e-12))
        grads.append(torch.autograd.grad(fit.value.sum(), (decay, body.weight)))
    for one, other in zip(*grads, strict=True):
        assert relative_error(one, other) < 1e-9
