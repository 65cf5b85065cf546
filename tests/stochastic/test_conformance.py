"""Every method against exact solutions, and against itself after a resume: add a method to `cases.CASES`."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from bilevel.problems.finite_sums import Logistic, Quadratics, _quadratic
from bilevel.tree import Raveler
from tests.conformance import no_tensors_left
from tests.stochastic.cases import CASES, small_settings


@cache
def simulated() -> Quadratics:
    return Quadratics(size=100, outer_size=100, condition=10.0)


@cache
def logistic() -> Logistic:
    return Logistic()


def test_the_solution_in_closed_form_is_a_minimum():
    quadratics = simulated()
    x = quadratics.solution.clone().requires_grad_()
    value = quadratics.outer_loss(quadratics.inner_solution(x), x)
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient.norm() < 1e-10 * quadratics.dense("f")["d"].norm()  # rounding in float64
    inner = quadratics.inner_solution(x).detach().requires_grad_()
    (residual,) = torch.autograd.grad(quadratics.inner_loss(inner, x), inner)
    assert residual.norm() < 1e-10 * quadratics.dense("g")["c"].norm()


@pytest.mark.parametrize("level", ["g", "f"])
def test_condition_number_is_what_it_says(level):
    spectrum = torch.linalg.eigvalsh(simulated().dense(level)["A"])
    torch.testing.assert_close(spectrum[[0, -1]], torch.tensor([0.1, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("name", CASES)
def test_full_batch_steps_reach_the_exact_solution(name):
    quadratics, case = simulated(), CASES[name]
    y, x = quadratics.start()
    method = case.method(y, x, quadratics.inner_loss, quadratics.outer_loss, **case.settings)
    for _ in range(case.steps):
        method.step()
    assert quadratics.suboptimality(x) <= case.bar
    assert method.num_steps == case.steps


def test_logistic_solution_is_a_minimum():
    problem = logistic()
    x = problem.solution.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.value(x), x)
    assert gradient.norm() < 1e-6  # the outer tolerance; it is 0.04 at the start


def network():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    params = dict(net.named_parameters())
    hparams = {name: torch.zeros((), dtype=torch.float64, requires_grad=True) for name in params}
    data = [(torch.randn(20, 4, dtype=torch.float64), torch.randint(3, (20,))) for _ in range(2)]

    def fit(params, batch):
        features, labels = batch
        return cross_entropy(functional_call(net, params, (features,)), labels)

    def inner_loss(params, hparams, batch):
        return fit(params, batch) + sum(hparams[name].exp() * p.square().sum() for name, p in params.items()) / 20

    def outer_loss(params, hparams, batch):
        return fit(params, batch)

    return net, params, hparams, inner_loss, outer_loss, data


@pytest.mark.parametrize("name", CASES)
def test_a_network_is_updated_in_place_as_its_flat_vector_would_be(name):
    net, params, hparams, inner_loss, outer_loss, (train, val) = network()
    trees = Raveler(params), Raveler(hparams)
    y, x = (
        tree.ravel([leaf.detach() for leaf in values.values()]).clone().requires_grad_()
        for tree, values in zip(trees, (params, hparams), strict=True)
    )

    def flat(loss):
        def of_vectors(y, x, batch):
            return loss(*(tree.unflatten(tree.unravel(v)) for tree, v in zip(trees, (y, x), strict=True)), batch)

        return of_vectors

    of_tree = CASES[name].method(params, hparams, inner_loss, outer_loss, **small_settings(name))
    of_flat = CASES[name].method(y, x, flat(inner_loss), flat(outer_loss), **small_settings(name))
    before = y.detach().clone()
    for _ in range(5):
        of_tree.step(train, val)
        of_flat.step(train, val)
    found = torch.cat([leaf.detach().flatten() for leaf in net.parameters()])
    torch.testing.assert_close(found, y.detach(), rtol=1e-11, atol=1e-13)  # order of summation only
    torch.testing.assert_close(torch.stack([h.detach() for h in hparams.values()]), x.detach(), rtol=1e-11, atol=1e-13)
    assert (found - before).norm() > 1e-2
    assert all(leaf.grad is None for leaf in net.parameters())


# A later step on plain batches, as the docstrings tell: T inner steps, Q terms or linear steps.
COSTS = {
    "SOBA": ({}, 2, 1),
    "SABA": ({}, 2, 1),
    "SRBA": ({}, 4, 2),
    "FSLA": ({}, 7, 3),
    "MA-SOBA": ({}, 2, 1),
    "SPABA": ({}, 4, 2),
    "AmIGO": ({"num_inner_steps": 4, "num_linear_steps": 5}, 4 + 1 + 1, 5 + 1),
    "stocBiO": ({"num_inner_steps": 4, "num_terms": 5}, 4 + 1 + 1, 5 + 1),
    "BSA": ({"num_inner_steps": 4, "num_terms": 1}, 4 + 1 + 1, 1),
    "TTSA": ({"num_terms": 1}, 1 + 1 + 1, 1),
    "MRBO": ({"num_terms": 5}, 4, 2 * 5 + 2),
    "SUSTAIN": ({"num_terms": 1}, 4, 2),
    "VRBO": ({"num_inner_steps": 2, "num_terms": 5}, 3 * 4, 3 * (2 * 5 + 2)),
    "F2SA": ({"num_inner_steps": 4}, 3 * 4 + 3, 0),
    "BOME": ({"num_inner_steps": 4}, 4 + 3, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_costs_what_it_says(name):
    settings, gradients, products = COSTS[name]
    problem = Quadratics(size=4, outer_size=3, num_samples=8)
    calls = {"inner": 0, "outer": 0}

    def counted(level, loss):
        def wrapped(*arguments):
            calls[level] += 1
            return loss(*arguments)

        return wrapped

    losses = counted("inner", problem.inner_loss), counted("outer", problem.outer_loss)
    method = CASES[name].method(*problem.start(), *losses, **{**small_settings(name), **settings})
    method.step()
    calls.update(inner=0, outer=0)
    record = method.step()
    assert (record.gradients, record.products) == (gradients, products)
    assert calls["inner"] + calls["outer"] == gradients


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.float64)])
def test_lower_precision_follows_float64(name, dtypes):
    """Twenty steps of the same method, params in float32 alone or beside outer params in float64."""
    problem = Quadratics(size=4, outer_size=3, num_samples=8)

    def run(inner_dtype, outer_dtype):
        y, x = (
            v.detach().to(d).requires_grad_() for v, d in zip(problem.start(), (inner_dtype, outer_dtype), strict=True)
        )
        single = {level: {key: v.to(inner_dtype) for key, v in problem._data[level].items()} for level in ("g", "f")}

        def loss(level):
            return lambda y, x, batch: _quadratic(single[level], y, x.to(inner_dtype), batch)

        method = CASES[name].method(y, x, loss("g"), loss("f"), **small_settings(name))
        for _ in range(20):
            method.step()
        assert (y.dtype, x.dtype) == (inner_dtype, outer_dtype)
        return torch.cat([y.detach().double(), x.detach().double()])

    # Rounding of float32 over 20 steps; the recursive methods add up differences.
    torch.testing.assert_close(run(*dtypes), run(torch.float64, torch.float64), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_steps_leave_no_tensors_behind(name):
    problem = Quadratics(size=4, outer_size=3, num_samples=8)
    method = CASES[name].method(*problem.start(), problem.inner_loss, problem.outer_loss, **small_settings(name))

    for _ in range(4):
        method.step()
    with no_tensors_left():
        for _ in range(12):
            method.step()
