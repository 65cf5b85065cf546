"""`ForwardGradient`: exact along a full set of orthogonal directions, unbiased along any, and never less than told."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import f

import bilevel as bl
from bilevel.problems import Ridge
from tests.conformance import randn, relative_error

F64 = torch.float64
SOLVER = bl.GradientDescent(0.1, 12)
PROBLEM = Ridge(per_feature=True)
DISTRIBUTIONS = pytest.mark.parametrize("distribution", ["rademacher", "normal", "orthogonal"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def hypergradient(method, solver=SOLVER, problem=PROBLEM):
    x = problem.hparams.clone().requires_grad_()
    fit = bl.argmin(problem.inner, problem.init, x, solver=solver, hypergrad=method)
    return torch.autograd.grad(problem.outer(fit.value, x), x)[0]


@pytest.mark.parametrize("rule", [bl.SGD(0.1), bl.Adam(0.05), bl.SGD(0.05, momentum=0.9)], ids=repr)
def test_as_many_orthogonal_directions_as_hyperparameters_are_exact(rule):
    count = PROBLEM.hparams.numel()
    solver = bl.Steps(rule, 12)
    truth = hypergradient(bl.Unroll(), solver)
    method = bl.ForwardGradient(count, "orthogonal", generator())
    assert relative_error(hypergradient(method, solver), truth) <= 1e-10
    assert relative_error(hypergradient(method, solver), truth) <= 1e-10  # in other directions


SMALL, SHORT = Ridge(per_feature=True, num_features=4, num_examples=8), bl.GradientDescent(0.1, 3)


def estimates(method, count):
    """``[count, p]``, each of its own directions."""
    return torch.stack([hypergradient(method, SHORT, SMALL) for _ in range(count)])


@DISTRIBUTIONS
def test_the_mean_is_the_exact_gradient(distribution):
    """The statistic of Hotelling, which is F-distributed for a mean that is right, at one in a thousand."""
    truth = hypergradient(bl.Unroll(), SHORT, SMALL)
    found = estimates(bl.ForwardGradient(4 if distribution != "orthogonal" else 2, distribution, generator(1)), 150)
    n, p = found.shape

    def statistic(mean):
        apart = found.mean(0) - mean
        return (n - p) / (p * (n - 1)) * n * (apart @ torch.linalg.solve(found.T.cov(), apart)).item()

    limit = f.ppf(0.999, p, n - p)
    assert statistic(truth) <= limit
    assert statistic(0.7 * truth) > limit  # the test has power
    assert statistic(truth * torch.tensor([1.0, 1.0, 0.0, 1.0])) > limit


def test_the_spread_is_that_of_the_theory():
    """Variance of signs, summed over the entries: ``(p - 1) / b |g|^2``; the docstring states its root."""
    truth = hypergradient(bl.Unroll(), SHORT, SMALL)
    found = estimates(bl.ForwardGradient(4, generator=generator(2)), 200)
    spread = (found - truth).square().sum(1).mean() / truth.square().sum()
    assert spread.item() == pytest.approx((4 - 1) / 4, rel=0.2)


@DISTRIBUTIONS
def test_a_generator_says_what_is_drawn(distribution):
    first, again = (hypergradient(bl.ForwardGradient(2, distribution, generator(5))) for _ in range(2))
    assert torch.equal(first, again)
    method = bl.ForwardGradient(2, distribution, generator(5))
    assert torch.equal(hypergradient(method), first)
    assert not torch.equal(hypergradient(method), first)  # the next solve has other directions
    torch.manual_seed(7)
    default = hypergradient(bl.ForwardGradient(2, distribution))
    torch.manual_seed(7)
    assert torch.equal(hypergradient(bl.ForwardGradient(2, distribution)), default)


def test_every_kind_of_operand_for_several_problems():
    """Captured and passed, a tree of params, T problems, a start, a step size, a complex one: all directions, exact."""
    scale, shift = (randn(n, seed=n).requires_grad_() for n in (3, 2))
    phase = torch.tensor(0.3 + 0.4j, dtype=torch.complex128, requires_grad=True)
    rate = torch.tensor(0.1, dtype=F64, requires_grad=True)
    start = {"a": randn(2, 3, seed=4).requires_grad_(), "b": randn(2, 2, seed=5)}

    def inner(params, shift):
        size = phase.abs().square() * params["a"].square().sum(-1)
        return size + (params["a"] - scale).pow(4).sum(-1) / 8 + (params["b"] - shift).square().sum(-1)

    def gradients(method):
        fit = bl.argmin(inner, start, shift, solver=bl.Steps(bl.SGD(rate), 6), hypergrad=method)
        outer = fit.value["a"].sin().sum() + fit.value["b"].square().sum()
        return torch.autograd.grad(outer, (scale, shift, phase, rate, start["a"]))

    count = 3 + 2 + 2 + 1 + 6
    found = gradients(bl.ForwardGradient(count, "orthogonal", generator(), to_init=True))
    for one, other in zip(found, gradients(bl.Unroll()), strict=True):
        assert relative_error(real(one), real(other)) <= 1e-10


def test_the_start_is_reached_where_it_is_asked_for():
    start = torch.ones(3, dtype=F64, requires_grad=True)
    x = torch.ones(3, dtype=F64, requires_grad=True)

    def value(to_init):
        method = bl.ForwardGradient(2, generator=generator(), to_init=to_init)
        return bl.argmin(lambda y: (y - x).square().sum(), start, solver=SOLVER, hypergrad=method).value

    assert torch.autograd.grad(value(False).sum(), start, allow_unused=True)[0] is None
    assert torch.autograd.grad(value(True).sum(), start)[0].abs().sum() > 0


def test_it_descends_where_there_are_many_hyperparameters():
    target, draws = randn(40, seed=3), generator(3)
    x = torch.zeros(40, dtype=F64, requires_grad=True)
    outer = torch.optim.SGD([x], lr=1 / 12)
    for _ in range(120):
        fit = bl.argmin(
            lambda y: (y - x).square().sum(),
            torch.zeros(40, dtype=F64),
            solver=SHORT,
            hypergrad=bl.ForwardGradient(4, generator=draws),
        )
        outer.zero_grad()
        (fit.value - target).square().sum().backward()
        outer.step()
    kept = 1 - 0.8**3
    assert (kept * x - target).norm() < 0.1 * target.norm()


def test_what_is_refused():
    for settings, said in (
        ({"num_directions": 0}, "num_directions is 0"),
        ({"distribution": "uniform"}, "distribution is 'uniform': it is one of rademacher, normal, orthogonal"),
    ):
        with pytest.raises(ValueError, match=said):
            bl.ForwardGradient(**settings)
    with pytest.raises(ValueError, match="no more than that are orthogonal"):
        hypergradient(bl.ForwardGradient(PROBLEM.hparams.numel() + 1, "orthogonal"))
    x = PROBLEM.hparams.clone().requires_grad_()
    fit = bl.argmin(PROBLEM.inner, PROBLEM.init, x, solver=SOLVER, hypergrad=bl.ForwardGradient())
    with pytest.raises(NotImplementedError, match=r"second derivative.*ForwardGradient"):
        torch.autograd.grad(PROBLEM.outer(fit.value, x), x, create_graph=True)
    with pytest.raises(TypeError, match="fixed number of steps"):
        hypergradient(bl.ForwardGradient(), bl.GradientDescent(gtol=1e-3))
    with pytest.raises(TypeError, match=r"generator is of type int.*manual_seed"):
        bl.ForwardGradient(generator=5)
    assert math.isfinite(hypergradient(bl.ForwardGradient()).sum())


def real(tensor):
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
