"""Step sizes that survive, on a network on which constant ones run into NaN."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.stochastic import SOBA, AmIGO, Decay, StocBiO, step_sizes


def quadratic(curvature):
    scales = torch.tensor(curvature, dtype=torch.float64)
    y, x = (torch.ones(len(scales), dtype=torch.float64, requires_grad=True) for _ in range(2))
    return y, x, lambda y, x, batch: (scales * (y - x).square()).sum() / 2


@pytest.mark.parametrize("largest", [1e-3, 2.0, 500.0])
def test_the_inner_size_is_half_of_one_over_the_largest_curvature(largest):
    y, x, inner = quadratic([largest / 10, largest / 3, largest])
    sizes = step_sizes(y, x, inner, ratio=0.1)
    assert sizes["inner_lr"] == Decay(sizes["inner_lr"].lr, delay=100.0)
    assert sizes["inner_lr"].lr == pytest.approx(0.5 / largest, rel=0.1)
    assert sizes["outer_lr"].lr == pytest.approx(0.1 * sizes["inner_lr"].lr)


def network():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(10, 30), torch.nn.ReLU(), torch.nn.Linear(30, 4))
    x, truth = torch.randn(600, 10), torch.randn(10, 4)
    labels = (x @ truth).argmax(1)
    params = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    log_weights = torch.zeros(4, requires_grad=True)

    def inner(params, log_weights, rows):
        losses = cross_entropy(functional_call(net, params, (x[rows],)), labels[rows], reduction="none")
        return (log_weights.exp()[labels[rows]] * losses).mean()

    def outer(params, log_weights, rows):
        return cross_entropy(functional_call(net, params, (x[rows + 300],)), labels[rows + 300])

    return params, log_weights, inner, outer


def batches(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 300, (32,), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("kind", [SOBA, AmIGO, StocBiO])
def test_a_network_survives(kind):
    params, log_weights, inner, outer = network()
    rows = batches(300)
    method = kind(params, log_weights, inner, outer, **step_sizes(params, log_weights, inner, rows[0]))
    first = outer(params, log_weights, torch.arange(300))
    for own in rows:
        method.step(own, own)
    last = outer(params, log_weights, torch.arange(300))
    assert torch.isfinite(last)
    assert last < 0.7 * first


def test_steps_that_are_far_too_long_throw_nothing_away_and_without_a_limit_are_named():
    params, log_weights, inner, outer = network()
    method = SOBA(params, log_weights, inner, outer, inner_lr=5.0, outer_lr=5.0, longest_move=0.1)
    for own in batches(100):
        before = torch.cat([p.detach().reshape(-1).clone() for p in params.values()])
        method.step(own, own)
        moved = torch.cat([p.detach().reshape(-1) for p in params.values()]) - before
        assert moved.norm() <= 0.1 * (1 + before.norm()) * (1 + 1e-5)
    assert torch.isfinite(outer(params, log_weights, torch.arange(300)))
    params, log_weights, inner, outer = network()
    method = SOBA(params, log_weights, inner, outer, inner_lr=5.0, outer_lr=5.0)

    def run():
        for own in batches(300):
            method.step(own, own)

    with pytest.raises(bl.SolveError, match=r"direction grew from .* to .*inner_lr = 5, .*outer_lr = 5.*step_") as told:
        run()
    assert "look at the data" not in str(told.value)


def test_a_limit_that_is_never_met_changes_nothing():
    found = []
    for longest in (None, 1e6):
        params, log_weights, inner, outer = network()
        method = SOBA(params, log_weights, inner, outer, inner_lr=0.1, outer_lr=0.1, longest_move=longest)
        for own in batches(5):
            method.step(own, own)
        found.append(torch.cat([p.detach().reshape(-1) for p in (*params.values(), log_weights)]))
    torch.testing.assert_close(*found)
    with pytest.raises(ValueError, match="longest_move is 0"):
        SOBA(params, log_weights, inner, outer, inner_lr=0.1, outer_lr=0.1, longest_move=0.0)
