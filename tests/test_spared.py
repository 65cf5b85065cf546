"""An evaluation writes into nothing that is not its own, and gradients of embeddings are dense."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import bilevel as bl
from tests.conformance import randn, relative_error

F64 = torch.float64


class Network(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 3), norm, nn.Linear(3, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


def statistics(module):
    return {name: (buffer, buffer.clone()) for name, buffer in module.named_buffers()}


def assert_untouched(module, before):
    for name, buffer in module.named_buffers():
        assert buffer is before[name][0], name
        assert torch.equal(buffer, before[name][1]), name


def normed_problem(functional=functional_call):
    torch.manual_seed(0)
    net, x, y = Network(nn.BatchNorm1d(3)).double(), randn(16, 4, seed=1), randn(16, 1, seed=2)
    decay = torch.tensor(0.3, dtype=F64, requires_grad=True)

    def inner(params):
        penalty = sum(p.square().sum() for p in params.values())
        return F.mse_loss(functional(net, params, (x,)), y) + decay * penalty

    return net, inner, decay


@pytest.mark.parametrize(
    ("hypergrad", "solver"),
    [
        (bl.Implicit(), bl.NewtonCG()),
        (bl.Unroll(), bl.GradientDescent(0.05, 5)),
        (bl.Truncated(2), bl.GradientDescent(0.05, 5)),
        (bl.Penalty(), None),
        (bl.FiniteDifference(0.1), None),
        (bl.Implicit(), bl.External(lambda loss, start: (loss(start), start)[1])),
        (None, bl.TorchOptim(torch.optim.Adam, max_steps=5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_running_statistics_are_left_as_they_were(hypergrad, solver):
    net, inner, decay = normed_problem()
    before = statistics(net)
    fit = bl.argmin(inner, dict(net.named_parameters()), solver=solver, hypergrad=hypergrad, throw="ignore")
    assert_untouched(net, before)
    if hypergrad is not None:
        sum(p.square().sum() for p in fit.value.values()).backward()
        assert decay.grad.isfinite()
        assert decay.grad != 0
    with torch.no_grad():
        bl.argmin(inner, dict(net.named_parameters()), throw="ignore")
    assert_untouched(net, before)


def test_the_gradient_is_that_without_statistics():
    grads = []
    for track in (True, False):
        net, inner, decay = normed_problem()
        if not track:
            net.norm.track_running_stats = False
            net.norm.running_mean = net.norm.running_var = net.norm.num_batches_tracked = None
        fit = bl.argmin(inner, dict(net.named_parameters()), solver=bl.NewtonCG(gtol=1e-11))
        grads.append(torch.autograd.grad(sum(p.square().sum() for p in fit.value.values()), decay)[0])
    assert relative_error(*grads) < 1e-10


def test_statistics_in_threads():
    net, inner, _ = normed_problem(bl.nn.functional_call)
    before, start = statistics(net), {name: p.detach().clone() for name, p in net.named_parameters()}
    solver = bl.GradientDescent(0.05, 5)
    threads = [threading.Thread(target=lambda: bl.argmin(inner, start, solver=solver)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_untouched(net, before)


@pytest.mark.parametrize("make", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_power_iterations_of_a_spectral_norm_start_from_the_same_vector(make):
    torch.manual_seed(0)
    net, x = make(nn.Linear(4, 3)).double(), randn(16, 4, seed=1)
    before = statistics(net)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    decay = torch.tensor(0.3, dtype=F64, requires_grad=True)

    def inner(params):
        away = sum((p - start[name]).square().sum() for name, p in params.items())
        return (functional_call(net, params, (x,)) - 1).square().mean() + decay * away

    fit = bl.argmin(inner, start, solver=bl.GradientDescent(0.1, 5), throw="ignore")
    sum(p.sum() for p in fit.value.values()).backward()
    assert_untouched(net, before)


def test_tensors_that_the_objective_counts_in_are_left_as_they_were():
    count, history = torch.zeros(3), torch.zeros(10)
    x = torch.tensor(0.3, dtype=F64, requires_grad=True)

    def inner(p):
        count.add_(1)
        history[0] = 2.0
        torch.add(history, 1, out=history)
        mine = torch.zeros(2, dtype=F64)
        mine += p  # its own
        return (mine - 1).square().sum() + x * p.square().sum() + 0 * history.sum() * count.sum()

    fit = bl.argmin(inner, torch.zeros(2, dtype=F64))
    assert torch.equal(count, torch.zeros(3))
    assert torch.equal(history, torch.zeros(10))
    (grad,) = torch.autograd.grad(fit.value.sum(), x)
    assert relative_error(grad, torch.tensor(-2 / 1.3**2, dtype=F64)) < 1e-8


def test_what_is_written_is_read_in_the_same_evaluation():
    scale, x = torch.ones((), dtype=F64), torch.tensor(0.5, dtype=F64, requires_grad=True)

    def inner(p):
        scale.mul_(2.0)  # 2 in each evaluation
        return (p - scale * x).square().sum()

    fit = bl.argmin(inner, torch.zeros(2, dtype=F64))
    assert relative_error(fit.value, torch.ones(2, dtype=F64)) < 1e-8
    assert torch.autograd.grad(fit.value.sum(), x)[0].item() == pytest.approx(4.0, rel=1e-8)
    found = bl.root(lambda y: y - scale.mul_(2.0) * x, torch.zeros(2, dtype=F64))
    assert torch.autograd.grad(found.value.sum(), x)[0].item() == pytest.approx(4.0, rel=1e-8)
    assert scale.item() == 1.0


def test_a_transform_inside_of_the_problem():
    """Where it writes into captured tensors, which PyTorch refuses, the copies are those of the transform."""
    net, fit_to_data, decay = normed_problem()
    before, start = statistics(net), dict(net.named_parameters())

    def inner(params):
        """Without a minimum where the weights before the norm vanish."""
        return fit_to_data(params) + decay * sum(((p - 1).square() - p.square()).sum() for p in params.values())

    minimum = bl.argmin(inner, start, solver=bl.NewtonCG(gtol=1e-12))
    by_root = bl.root(torch.func.grad(inner), minimum.value)
    fixed = start["first.weight"].detach()[0, :2]
    held = bl.constrained(inner, lambda params: params["first.weight"][0, :2] - fixed, start)
    slopes = [torch.autograd.grad(fit["last.weight"].sum(), decay)[0] for fit in (minimum.value, by_root.value)]
    assert relative_error(slopes[1], slopes[0]) < 1e-8
    (slope,) = torch.autograd.grad(held.value.params["last.weight"].sum(), decay)
    assert_untouched(net, before)

    def at(value):
        with torch.no_grad():
            decay.fill_(value)
        fit = bl.constrained(inner, lambda params: params["first.weight"][0, :2] - fixed, start, hypergrad=None)
        return fit.value.params["last.weight"].sum()

    assert relative_error(slope, (at(0.3 + 1e-5) - at(0.3 - 1e-5)) / 2e-5) < 1e-5
    count = torch.zeros((), dtype=F64)

    def counted(y):
        first = torch.func.grad(lambda y: (y - count.add_(1)).square().sum())(y)  # y - 1
        return first + torch.func.grad(lambda y: (y - count.add_(1)).square().sum())(y) + 0 * count  # and y - 2

    assert relative_error(bl.root(counted, torch.zeros(2, dtype=F64)).value, torch.full((2,), 1.5, dtype=F64)) < 1e-9
    assert count.item() == 0


def test_writing_into_a_part_is_refused():
    history = torch.zeros(10)

    def inner(p):
        history[2:4].add_(1)
        return p.square().sum()

    with pytest.raises(ValueError, match="in place into a part"):
        bl.argmin(inner, torch.ones(2))


@pytest.mark.parametrize("hypergrad", [bl.Implicit(), bl.Implicit(operator="func"), bl.Unroll(), None], ids=repr)
@pytest.mark.parametrize("solver", [bl.GradientDescent(0.1, 200), bl.NewtonCG()], ids=repr)
def test_sparse_embeddings(hypergrad, solver):
    if isinstance(hypergrad, bl.Unroll) and isinstance(solver, bl.NewtonCG):
        pytest.skip("not unrollable")
    net = nn.Embedding(10, 3, sparse=True).double()
    index, decay = torch.tensor([1, 4, 4]), torch.tensor(0.5, dtype=F64, requires_grad=True)

    def inner(params):
        out = functional_call(net, params, (index,))
        return (out - 1).square().sum() + decay * params["weight"].square().sum()

    fit = bl.argmin(inner, {"weight": torch.zeros(10, 3, dtype=F64)}, solver=solver, hypergrad=hypergrad)
    exact = torch.zeros(10, 3, dtype=F64)
    exact[1], exact[4] = 1 / 1.5, 2 / 2.5
    assert relative_error(fit.value["weight"], exact) < 1e-6
    if hypergrad is not None:
        (grad,) = torch.autograd.grad(fit.value["weight"].sum(), decay)
        assert grad.item() == pytest.approx(3 * (-1 / 1.5**2 - 2 / 2.5**2), rel=1e-6)


def clamps(y):
    with torch.no_grad():
        y.clamp_(min=0)
    return y


def sets(y):
    y[0] = 0.3
    return y


def writes_data(y):
    y.data.clamp_(min=0)
    return y


WRITES = {
    "mul_": lambda y: y.mul_(0.5),
    "no_grad": clamps,
    "item": sets,
    "data": writes_data,
    "part": lambda y: y + 0 * y.detach()[1:].zero_().sum(),
    "relu": lambda y: F.relu(y, inplace=True),
    "out": lambda y: torch.tanh(y.detach(), out=y.detach()) + y,
    "embedding": lambda y: F.embedding(torch.arange(1), y[None], max_norm=0.1)[0],
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("kind", ["argmin", "root", "fixed_point", "least_squares", "unrolled"])
def test_params_are_the_solvers_to_write(kind, write):
    x, init = torch.tensor(0.7, dtype=F64, requires_grad=True), torch.ones(3, dtype=F64)
    solve = {
        "argmin": lambda: bl.argmin(lambda y: (write(y) - x).square().sum(), init),
        "unrolled": lambda: bl.argmin(
            lambda y: (write(y) - x).square().sum(), init, solver=bl.GradientDescent(0.1, 3), hypergrad=bl.Unroll()
        ),
        "root": lambda: bl.root(lambda y: write(y) + y - x, init),
        "fixed_point": lambda: bl.fixed_point(lambda y: 0.2 * write(y) + x, init),
        "least_squares": lambda: bl.least_squares(lambda y: write(y) - x, init),
    }[kind]
    with pytest.raises(ValueError, match="writes in place into its params"):
        solve()
    assert torch.equal(init, torch.ones(3, dtype=F64))


def test_a_frozen_embedding_keeps_its_rows():
    torch.manual_seed(0)
    table = nn.Embedding(5, 2, max_norm=0.5, dtype=F64).requires_grad_(False)
    before, x = table.weight.clone(), torch.tensor(0.7, dtype=F64, requires_grad=True)
    fit = bl.argmin(lambda y: (table(torch.arange(5)).sum(0) * y - x).square().sum(), torch.ones(2, dtype=F64))
    assert torch.equal(table.weight, before)
    rows = before * (0.5 / before.norm(dim=1)).clamp(max=1)[:, None]
    assert relative_error(fit.value, x / rows.sum(0)) < 1e-6


def test_what_is_written_beside_the_params_is_no_part_of_them():
    """Params and buffers in one storage, and sparse tensors, which have none."""
    whole = torch.zeros(6, dtype=F64)
    init, count, x = whole[:3], whole[3:], torch.tensor(0.7, dtype=F64, requires_grad=True)
    sparse = torch.eye(3, dtype=F64).to_sparse()

    def objective(y):
        counted = count.clone().add_(1.0)
        scaled = sparse.clone().mul_(2.0)
        return (scaled.to_dense() @ y / 2 - x).square().sum() + 0 * counted.sum()

    assert relative_error(bl.argmin(objective, init).value, x.detach().expand(3)) < 1e-6
    assert torch.equal(whole, torch.zeros(6, dtype=F64))
