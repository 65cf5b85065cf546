"""Workload B against a dense solve, at a size where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from applications.measurements.benchmarks import hyperparameters
from applications.measurements.benchmarks.contest import NotHere
from applications.measurements.benchmarks.hyperparameters import Hyperparameters, objective
from applications.measurements.benchmarks.peers_hyperparameters import Passes

WORKLOAD = Hyperparameters(num_examples=120, num_features=30, num_classes=4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp()
    monkeypatch.setattr(hyperparameters.tempfile, "gettempdir", lambda: str(folder))


def dense() -> np.ndarray:
    """The hypergradient in float64 from the whole Hessian."""
    data = WORKLOAD.data()
    x, x_val = (torch.from_numpy(array).double() for array in (data.x_train, data.x_val))
    y, y_val = torch.from_numpy(data.y_train), torch.from_numpy(data.y_val)
    params, penalties = torch.from_numpy(data.solution).double(), torch.from_numpy(data.log_penalties).double()

    def inner(params: Tensor, penalties: Tensor) -> Tensor:
        return objective(params, penalties, x, y)

    hessian = torch.func.hessian(inner)(params, penalties).reshape(params.numel(), -1)
    mixed = torch.func.jacrev(torch.func.grad(inner), argnums=1)(params, penalties).reshape(params.numel(), -1)
    right = torch.func.grad(lambda params: torch.nn.functional.cross_entropy(x_val @ params.T, y_val))(params)
    return -(mixed.T @ torch.linalg.solve(hessian, right.reshape(-1))).numpy()


def error(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def test_the_reference_is_that_of_a_dense_solve():
    assert error(WORKLOAD.reference(), dense()) < 1e-10


def test_the_inner_problem_is_solved():
    data = WORKLOAD.data()
    args = [torch.from_numpy(array) for array in (data.log_penalties, data.x_train, data.y_train)]
    slope = torch.func.grad(objective)(torch.from_numpy(data.solution), *args)
    assert slope.norm() <= 1.1 * hyperparameters.GTOL


def test_every_process_gets_the_same_bits():
    first, second = WORKLOAD.data(), WORKLOAD.data()
    for name in ("x_train", "y_train", "x_val", "y_val", "log_penalties", "solution"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("name", WORKLOAD.contestants())
def test_every_contestant_is_right(name):
    try:
        contestant = WORKLOAD.contestants()[name]()
    except NotHere as missing:
        pytest.skip(str(missing))
    first, second = contestant(), contestant()
    assert error(first.answer, dense()) < WORKLOAD.tolerance
    np.testing.assert_array_equal(first.answer, second.answer)


def test_passes_are_counted():
    x = torch.randn(6, 3)
    w = torch.randn(2, 3, requires_grad=True)
    with Passes(x) as passes:
        torch.nn.functional.linear(x, w).sum().backward()
    assert passes.count == 2
