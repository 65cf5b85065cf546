"""What path methods must not do in silence: hidden hyperparameters, layer norm, other dropout, nudges that are lost."""

from __future__ import annotations

import pytest
import torch

import bilevel as bl
from tests.conformance import Triple, randn, relative_error

STEPS = bl.GradientDescent(0.1, 9)


@pytest.mark.parametrize("method", [bl.ForwardMode(), bl.Unroll(checkpoint=True)], ids=repr)
def test_a_tensor_that_cannot_be_followed_is_an_error(method):
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    start = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"depends on a tensor of shape .* cannot be followed"):
        bl.argmin(lambda y: (y - Triple.apply(x)).square().sum(), start, solver=STEPS, hypergrad=method)
    fit = bl.argmin(lambda y: (y - Triple.apply(x)).square().sum(), start, solver=STEPS, hypergrad=bl.Unroll())
    (grad,) = torch.autograd.grad(fit.value.sum(), x)
    assert grad.tolist() == pytest.approx([3 * (1 - 0.8**9)] * 2)


@pytest.mark.parametrize("method", [bl.Unroll(), bl.Unroll(checkpoint=True), bl.Truncated(3)], ids=repr)
def test_second_derivatives_through_layer_norm_are_refused(method):
    """Its third derivative is wrong by several percent in PyTorch."""
    data, h = randn(6, 4, seed=1), torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)

    def inner(w):
        out = torch.nn.functional.layer_norm(data @ w, (4,))
        return out.tanh().square().mean() + h.exp() * w.square().sum()

    fit = bl.argmin(inner, 0.5 * randn(4, 4, seed=2), solver=STEPS, hypergrad=method)
    (first,) = torch.autograd.grad(fit.value.square().sum(), h, retain_graph=True)
    assert first != 0
    with pytest.raises(NotImplementedError, match="layer_norm"):
        torch.autograd.grad(fit.value.square().sum(), h, create_graph=True)


def test_dropout_is_drawn_again_as_it_was():
    """A checkpointed run makes each step twice: with other noise, its derivative would be that of another run."""
    x = torch.linspace(0.5, 1.5, 8, dtype=torch.float64).requires_grad_()

    def gradient(method):
        torch.manual_seed(3)
        fit = bl.argmin(
            lambda y: (torch.nn.functional.dropout(y, 0.5) - x).square().sum(),
            torch.zeros(8, dtype=torch.float64),
            solver=STEPS,
            hypergrad=method,
        )
        return torch.autograd.grad(fit.value.sum(), x)[0]

    torch.manual_seed(3)
    first = gradient(bl.Unroll(checkpoint=True))
    torch.manual_seed(4)
    assert relative_error(gradient(bl.Unroll(checkpoint=True)), first) <= 1e-12
    before = torch.get_rng_state()
    torch.manual_seed(3)
    fit = bl.argmin(
        lambda y: (torch.nn.functional.dropout(y, 0.5) - x).square().sum(),
        torch.zeros(8, dtype=torch.float64),
        solver=STEPS,
        hypergrad=bl.Unroll(checkpoint=True),
    )
    after = torch.get_rng_state()
    torch.autograd.grad(fit.value.sum(), x)
    assert torch.equal(torch.get_rng_state(), after)  # the backward pass leaves no trace
    torch.set_rng_state(before)


def test_a_nudge_below_rounding_is_heard():
    x = torch.ones(3, requires_grad=True)

    def loss():
        fit = bl.argmin(lambda y: 1e6 * (y - x).square().sum(), torch.zeros(3), hypergrad=bl.Penalty(1e6))
        return fit.value.sum()

    with pytest.warns(bl.SolveWarning, match="lost in rounding"):
        loss().backward()


def test_sama_takes_the_rule_of_the_solver():
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    solver = bl.Steps(bl.Adam(0.1), max_steps=20)

    def gradient(method):
        start = torch.zeros(3, dtype=torch.float64)
        fit = bl.argmin(lambda y: (y - x).square().sum(), start, solver=solver, hypergrad=method)
        return torch.autograd.grad(fit.value.sum(), x)[0]

    assert torch.equal(gradient(bl.SAMA()), gradient(bl.SAMA(bl.Adam(0.1))))
    with pytest.raises(TypeError, match="does not fit the solver"):
        gradient(bl.SAMA(bl.SGD(0.1, momentum=0.9)))
