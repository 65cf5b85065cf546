"""Solves where the caller has hooks on what autograd saves: `torch.utils.checkpoint`, `save_on_cpu`, and counters."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import bilevel as bl
from bilevel._torch import saved_tensors_hooks
from tests.conformance import relative_error

F64 = torch.float64
ZERO, WEIGHT = torch.zeros(3, dtype=F64), torch.tensor([1.0, -1.0, 2.0], dtype=F64)
STEPS = bl.Steps(bl.SGD(lr=0.1), max_steps=30)


def loss(p, x):
    return (p - x).square().sum() + 0.1 * p.pow(4).sum()


def residual(p, x):
    return torch.stack([*(p - x), p.sum() - 1])


SOLVES = {
    "argmin": lambda x: bl.argmin(loss, ZERO, x).value,
    "argmin, torch.func": lambda x: bl.argmin(loss, ZERO, x, hypergrad=bl.Implicit(operator="func")).value,
    "an objective with torch.func": lambda x: (
        bl.argmin(lambda p, x: torch.func.grad(lambda q: q.pow(3).sum())(p).sum() + loss(p, x), ZERO, x).value
    ),
    "root": lambda x: bl.root(torch.func.grad(loss), ZERO, x).value,
    "fixed_point": lambda x: bl.fixed_point(lambda p, x: torch.tanh(0.3 * p + x), ZERO, x).value,
    "least_squares": lambda x: bl.least_squares(residual, ZERO, x).value,
    "constrained": lambda x: bl.constrained(loss, lambda p, x: (p.sum() - 1)[None], ZERO, x).value.params,
    "quadratic_program": lambda x: (
        bl.quadratic_program(
            torch.eye(3, dtype=F64), -x, torch.ones(1, 3, dtype=F64), torch.ones(1, dtype=F64)
        ).value.primal
    ),
    "unrolled": lambda x: bl.argmin(loss, ZERO, x, solver=STEPS, hypergrad=bl.Unroll()).value,
    "unrolled, checkpoint": lambda x: (
        bl.argmin(loss, ZERO, x, solver=STEPS, hypergrad=bl.Unroll(checkpoint=True)).value
    ),
    "forward mode": lambda x: bl.argmin(loss, ZERO, x, solver=STEPS, hypergrad=bl.ForwardMode()).value,
}


def by_checkpoint(fn, x):
    return checkpoint(fn, x, use_reentrant=False)


def by_reentrant_checkpoint(fn, x):
    return checkpoint(fn, x, use_reentrant=True)


def by_save_on_cpu(fn, x):
    with torch.autograd.graph.save_on_cpu():
        return fn(x)


@pytest.mark.parametrize("wrap", [by_checkpoint, by_reentrant_checkpoint, by_save_on_cpu])
@pytest.mark.parametrize("name", SOLVES)
def test_the_hypergradient_is_the_same(name, wrap):
    """A second time as well, when a solve looks at less than at its first: a checkpoint counts what it saves."""
    x = torch.tensor([0.3, 0.7, -0.2], dtype=F64, requires_grad=True)

    def outer(x):
        return SOLVES[name](2 * x) @ WEIGHT

    (expected,) = torch.autograd.grad(outer(x), x)
    assert expected.abs().min() > 1e-3
    for _ in range(2):
        x.grad = None
        wrap(outer, x).backward()
        assert relative_error(x.grad, expected) < 1e-9
    x.grad = None
    with torch.autograd.graph.save_on_cpu():  # the backward pass as well
        outer(x).backward()
    assert relative_error(x.grad, expected) < 1e-9


def test_a_first_solve_in_a_checkpoint():
    """It makes more graphs than the second one, of the backward pass: a CheckpointError."""
    x = torch.tensor([0.3, 0.7, -0.2], dtype=F64, requires_grad=True)
    for solver in (None, bl.NewtonCG(), bl.GradientDescent(0.1, 200)):

        def fresh(p, x):
            return loss(p, x)

        outer = lambda x, f=fresh, s=solver: bl.argmin(f, ZERO, x, solver=s).value @ WEIGHT  # noqa: E731
        (grad,) = torch.autograd.grad(checkpoint(outer, x, use_reentrant=False), x)
        (expected,) = torch.autograd.grad(outer(x), x)
        assert relative_error(grad, expected) < 1e-6


def test_hooks_are_those_of_the_caller_again_after_a_solve_and_after_an_error():
    def raising(p):
        raise RuntimeError("of the objective")

    pair = (lambda tensor: tensor, lambda tensor: tensor)
    with torch.autograd.graph.saved_tensors_hooks(*pair):
        SOLVES["argmin"](torch.ones(3, dtype=F64, requires_grad=True))
        assert saved_tensors_hooks() == pair
        with pytest.raises(RuntimeError, match="of the objective"):
            bl.argmin(raising, ZERO)
        assert saved_tensors_hooks() == pair
    assert saved_tensors_hooks() is None


def test_the_graph_that_is_kept_has_the_hooks_of_the_caller():
    """So that a checkpoint around an implicit layer keeps no graph, and counters see it: once, however many steps."""
    weight = (0.1 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).requires_grad_()
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def saved(max_steps):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            bl.fixed_point(
                lambda z, x: torch.tanh(z @ weight + x),
                torch.zeros_like(x),
                x,
                solver=bl.Picard(max_steps=max_steps, tol=0.0),
                throw="ignore",
            )
        return sum(sizes)

    assert 2 * x.numel() <= saved(5) < 8 * x.numel()
    assert saved(50) == saved(5)
