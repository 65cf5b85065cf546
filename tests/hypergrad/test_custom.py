"""Custom autograd Functions whose backward has no derivative are told; those that need none are not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import bilevel as bl


def square(*decorators):
    """A Function that squares, with its backward decorated or computed in NumPy."""

    class Square(Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return a * a

        @staticmethod
        def backward(ctx, grad):
            (a,) = ctx.saved_tensors
            if not decorators:
                return torch.from_numpy(np.asarray(2 * a.detach().numpy() * grad.detach().numpy()))
            return 2 * a * grad

    for decorator in decorators:
        Square.backward = staticmethod(decorator(Square.backward))
    return Square


class Rectified(Function):
    """The backward has no derivative, and needs none: it is constant between the kinks."""

    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        return torch.where(ctx.saved_tensors[0].detach() < 0, torch.zeros_like(grad), grad)


class Reversed(Function):
    @staticmethod
    def forward(ctx, a):
        return a.view_as(a)

    @staticmethod
    def backward(ctx, grad):
        return -grad


INNER = {
    "of params": (lambda f, y, x: (f.apply(y) - x).square().sum(), lambda x: 0.5 / x.sqrt()),
    "of both": (lambda f, y, x: f.apply(y - x * 1.0).sum() + y.square().sum(), lambda x: 0.5 + 0 * x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("decorators", [(), (once_differentiable,)], ids=["numpy", "once"])
def test_a_backward_without_a_derivative_is_told(decorators, name, dtype):
    inner, exact = INNER[name]
    function, x = square(*decorators), torch.full((2,), 2.0, dtype=dtype, requires_grad=True)
    with pytest.warns(UserWarning, match="Function Square has no derivative") as heard:
        bl.argmin(lambda y: inner(function, y, x), torch.ones(2, dtype=dtype))
    assert [warning.filename for warning in heard] == [__file__]
    # What it names does without.
    solver = bl.LBFGS(gtol=1e-12) if dtype == torch.float64 else bl.LBFGS()
    fit = bl.argmin(lambda y: inner(function, y, x), torch.ones(2, dtype=dtype), solver=solver, hypergrad=bl.Penalty())
    if dtype == torch.float64:
        (grad,) = torch.autograd.grad(fit.value.sum(), x)
        torch.testing.assert_close(grad, exact(x.detach()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", INNER)
def test_a_backward_of_operations_is_right(name):
    inner, exact = INNER[name]
    function, x = square(lambda backward: backward), torch.full((2,), 2.0, dtype=torch.float64, requires_grad=True)
    fit = bl.argmin(lambda y: inner(function, y, x), torch.ones(2, dtype=torch.float64))
    (grad,) = torch.autograd.grad(fit.value.sum(), x)
    torch.testing.assert_close(grad, exact(x.detach()))


def test_a_backward_that_needs_no_derivative_is_no_alarm():
    torch.manual_seed(0)
    data = torch.randn(20, 3, dtype=torch.float64)

    def slope(function):
        x = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        fit = bl.argmin(
            lambda w: (function(data @ w) - data.sum(1)).square().mean() + x * w.square().sum(),
            torch.ones(3, dtype=torch.float64),
        )
        return torch.autograd.grad(fit.value.sum(), x)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(slope(Rectified.apply), slope(torch.relu))
        slope(lambda a: Reversed.apply(Reversed.apply(a)))
