"""Workload D: its formulas against autograd and differences, its race against a run whose end is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import bilevel as bl
from applications.measurements.benchmarks import ours_solutions, peers_solutions, solutions, solutions_task
from applications.measurements.benchmarks.contest import NotHere
from applications.measurements.benchmarks.solutions import Solutions
from applications.measurements.benchmarks.solutions_task import Truth

pytest.importorskip("sklearn")
pytestmark = pytest.mark.filterwarnings("ignore::bilevel.SolveWarning", "ignore::FutureWarning")


@pytest.fixture(params=["cleaning", "penalties"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Solutions:
    return Solutions(request.param, cache=str(tmp_path), limit=5.0, small=True)


def point(size: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=size) / 2


def test_solution_is_stationary_for_the_loss_that_contestants_minimise(small: Solutions) -> None:
    task = small.task
    x = point(task.size)
    weights = torch.from_numpy(Truth(task).solve(x, gtol=1e-9)).requires_grad_()
    (features, labels), task_x = task.train, torch.from_numpy(x)
    double = solutions_task.Task(
        task.kind, (features.double(), labels), task.val, task.classes, task.ridge, task.outer_lr, task.sgd_lr
    )
    (gradient,) = torch.autograd.grad(double.inner(weights, task_x), weights)
    assert gradient.norm() < 1e-6


def test_hypergradient_is_the_slope_of_the_loss(small: Solutions) -> None:
    task = small.task
    x, truth = point(task.size), Truth(task)
    truth.solve(x, gtol=1e-10)
    gradient = truth.hypergradient(x, rtol=1e-10)
    direction = np.random.default_rng(1).normal(size=task.size)
    step = 1e-2

    def loss(point: np.ndarray) -> float:
        logs = solutions_task.log_softmax(truth.val @ truth.solve(point, gtol=1e-11), 1)
        return float(-(truth.val_targets * logs).sum() / len(truth.val))

    slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert slope == pytest.approx(gradient @ direction, rel=1e-3)


def test_hypergradient_of_the_library_agrees(small: Solutions) -> None:
    task = small.task
    x = point(task.size)
    hparams = torch.from_numpy(x).float().requires_grad_()
    fit = bl.argmin(
        task.inner, task.start()[0], hparams, solver=bl.LBFGS(gtol=1e-5), hypergrad=bl.Implicit(bl.CG(rtol=1e-5))
    )
    (found,) = torch.autograd.grad(task.outer(fit.value, hparams), hparams)
    truth = Truth(task).hypergradient(x)
    assert np.linalg.norm(found.numpy() - truth) < 2e-3 * np.linalg.norm(truth)


def test_step_size_is_below_one_over_the_curvature(small: Solutions) -> None:
    task = small.task
    weights, x = task.start()[0].double(), torch.from_numpy(point(task.size))
    if task.kind == "cleaning":
        x = x + 3
    hessian = torch.func.hessian(lambda w: task.inner(w.view(-1, task.classes).float(), x.float()))(weights.flatten())
    top = torch.linalg.eigvalsh(hessian.double())[-1]
    assert task.inner_lr(x) <= 1.001 / top


def test_target_is_computed_once(small: Solutions) -> None:
    found = small.target()
    assert found["best"] < found["target"] < found["start"]
    assert found["start"] - found["target"] == pytest.approx(small.part * (found["start"] - found["best"]))
    (path,) = Path(small.cache).iterdir()
    path.write_text(json.dumps({**found, "target": 1.0}))
    assert small.target()["target"] == 1.0


@pytest.mark.parametrize("name", ["advised", "adaptive", "implicit, CG"])
def test_run_ends_at_the_target(small: Solutions, name: str) -> None:
    found = small.contestants()[f"bilevel: {name}"]()()
    known = small.target()
    assert 0 < found.seconds < math.inf
    assert found.facts["curve"][-1][1] <= known["target"]
    assert all(loss > known["target"] for _, loss in found.facts["curve"][:-1])


@pytest.mark.parametrize("problem", ["cleaning", "penalties"])
def test_race_finds_the_first_point_below_the_target(problem: str, tmp_path: Path) -> None:
    """Along exact steps the losses of every point are known."""
    small = Solutions(problem, cache=str(tmp_path), small=True)  # type: ignore[arg-type]
    known, task = small.target(), small.task
    truth, x = Truth(task), np.zeros(task.size)
    step, path = solutions_task.adam(x, 0.05), []
    for _ in range(200):
        step(truth.hypergradient(x, rtol=1e-4))
        path.append(x.copy())
        if truth.loss(x) <= known["target"]:
            break
    expected = len(path)
    assert 3 < expected < 200

    def begin() -> solutions_task.Step:
        points = iter([*path, *[path[-1]] * 10**6])

        def step() -> np.ndarray:
            now = next(points)
            end = solutions.time.perf_counter() + 1e-3
            while solutions.time.perf_counter() < end:
                pass
            return now

        return step

    found = solutions.race(Truth(task), known, 5.0, begin)
    assert found.seconds >= 1e-3 * expected
    assert found.facts["curve"][-1][1] == pytest.approx(truth.loss(path[-1]), rel=1e-4)


def test_run_that_diverges_or_is_too_slow_is_infinite(tmp_path: Path) -> None:
    small = Solutions("penalties", cache=str(tmp_path), limit=0.2, small=True)
    size = small.task.size

    def diverging() -> solutions_task.Step:
        return lambda: np.full(size, np.nan)

    def idle() -> solutions_task.Step:
        return lambda: np.zeros(size)

    def overflowing() -> solutions_task.Step:
        return lambda: np.full(size, 1e3)

    for begin in (diverging, overflowing):
        found = solutions.race(Truth(small.task), small.target(), small.limit, begin)
        assert found.seconds == math.inf
        assert found.facts["stopped"] == "diverged"
    found = solutions.race(Truth(small.task), small.target(), small.limit, idle)
    assert found.seconds == math.inf
    assert "stopped" not in found.facts


def test_every_method_and_every_stochastic_one_takes_part(small: Solutions) -> None:
    names = set(small.contestants())
    assert {f"bilevel: stochastic, {name}" for name in ours_solutions.STOCHASTIC} <= names
    assert len(ours_solutions.STOCHASTIC) == 15
    assert {"bilevel: implicit, CG", "bilevel: unrolled", "bilevel: one step", "bilevel: SAMA"} <= names


@pytest.mark.parametrize("name", sorted(set(ours_solutions.STOCHASTIC) - {"BOME"}))
def test_stochastic_methods_go_down(small: Solutions, name: str) -> None:
    truth, step = Truth(small.task), ours_solutions.stochastic(small.task, name)
    for _ in range(10):
        x = step()
    assert truth.loss(np.asarray(x).astype(np.float64)) < small.target()["start"]


@pytest.mark.parametrize("name", ["hypertorch: CG", "TorchOpt: custom_root, CG", "JAXopt: L-BFGS, implicit"])
def test_implicit_peers_take_the_same_first_step(small: Solutions, name: str) -> None:
    """Adam's first step goes by the sign of the hypergradient."""
    try:
        begin = peers_solutions.peers(small.task)[name]()
    except NotHere as missing:
        pytest.skip(str(missing))
    gradient = Truth(small.task).hypergradient(np.zeros(small.task.size))
    large = np.abs(gradient) > 0.1 * np.abs(gradient).max()
    x = np.asarray(begin()()).astype(np.float64)
    np.testing.assert_array_equal(np.sign(x[large]), -np.sign(gradient[large]))
