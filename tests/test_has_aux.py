"""``has_aux=True``: what a function returns beside, at the solution, with its gradient."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import bilevel as bl
from bilevel._torch import pytree

TARGETS = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)


def one(y, target, decay):
    """``y = target / (1 + decay)``; beside it the fit alone, and a name."""
    fit = (y - target).square().sum()
    return fit + decay * y.square().sum(), {"fit": fit, "parts": (y - target, decay * y)}


@pytest.mark.parametrize("hypergrad", [bl.Implicit(), bl.Unroll()], ids=repr)
def test_it_is_that_of_the_solution_and_gradients_flow_through_it(hypergrad):
    decay = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    solver = bl.GradientDescent(0.3, max_steps=100)
    fit = bl.argmin(one, torch.zeros(2).double(), TARGETS[0], decay, solver=solver, hypergrad=hypergrad, has_aux=True)
    exact = TARGETS[0] / 1.5
    torch.testing.assert_close(fit.value, exact)
    torch.testing.assert_close(fit.aux["fit"], (exact - TARGETS[0]).square().sum())
    (grad,) = torch.autograd.grad(fit.aux["fit"], decay)
    # fit(decay) = |target|^2 (decay / (1 + decay))^2
    torch.testing.assert_close(grad, 5 * 2 * torch.tensor(0.5 / 1.5 / 1.5**2, dtype=torch.float64), rtol=1e-7, atol=0.0)


def test_of_many_problems_and_under_vmap_it_has_them_in_front():
    decay = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    batch = torch.vmap(one, in_dims=(0, 0, None))
    start = torch.zeros(2, 2, dtype=torch.float64)
    many = bl.argmin(batch, start, TARGETS, decay, has_aux=True)
    truth = (TARGETS / 1.5 - TARGETS).square().sum(-1)
    torch.testing.assert_close(many.aux["fit"], truth)
    assert [tuple(part.shape) for part in many.aux["parts"]] == [(2, 2), (2, 2)]

    def fit_of(target):
        return bl.argmin(one, torch.zeros_like(target), target, decay.detach(), has_aux=True).aux["fit"]

    torch.testing.assert_close(torch.vmap(fit_of)(TARGETS), truth)
    slopes = torch.vmap(torch.func.grad(fit_of))(TARGETS)
    torch.testing.assert_close(slopes, 2 * TARGETS / 9)


def test_tasks_a_few_at_a_time():
    def solve(targets):
        decay = torch.tensor(0.5, dtype=torch.float64)
        batch = torch.vmap(one, in_dims=(0, 0, None))
        return bl.argmin(batch, torch.zeros_like(targets), targets, decay, has_aux=True)

    parts = [solve(TARGETS[:1]), solve(TARGETS[1:])]
    joined = bl.Solution.joined(parts)
    torch.testing.assert_close(joined.aux["fit"], solve(TARGETS).aux["fit"])
    assert joined.without_values().aux is None


@pytest.mark.parametrize("entry", ["root", "fixed_point", "prox"])
def test_of_systems_and_composite_problems(entry):
    shift = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    start = torch.zeros(2, dtype=torch.float64)
    if entry == "root":
        fit = bl.root(lambda y: (2 * y - torch.cos(y + shift), y.sum()), start, has_aux=True)
    elif entry == "fixed_point":
        fit = bl.fixed_point(lambda y: (torch.cos(y + shift) / 2, y.sum()), start, has_aux=True)
    else:
        solver = bl.ProximalGradient(bl.prox.L1(0.1))
        fit = bl.argmin(lambda y: ((y - shift).square().sum(), y.sum()), start, solver=solver, has_aux=True)
    torch.testing.assert_close(fit.aux, fit.value.sum())
    grads = [torch.autograd.grad(out, shift, retain_graph=True)[0] for out in (fit.aux, fit.value.sum())]
    torch.testing.assert_close(*grads)
    assert grads[0] != 0


def test_modules_are_left_as_they_were_and_the_new_state_can_be_returned():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).double()
    before = copy.deepcopy(net.state_dict())
    buffers = dict(net.named_buffers())

    def inner(params):
        fresh = {name: value.clone() for name, value in buffers.items()}
        out = torch.func.functional_call(net, params | fresh, (TARGETS,))
        return (out - 1).square().sum() + sum(p.square().sum() for p in params.values()), fresh

    params = dict(net.named_parameters())
    fit = bl.argmin(inner, params, solver=bl.GradientDescent(0.01, 3), hypergrad=None, has_aux=True)
    assert fit.aux["1.num_batches_tracked"] == 1
    assert not torch.equal(fit.aux["1.running_mean"], before["1.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_it_goes_where_the_solution_goes():
    fit = bl.argmin(one, torch.zeros(2).double(), TARGETS[0], torch.tensor(0.5).double(), has_aux=True)
    for other in (copy.deepcopy(fit), pickle.loads(pickle.dumps(fit)), pytree.tree_map(lambda leaf: leaf, fit)):
        torch.testing.assert_close(other.aux["fit"], fit.aux["fit"])
    assert bl.argmin(lambda y: y.square().sum(), torch.ones(2)).aux is None


def test_a_detached_solution_has_a_detached_aux():
    decay = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    fit = bl.argmin(one, torch.zeros(2).double(), TARGETS[0], decay, hypergrad=None, has_aux=True)
    assert not fit.aux["fit"].requires_grad


def test_what_is_no_pair_is_refused():
    for fn, found in ((lambda y: y.square().sum(), "a Tensor"), (lambda y: (y.square().sum(), 1, 2), "a tuple of 3")):
        with pytest.raises(ValueError, match=f"returns a pair .result, aux., and this one {found}"):
            bl.argmin(fn, torch.ones(2), has_aux=True)


def test_a_pair_without_it_says_what_to_pass():
    with pytest.raises(ValueError, match=r"Of a pair \(loss, aux\), pass has_aux=True"):
        bl.argmin(lambda y: (y.square().sum(), 1), torch.zeros(2))
