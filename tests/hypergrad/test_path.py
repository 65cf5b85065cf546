"""Methods that differentiate the path: random objectives, divergence, fused norms, dtypes, what cannot be followed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as nnf

import bilevel as bl
from tests.conformance import randn, relative_error

F64 = torch.float64
PATHS = [bl.Unroll(), bl.Unroll(checkpoint=True), bl.ForwardMode(), bl.Truncated(last=100)]
paths = pytest.mark.parametrize("method", PATHS, ids=repr)


@paths
def test_dropout_is_drawn_again_as_it_was(method):
    """y is linear in x for given masks, and every mask scales both alike: y = x dy/dx, entry by entry, from y = 0."""
    torch.manual_seed(3)
    x = torch.full((20,), 2.0, dtype=F64, requires_grad=True)
    fit = bl.argmin(
        lambda y: nnf.dropout(y - x, 0.5).square().sum(),
        torch.zeros(20, dtype=F64),
        solver=bl.Steps(bl.SGD(0.1, momentum=0.5), max_steps=9),
        hypergrad=method,
    )
    value = fit.value.detach().clone()
    assert value.std() > 0.01  # the masks differ from entry to entry
    torch.rand(7)  # what is drawn between the passes changes nothing
    before = torch.get_rng_state()
    (grad,) = torch.autograd.grad(fit.value.sum(), x)
    assert relative_error(2.0 * grad, value) <= 1e-12
    assert torch.equal(torch.get_rng_state(), before)


@paths
@pytest.mark.parametrize("throw", ["raise", "warn", "ignore"])
def test_divergence_is_that_of_the_solve(method, throw):
    x = torch.ones(3, dtype=F64, requires_grad=True)

    def fit():
        start, solver = torch.full((3,), 50.0, dtype=F64), bl.Steps(bl.SGD(1.0), max_steps=130)
        return bl.argmin(lambda y: (y - x).pow(4).sum(), start, solver=solver, hypergrad=method, throw=throw)

    if throw == "ignore":
        found = fit()
        assert found.result is bl.Result.NONFINITE
        assert found.stats["num_steps"] == 130
        assert found.value.requires_grad
    else:
        with pytest.raises(bl.SolveError, match="The inner solve"):
            fit()


@pytest.mark.parametrize("method", [*PATHS, bl.Truncated(last=2)], ids=repr)
def test_step_sizes_of_each_problem_keep_the_precision(method):
    """0.1 and 0.2 for two problems in float32: steps of float32, on a quadratic 1 - (1 - 2 lr)^k of the way."""
    x = torch.ones(2, 3, requires_grad=True)
    seen = set()

    def objective(y):
        seen.add(y.dtype)
        return (y - x).square().sum(1)

    solver = bl.GradientDescent((0.1, 0.2), max_steps=6)
    fit = bl.argmin(objective, torch.zeros(2, 3), solver=solver, hypergrad=method)
    (grad,) = torch.autograd.grad(fit.value.sum(), x)
    rates = torch.tensor([[0.8], [0.6]])
    steps = 2 if method == bl.Truncated(last=2) else 6
    torch.testing.assert_close(fit.value, (1 - rates**6).expand(2, 3))
    torch.testing.assert_close(grad, (1 - rates**steps).expand(2, 3))
    assert seen == {torch.float32}


@pytest.mark.parametrize(
    "method", [bl.Unroll(), bl.Unroll(checkpoint=True), bl.Truncated(last=2), bl.Truncated(last=9)], ids=repr
)
def test_second_derivatives_through_layer_norm_are_refused(method):
    """PyTorch's third derivative of the fused norm is wrong there; with the norm written out it is right."""
    data, start = randn(3, 4, seed=1), randn(4, 4, seed=2)

    def written_out(z):
        variance, mean = torch.var_mean(z, -1, correction=0, keepdim=True)
        return (z - mean) * (variance + 1e-5).rsqrt()

    def gradient(h, norm, create_graph):
        def objective(w):
            return (norm(torch.tanh(data @ w)) - h).square().mean() + h * w.square().sum()

        solver = bl.GradientDescent(0.1, max_steps=5)
        fit = bl.argmin(objective, start, solver=solver, hypergrad=method)
        return torch.autograd.grad(fit.value.square().sum(), h, create_graph=create_graph)[0]

    def fused(z):
        return nnf.layer_norm(z, (4,))

    h = torch.tensor(0.3, dtype=F64, requires_grad=True)
    assert relative_error(gradient(h, fused, False), gradient(h, written_out, False)) <= 1e-10
    with pytest.raises(NotImplementedError, match="layer_norm"):
        gradient(h, fused, True)
    assert torch.autograd.grad(gradient(h, written_out, True), h)[0].isfinite()
    # A layer norm before the inner problem, as of a network that makes its hyperparameters, is none of its own.
    made = nnf.layer_norm(torch.stack([h, h**2, h.exp(), 1 + h]), (4,))[2]
    assert gradient_of_made(made, method).isfinite()


def gradient_of_made(made, method):
    fit = bl.argmin(
        lambda y: (y - made).pow(4).sum() + y.square().sum(),
        torch.zeros(2, dtype=F64),
        solver=bl.GradientDescent(0.1, max_steps=5),
        hypergrad=method,
    )
    return torch.autograd.grad(fit.value.sum(), made, create_graph=True)[0]


class Scaled(torch.autograd.Function):
    """A product that hides its operands from closure conversion."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y, h):
        return y * h

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        y, h = ctx.saved_tensors
        return grad * h, grad * y


@pytest.mark.parametrize("method", [bl.Unroll(checkpoint=True), bl.ForwardMode()], ids=repr)
def test_hidden_hyperparameters_are_refused(method):
    """Also where another one is in plain sight."""
    h, x = torch.full((3,), 0.7, dtype=F64, requires_grad=True), torch.ones(3, dtype=F64, requires_grad=True)

    def solve(method):
        solver = bl.GradientDescent(0.1, max_steps=5)
        start = torch.zeros(3, dtype=F64)
        return bl.argmin(lambda y: (Scaled.apply(y, h) - x).square().sum(), start, solver=solver, hypergrad=method)

    with pytest.raises(ValueError, match="cannot be followed"):
        solve(method)
    assert (
        torch.autograd.grad(solve(bl.Unroll()).value.sum(), h)[0].abs().sum() > 0
    )  # eager autograd needs to follow none


@pytest.mark.parametrize("method", [bl.Unroll(checkpoint=True), bl.ForwardMode()], ids=repr)
def test_fused_batch_norm_is_refused(method):
    x = torch.ones((), dtype=F64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="BatchNorm"):
        bl.argmin(
            lambda y: (nnf.batch_norm(y, None, None, training=True) - x).square().sum(),
            randn(4, 3, seed=1),
            solver=bl.GradientDescent(0.1, max_steps=3),
            hypergrad=method,
        )


def test_unrolled_inside_unrolled():
    """Three levels, against the loops written out."""
    h = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def inner(y, z):
        return (y - z * h).square().sum() + y.pow(4).sum() / 10

    def middle(y, z):
        return (y - 1).square().sum() + z.square().sum()

    z = torch.ones(2, dtype=F64, requires_grad=True)
    for _ in range(5):
        y = torch.zeros(2, dtype=F64, requires_grad=True)
        for _ in range(8):
            y = y - 0.1 * torch.autograd.grad(inner(y, z), y, create_graph=True)[0]
        z = z - 0.1 * torch.autograd.grad(middle(y, z), z, create_graph=True)[0]
    (truth,) = torch.autograd.grad(z.sum(), h)

    def descend(objective, start, steps, method):
        return bl.argmin(objective, start, solver=bl.GradientDescent(0.1, steps), hypergrad=method).value

    for method in (bl.Unroll(), bl.Unroll(checkpoint=True)):

        def outer(z, method=method):
            return middle(descend(lambda y: inner(y, z), torch.zeros(2, dtype=F64), 8, method), z)

        found = descend(outer, torch.ones(2, dtype=F64), 5, bl.Unroll())
        assert relative_error(torch.autograd.grad(found.sum(), h)[0], truth) <= 1e-12


@pytest.mark.parametrize("method", PATHS, ids=repr)
def test_several_cotangents_at_once(method):
    x = torch.tensor([0.1, 0.2, 0.3], dtype=F64)

    def value(x):
        start, solver = torch.ones(3, dtype=F64), bl.GradientDescent(0.05, max_steps=10)
        return bl.argmin(
            lambda y: (y - x).square().sum() + y.pow(4).sum(), start, solver=solver, hypergrad=method
        ).value

    one_by_one = torch.autograd.functional.jacobian(value, x)
    at_once = torch.autograd.functional.jacobian(value, x, vectorize=True)
    assert relative_error(at_once, one_by_one) <= 1e-14
