"""Workload E: its formulas against autograd, its reference, and every contestant that is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from applications.measurements.benchmarks import peers_small, report
from applications.measurements.benchmarks.contest import NotHere
from applications.measurements.benchmarks.peers_small import Losses
from applications.measurements.benchmarks.small import SmallProblem
from applications.measurements.benchmarks.small_task import NAMES, small


def error(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize("name", NAMES)
def test_formulas_are_those_of_autograd(name):
    problem = small(name)
    losses, point = Losses(problem), problem.start + 0.1
    w = torch.from_numpy(point).requires_grad_()
    direction = torch.linspace(-1, 2, w.numel(), dtype=torch.float64).reshape(w.shape)
    (slope,) = torch.autograd.grad(losses.total(w, losses.x), w, create_graph=True)
    (product,) = torch.autograd.grad(slope, w, direction, retain_graph=True)
    (pulled,) = torch.autograd.grad(slope, losses.x, -direction)
    (outer,) = torch.autograd.grad(losses.outer(w), w)
    assert error(problem.gradient(point, problem.x), slope.detach().numpy()) < 1e-12
    assert error(problem.product(point, problem.x, direction.numpy()), product.numpy()) < 1e-12
    assert error(problem.pull(point, problem.x, direction.numpy()), pulled.numpy()) < 1e-12
    assert error(problem.outer_gradient(point), outer.numpy()) < 1e-12


def test_the_reference_is_a_difference_of_minima():
    problem = small("ridge-9")

    def outer(shift: float) -> float:
        w = problem.minimum(problem.x + shift)
        return float(problem.outer(w, peers_small.NUMPY))

    assert problem.hypergradient()[0] == pytest.approx((outer(1e-4) - outer(-1e-4)) / 2e-4, rel=1e-5)


@pytest.mark.parametrize("name", ["ridge-9", "network", "batch"])
def test_all_contestants_have_the_answer(name, monkeypatch):
    monkeypatch.setattr(peers_small, "RUNS", 1)
    workload = SmallProblem(problem=name)
    reference, met = workload.reference(), []
    for contestant, build in workload.contestants().items():
        try:
            found = build()()
        except NotHere:
            continue
        assert error(found.answer, reference) < workload.tolerance, contestant
        met.append(contestant)
    assert {"bilevel", "bilevel, tolerances of the peers", "SciPy, formulas by hand"} <= set(met)


def test_the_note_counts_the_evaluations(monkeypatch):
    monkeypatch.setattr(peers_small, "RUNS", 1)
    found = SmallProblem().contestants()["bilevel"]()()
    facts = found.facts
    assert facts["gradients"] > facts["products"] > 5
    assert facts["ratio"] * facts["bare_seconds"] == pytest.approx(found.seconds)
    row = {"name": "bilevel", "note": "", "facts": {**facts, "ratio": 2.5}}
    note = report._notes(row, {}, 1.0, 1.0)
    assert note == f"2.50 times its {facts['gradients']} gradients and {facts['products']} products by themselves"
