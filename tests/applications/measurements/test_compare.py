from __future__ import annotations

import itertools
import json

import pytest
import torch

from applications.frame.command import main
from applications.measurements.compare.__main__ import Config, story
from applications.measurements.compare.methods import METHODS, trace
from applications.measurements.compare.problem import make


def test_hypergradient_of_shared_penalties_is_the_finite_difference():
    import bilevel as bl

    problem = make(4, seed=0, features=12, useful=3, samples=30)
    x = problem.start().requires_grad_()
    fit = problem.fit(x, None, bl.Implicit(bl.CG(rtol=1e-10)))
    exact = bl.argmin(problem.inner, fit.value.detach(), x, solver=bl.NewtonCG(gtol=1e-12))
    (gradient,) = torch.autograd.grad(problem.val.loss(exact.value), x)

    def value(at):
        return problem.val.loss(bl.argmin(problem.inner, fit.value.detach(), at, solver=bl.NewtonCG(gtol=1e-12)).value)

    for k in range(4):
        step = torch.zeros_like(x)
        step[k] = 1e-4
        slope = (value(x.detach() + step) - value(x.detach() - step)) / 2e-4
        assert gradient[k].item() == pytest.approx(slope.item(), rel=1e-5)


def test_groups_are_even_runs():
    assert make(3, 0, features=6, useful=1, samples=4).groups.tolist() == [0, 0, 1, 1, 2, 2]
    assert make(6, 0, features=6, useful=1, samples=4).size == 6


@pytest.mark.parametrize("name", METHODS)
def test_every_method_starts_at_the_same_point_and_stays_in_the_box(name):
    problem = make(3, seed=0, features=12, useful=3, samples=30)
    points = list(itertools.islice(METHODS[name](problem, 0), 6))
    start = float(problem.val.loss(problem.fit(problem.start(), None).value))
    assert points[0][0] == pytest.approx(start, rel=1e-6)
    for loss, weights in points:
        assert float(problem.val.loss(weights)) == pytest.approx(loss)


def test_the_trace_keeps_the_best_within_the_time():
    times = itertools.count()  # each look at the clock is a second later
    points = iter([(3.0, "a"), (1.0, "b"), (2.0, "c"), (0.5, "d")])
    found = trace(points, 4.5, {"a": 30, "b": 10, "c": 20, "d": 5}.__getitem__, lambda: float(next(times)))
    assert [loss for _, loss in found["curve"]] == [3.0, 1.0, 0.5]
    assert found["test"] == 5
    assert [second for second, _ in found["curve"]] == [1.0, 2.0, 4.0]
    times = itertools.count()
    late = trace(iter([(3.0, "a"), (1.0, "b")]), 1.5, {"a": 30, "b": 10}.__getitem__, lambda: float(next(times)))
    assert (late["evaluations"], late["test"]) == (1, 30)


def test_bad_sizes(tmp_path, capsys):
    assert main("compare", ["--sizes", "0", "--out", str(tmp_path / "x")], Config, story) == 2
    assert "--sizes has 0" in capsys.readouterr().err
    assert main("compare", ["--seconds", "-1", "--out", str(tmp_path / "x")], Config, story) == 2


@pytest.mark.applications
def test_with_many_penalties_hypergradients_win(tmp_path):
    """Half of the README's sizes, for less time: at 100 penalties black-box search is far behind."""
    arguments = ["--sizes", "1", "100", "--seconds", "2", "--out", str(tmp_path / "run")]
    assert main("compare", arguments, Config, story) == 0
    (rows,) = json.loads((tmp_path / "run" / "results.json").read_text())["tables"].values()
    loss = {(row["hyperparameters"], row["method"]): row["validation loss"] for row in rows}
    others = [name for name in METHODS if name != "hypergradient"]
    assert loss["100", "hypergradient"] < 0.6 * min(loss["100", name] for name in others)
    assert loss["1", "hypergradient"] < 1.01 * min(loss["1", name] for name in others)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
