"""Settings of the inner solvers that make no sense name the argument; those at the edge are taken."""

from __future__ import annotations

import pytest
import torch

import bilevel as bl

BAD = [
    (bl.GradientDescent, {"lr": -0.1}),
    (bl.GradientDescent, {"momentum": -0.5, "lr": 0.1}),
    (bl.GradientDescent, {"momentum": 1.0, "lr": 0.1}),
    (bl.LBFGS, {"history": 0}),
    (bl.LBFGS, {"max_steps": -1}),
    (bl.NewtonCG, {"gtol": -1.0}),
    (bl.Anderson, {"history": -1}),
    (bl.Anderson, {"damping": 0.0}),
    (bl.Picard, {"max_steps": -1}),
]
EDGES = [
    bl.GradientDescent(lr=0.1, momentum=0.0),
    bl.LBFGS(history=1),
    bl.NewtonCG(gtol=1e-12),
    bl.ProximalGradient(bl.prox.L1(0.0)),
]


@pytest.mark.parametrize(("solver", "settings"), BAD)
def test_bad_settings_name_the_argument(solver, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is"):
        solver(**settings)


@pytest.mark.parametrize("solver", EDGES, ids=repr)
def test_settings_at_the_edge_are_taken(solver):
    target = torch.arange(4, dtype=torch.float64)
    fit = bl.argmin(lambda y: (y - target).square().sum(), torch.zeros_like(target), solver=solver, throw="ignore")
    assert (fit.value - target).abs().max() <= 1e-6


@pytest.mark.parametrize("solver", [bl.Picard(max_steps=7, tol=1e-30), bl.Anderson(max_steps=7, tol=1e-30)], ids=repr)
def test_the_limit_of_steps_of_a_fixed_point_holds(solver):
    calls = []

    def map_(y):
        calls.append(y)
        return torch.cos(y)

    fit = bl.fixed_point(map_, torch.ones(3, dtype=torch.float64), solver=solver, hypergrad=None, throw="ignore")
    assert fit.stats["num_steps"] == 7
    assert len(calls) <= 7 + 3  # to check it, to begin, and to look at the solution


def test_a_fixed_point_that_is_reached_ends_the_iteration():
    calls = []

    def map_(y):
        calls.append(y)
        return 0.1 * y + 1

    fit = bl.fixed_point(
        map_, torch.ones(3, dtype=torch.float64), solver=bl.Picard(max_steps=500, tol=1e-12), hypergrad=None
    )
    assert fit.result.ok
    assert len(calls) <= 20
    assert (fit.value - 1 / 0.9).abs().max() <= 1e-12


def test_unknowns_are_one_system_unless_told_otherwise():
    matrix = torch.tensor([[3.0, 1.0, 0.0], [-1.0, 2.0, 0.5], [0.0, 0.3, 1.0]], dtype=torch.float64)
    fit = bl.root(lambda y: matrix @ y - 1, torch.zeros(3, dtype=torch.float64), hypergrad=None)
    assert fit.stats["num_steps"].shape == ()
    assert (matrix @ fit.value - 1).abs().max() <= 1e-12
