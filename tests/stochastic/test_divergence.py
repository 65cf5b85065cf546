"""Steps that are too long are told early and by name, and are not taken for bad data; good runs are left alone."""

from __future__ import annotations

import pytest
import torch

from bilevel import Result, SolveError
from bilevel.problems.finite_sums import Quadratics
from bilevel.stochastic import SOBA, Draws
from tests.stochastic.cases import CASES
from tests.stochastic.test_base import inner_loss, soba, vector
from tests.stochastic.test_conformance import small_settings

pytestmark = pytest.mark.filterwarnings("ignore:.*the terms of the Neumann series grow")

PROBLEM = Quadratics(size=8, outer_size=6, num_samples=32, condition=10.0)  # L = 1: steps above 2 diverge


def run_until_it_raises(method, steps, *batches):
    for _ in range(steps):
        method.step(*batches)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("lr", "steps"), [(2.2, 120), (4.0, 20), (1e3, 12)])
def test_a_divergence_is_told_early(name, lr, steps):
    """Long before float64 overflows: at 2.2 a step is 1.2 times the last, 3900 of them to the largest number."""
    y, x = PROBLEM.start()
    settings = {**small_settings(name), "inner_lr": lr, "outer_lr": lr if name == "BOME" else 0.1}
    method = CASES[name].method(y, x, PROBLEM.inner_loss, PROBLEM.outer_loss, **settings)
    with pytest.raises(SolveError, match=rf"too long \(inner_lr = {lr:.4g}, ") as caught:
        run_until_it_raises(method, steps)
    assert caught.value.solution.result is Result.DIVERGED
    assert "data" not in str(caught.value)
    assert torch.isfinite(y).all()
    assert torch.isfinite(x).all()
    if lr < 10:
        assert "direction grew from" in str(caught.value)


CURVATURES = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)  # steps above 0.5 diverge


@pytest.mark.parametrize("longest_move", [None, 0.1])
@pytest.mark.parametrize(
    ("name", "size"), [("F2SA", "inner_lr"), ("AmIGO", "inner_lr"), ("AmIGO", "linear_lr"), ("stocBiO", "inner_lr")]
)
def test_a_divergence_in_short_moves_is_told(name, size, longest_move):
    """Of limited moves, or of inner loops whose steps nearly cancel, none is as long as half of the iterate."""
    settings = {"inner_lr": 0.2, "outer_lr": 0.2, size: 0.51, "longest_move": longest_move}
    if name == "stocBiO":
        settings["neumann_lr"] = 0.2
    method = CASES[name].method(
        torch.zeros(3, dtype=torch.float64, requires_grad=True),
        torch.zeros(3, dtype=torch.float64, requires_grad=True),
        lambda y, x, b: (CURVATURES * y.square()).sum() / 2 - (x * y).sum(),
        lambda y, x, b: ((y - 1).square() + x.square()).sum() / 2,
        **settings,
    )
    with pytest.raises(SolveError, match=f"{name} diverges at step|StocBiO diverges at step"):
        run_until_it_raises(method, 400)


def test_the_norm_that_grew_is_named():
    method = soba(linear_lr=10.0, outer_lr=0.0)
    with pytest.raises(SolveError, match=r"the norm of the linear direction grew from .*linear_lr = 10"):
        run_until_it_raises(method, 30)


@pytest.mark.parametrize("name", CASES)
def test_a_divergence_leaves_the_state_of_the_step_before(name):
    y, x = vector(1.0, 1.0), vector(1.0, 2.0)
    method = CASES[name].method(
        y,
        x,
        lambda y, x, b: (x.square() * y.square()).sum() + (x * y).sum(),
        lambda y, x, b: (y - 1).pow(4).sum(),
        **{**small_settings(name), "inner_lr": 1e3, "outer_lr": 1e3},
    )
    history = []

    def run():
        for _ in range(2000):
            history.append(([leaf.detach().clone() for leaf in (y, x)], method.state_dict()))
            method.step()

    with pytest.raises(SolveError, match=r"at step \d+") as caught:
        run()
    assert caught.value.solution.result is Result.DIVERGED
    params, state = history[-1]
    assert torch.equal(y, params[0])
    assert torch.equal(x, params[1])
    assert torch.isfinite(y).all()
    after = method.state_dict()
    assert after["num_steps"] == state["num_steps"]
    for part in ("vectors", "memory"):
        assert all(torch.equal(after[part][key], value) for key, value in state[part].items())


def test_after_a_divergence_smaller_steps_go_on():
    y = vector(1.0, 1.0)
    method = soba(y, inner_lr=1.0, linear_lr=0.1, outer_lr=0.0)
    with pytest.raises(SolveError, match="diverges"):
        run_until_it_raises(method, 100)
    method.inner_lr = 0.1
    run_until_it_raises(method, 200)
    torch.testing.assert_close(y.detach(), torch.tensor([0.5, 1.0], dtype=torch.float64))


def test_an_overflow_at_once_is_no_bad_data():
    """Float32 overflows at the second step, before anything could be seen to grow."""
    y, x = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    method = SOBA(y, x, inner_loss, lambda y, x, b: (y - 1).square().sum(), inner_lr=1e30, outer_lr=0.0)
    with pytest.raises(SolveError, match=r"losses are finite at params of unit norm.*too long") as caught:
        run_until_it_raises(method, 3)
    assert caught.value.solution.result is Result.DIVERGED


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("level", ["inner", "outer"])
def test_a_poisoned_batch_is_blamed_and_the_next_one_goes_on(name, level):
    y, x = vector(0.5, 0.5), vector(1.0, 2.0)
    losses = (
        lambda y, x, batch: inner_loss(y, x, None) * batch,
        lambda y, x, batch: (y - 1).square().sum() * batch,
    )
    method = CASES[name].method(y, x, *losses, **small_settings(name))
    method.step(1.0, 1.0)
    kept = y.detach().clone()
    bad = (float("nan"), 1.0) if level == "inner" else (1.0, float("nan"))
    with pytest.raises(SolveError, match=f"{level}_loss is NaN or infinite on this batch: look at the data") as caught:
        method.step(*bad)
    assert caught.value.solution.result is Result.NONFINITE
    assert "too long" not in str(caught.value)
    assert torch.equal(y, kept)
    method.step(1.0, 1.0)
    assert method.num_steps == 2


def test_one_bad_batch_of_several_is_blamed():
    method = soba(g=lambda y, x, batch: inner_loss(y, x, None) * batch)
    method.step(Draws([1.0, float("inf")]))  # SOBA draws one
    with pytest.raises(SolveError, match="inner_loss is NaN or infinite on this batch"):
        method.step(Draws([float("inf"), 1.0]))


def test_a_loss_without_a_derivative_is_named():
    y = vector(0.0, 0.0)
    with pytest.raises(SolveError, match="the gradient of inner_loss is NaN or infinite on this batch while the loss"):
        soba(y, g=lambda y, x, b: inner_loss(y, x, b) + y.square().sum().sqrt()).step()
    with pytest.raises(SolveError, match="a second derivative of inner_loss is NaN or infinite"):
        soba(y, g=lambda y, x, b: inner_loss(y, x, b) + y.abs().pow(1.5).sum()).step()


def start_at_the_solution():
    return vector(0.0, 0.0), vector(0.0, 0.0)


GOOD = {
    # Everything is zero at first, so what comes is infinitely larger.
    "zero": (start_at_the_solution, lambda y, x, b: (y - x).square().sum() / 2, lambda y, x, b: (y - 1).square().sum()),
    # Out of a maximum: 1e8 times the distance, and the gradient with it.
    "double well": (
        lambda: (vector(1e-8, -1e-8), vector(0.0, 0.0)),
        lambda y, x, b: (y.square() - 1).square().sum() / 8 + 1e-9 * (y * x).sum(),
        lambda y, x, b: (y - 1).square().sum() / 2,
    ),
    # From far away.
    "far": (
        lambda: (vector(1e8, -1e8), vector(0.0, 1e6)),
        lambda y, x, b: (y - x).square().sum() / 2,
        lambda y, x, b: (y - 1).square().sum() / 2,
    ),
    # Ill-conditioned: the adjoint grows a thousandfold.
    "ill-conditioned": (
        start_at_the_solution,
        lambda y, x, b: (torch.tensor([1.0, 1e-4]) * (y - x).square()).sum() / 2,
        lambda y, x, b: (y - 1).square().sum() / 2,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("problem", GOOD)
@pytest.mark.parametrize("lr", [0.1, 0.9])
def test_a_good_run_is_left_alone(name, problem, lr):
    start, inner, outer = GOOD[problem]
    y, x = start()
    method = CASES[name].method(y, x, inner, outer, **{**small_settings(name), "inner_lr": lr})
    run_until_it_raises(method, 60)
    assert torch.isfinite(y).all()


def test_what_begins_to_move_late_is_no_divergence():
    y, x = start_at_the_solution()
    _, inner, outer = GOOD["zero"]
    sizes = {"inner_lr": lambda t: 0.5 * (t >= 20), "outer_lr": lambda t: 0.05 * (t >= 40)}
    run_until_it_raises(SOBA(y, x, inner, outer, **sizes), 300)
    torch.testing.assert_close(x.detach(), torch.ones(2, dtype=torch.float64), rtol=1e-3, atol=0)


def test_an_outlying_batch_is_no_divergence():
    method = soba(g=lambda y, x, batch: (y - batch * x).square().sum())
    for step in range(60):
        method.step(1e9 if step == 20 else 1.0)
    assert method.num_steps == 60
