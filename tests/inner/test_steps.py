"""Step rules: the iterates of `torch.optim`, and the derivative that it does not have."""

from __future__ import annotations

import pytest
import torch

import bilevel as bl
from bilevel import SGD, Adam, AdamW, RMSprop, Steps
from bilevel.problem import Problem
from bilevel.problems import Quadratics
from tests.conformance import check_inner_solver, randn, relative_error

CASES = [
    (SGD(lr=0.01), torch.optim.SGD),
    (SGD(lr=0.01, momentum=0.9), torch.optim.SGD),
    (SGD(lr=0.01, momentum=0.9, dampening=0.3, weight_decay=0.1), torch.optim.SGD),
    (SGD(lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1), torch.optim.SGD),
    (Adam(lr=0.05), torch.optim.Adam),
    (Adam(lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1), torch.optim.Adam),
    (Adam(lr=0.05, amsgrad=True), torch.optim.Adam),
    (AdamW(lr=0.05), torch.optim.AdamW),
    (AdamW(lr=0.05, weight_decay=0.3, amsgrad=True), torch.optim.AdamW),
    (RMSprop(lr=0.01), torch.optim.RMSprop),
    (RMSprop(lr=0.01, alpha=0.9, centered=True, momentum=0.8, weight_decay=0.1), torch.optim.RMSprop),
]


def settings_of(rule):
    return {name: getattr(rule, name) for name in rule.__dataclass_fields__}


def quadratic_problem():
    quadratics = Quadratics(conditions=(1.0, 50.0), size=6)
    return Problem(quadratics.inner, quadratics.init + 0.3, (quadratics.hparams,))


@pytest.mark.parametrize(("rule", "optimizer"), CASES, ids=lambda c: repr(c) if not isinstance(c, type) else c.__name__)
def test_fifty_steps_of_torch(rule, optimizer):
    problem = quadratic_problem()
    ours = Steps(rule, max_steps=50).minimize(problem)
    theirs = bl.TorchOptim(optimizer, max_steps=50, **settings_of(rule)).minimize(problem)
    assert relative_error(ours.value, theirs.value) <= 1e-12
    assert ours.stats["num_steps"].tolist() == [50, 50]
    assert ours.result is bl.Result.STEPS_DONE


@pytest.mark.parametrize(("rule", "optimizer"), CASES, ids=lambda c: repr(c) if not isinstance(c, type) else c.__name__)
def test_unrolled_derivatives(rule, optimizer):
    """gradcheck towards a weight decay, the start and the step size itself."""
    target = randn(4, seed=1)

    def solve(log_decay, start, lr):
        learned = type(rule)(**{**settings_of(rule), "lr": lr})
        fit = bl.argmin(
            lambda y: ((y - target).square() + (y - 0.3).pow(4)).sum() + log_decay.exp() * y.square().sum(),
            start * 1.0,
            solver=Steps(learned, max_steps=8),
            hypergrad=bl.Unroll(),
        )
        return fit.value

    inputs = (torch.tensor(-1.0, dtype=torch.float64), randn(4, seed=2), torch.tensor(0.05, dtype=torch.float64))
    inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    # eps 1e-3 or more keeps 1 / sqrt(v) smooth; the default of 1e-8 is steep only near v = 0, which this start avoids.
    assert torch.autograd.gradcheck(solve, inputs, rtol=1e-5, atol=1e-7)
    assert torch.autograd.gradgradcheck(solve, inputs, rtol=1e-4, atol=1e-6)


def test_momentum_as_unrolled_torch_gets_it_wrong():
    """Its differentiable SGD detaches the first momentum buffer, where the gradient depends on the hyperparameter."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    start = torch.ones(3, dtype=torch.float64)

    def inner(w, log_decay):
        return (x @ w - y).square().mean() + log_decay.exp() * w.square().sum()

    def ours(log_decay):
        solver = Steps(SGD(0.1, momentum=0.9), max_steps=3)
        fit = bl.argmin(inner, start, log_decay, solver=solver, hypergrad=bl.Unroll())
        return (x @ fit.value - y).square().mean()

    def theirs(log_decay):
        point = start.clone().requires_grad_().clone()
        optimizer = torch.optim.SGD([point], lr=0.1, momentum=0.9, differentiable=True)
        for _ in range(3):
            (point.grad,) = torch.autograd.grad(inner(point.clone(), log_decay), point, create_graph=True)
            optimizer.step()
        return (x @ point - y).square().mean()

    at = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    assert ours(at).item() == pytest.approx(theirs(at).item(), rel=1e-12)
    step = 1e-6
    difference = (ours(at.detach() + step) - ours(at.detach() - step)).item() / (2 * step)
    assert torch.autograd.grad(ours(at), at)[0].item() == pytest.approx(difference, rel=1e-6)
    assert torch.autograd.grad(theirs(at), at)[0].item() != pytest.approx(difference, rel=0.1)


def test_a_gradient_of_exactly_zero_has_a_finite_derivative():
    x = torch.ones((), dtype=torch.float64, requires_grad=True)
    for rule in (Adam(lr=0.1), RMSprop(lr=0.1, centered=True), AdamW(lr=0.1)):
        fit = bl.argmin(
            lambda y: (y["used"] - x).square() + 0 * y["unused"].sum(),
            {"used": torch.zeros((), dtype=torch.float64), "unused": torch.zeros(3, dtype=torch.float64)},
            solver=Steps(rule, max_steps=5),
            hypergrad=bl.Unroll(),
        )
        (grad,) = torch.autograd.grad(fit.value["used"] + fit.value["unused"].sum(), x)
        assert torch.isfinite(grad)


def test_conforms():
    check_inner_solver(Steps(SGD(0.01, momentum=0.8), max_steps=3000, gtol=1e-9))
    check_inner_solver(Steps(Adam(0.05), max_steps=5000, gtol=1e-9), tolerance=1e-5)


def test_a_schedule_is_a_step_size_for_each_step():
    lrs = [0.1, 0.02, 0.05]
    problem = quadratic_problem()
    scheduled = Steps(SGD(torch.tensor(lrs, dtype=torch.float64)), max_steps=3).minimize(problem).value
    y = problem.start.y
    for lr in lrs:
        y = y - lr * problem.evaluate(y).g
    assert relative_error(scheduled, y) <= 1e-14


def test_the_state_of_the_last_step():
    problem = quadratic_problem()
    found = Steps(Adam(0.1), max_steps=4).minimize(problem)
    assert found.state.index == 3
    assert found.state.rule["exp_avg_sq"].shape == problem.start.y.shape
    redone, _ = Adam(0.1).step(found.state.y, found.state.g, found.state.before, 3)
    assert torch.equal(redone, found.value)


def test_steps_that_go_on_are_told_by_their_numbers():
    """From step 2 of 5, with the state of Adam: they end where all five do."""
    problem, seen = quadratic_problem(), []
    whole = Steps(Adam(0.1), max_steps=5).minimize(problem)
    begun = Steps(Adam(0.1), max_steps=2).minimize(problem)
    watched = Steps(Adam(0.1), max_steps=5, callback=seen.append)
    found = watched.resume(problem, problem.evaluate(begun.value), begun.state.rule, 2)
    assert torch.equal(found.value, whole.value)
    assert [(one.step, one.last) for one in seen] == [(2, False), (3, False), (4, False), (5, True)]
    assert torch.equal(seen[-1].flat, whole.value)
    assert found.stats["num_steps"].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: SGD(lr=-0.1), "lr is"),
        (lambda: SGD(nesterov=True), "nesterov"),
        (lambda: Adam(betas=(0.9, 1.0)), "betas"),
        (lambda: Adam(eps=-1.0), "eps"),
        (lambda: RMSprop(momentum=float("nan")), "momentum"),
        (lambda: Steps(SGD(torch.ones(3)), max_steps=5), "lr has 3 step sizes for max_steps = 5"),
        (lambda: Steps(SGD(), max_steps=0), "max_steps"),
    ],
)
def test_bad_settings_name_the_argument(make, name):
    with pytest.raises(ValueError, match=name):
        make()
