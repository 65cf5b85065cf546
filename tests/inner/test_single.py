"""One small problem in Python's numbers: the same solve as that of a batch of one, which has the rules with masks."""

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import bilevel as bl
from bilevel.linalg.single import SMALL, is_single

DTYPES = [torch.float32, torch.float64]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 7, dtype=torch.float64, generator=GENERATOR)
Y = (X @ torch.randn(7, dtype=torch.float64, generator=GENERATOR) > 0).double()


def logistic(w):
    x, y = X.to(w.dtype), Y.to(w.dtype)
    losses = binary_cross_entropy_with_logits(w @ x.mT, y.expand(*w.shape[:-1], -1), reduction="none")
    return losses.mean(-1) + 0.05 * w.square().sum(-1)


def rosenbrock(w):
    return (100 * (w[..., 1:] - w[..., :-1].square()).square() + (1 - w[..., :-1]).square()).sum(-1)


def falling(w):
    return -w.sum(-1) + 0 * w.square().sum(-1)


def kinked(w):
    return (w - 1).abs().sum(-1) + 1e-3 * w.square().sum(-1)


def nan_ahead(w):
    return torch.where(w > 0.5, math.nan, (w - 1).square()).sum(-1)


def both(loss, init, **settings):
    """The solve of one problem, and that of a batch of one."""
    settings = {"hypergrad": None, "throw": "ignore", **settings}
    return bl.argmin(loss, init, **settings), bl.argmin(loss, init.unsqueeze(0), **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "solver", [bl.LBFGS(), bl.LBFGS(gtol=1e-3), bl.LBFGS(max_steps=3), bl.LBFGS(history=2)], ids=repr
)
@pytest.mark.parametrize("start", [0.0, 1.0, -5.0])
def test_the_steps_are_those_of_a_batch_of_one(solver, start, dtype):
    one, batch = both(logistic, torch.full((7,), start, dtype=dtype), solver=solver)
    accuracy = 1e-9 if dtype == torch.float64 else 1e-4
    assert abs(one.stats["num_steps"] - batch.stats["num_steps"][0]) <= (0 if dtype == torch.float64 else 3)
    assert one.stats["result"] == batch.stats["result"][0]
    assert one.stats.keys() == batch.stats.keys()
    assert torch.allclose(one.value, batch.value[0], rtol=accuracy, atol=accuracy)
    for name, stat in one.stats.items():
        assert (stat.shape, stat.dtype) == ((), batch.stats[name].dtype), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("loss", "start"), [(rosenbrock, -1.0), (falling, 1.0), (kinked, 0.0), (nan_ahead, 0.0), (rosenbrock, 1.0)]
)
def test_hard_losses_end_alike(loss, start, dtype):
    one, batch = both(loss, torch.full((3,), start, dtype=dtype))
    assert one.result is batch.result
    assert torch.allclose(one.value, batch.value[0], rtol=1e-3)


def test_the_first_steps_are_the_same_to_the_last_digits():
    for steps in (1, 2, 5, 10):
        one, batch = both(rosenbrock, torch.full((4,), -1.0, dtype=torch.float64), solver=bl.LBFGS(max_steps=steps))
        assert torch.allclose(one.value, batch.value[0], rtol=1e-10)


def test_as_many_evaluations():
    counts = []
    for init in (torch.zeros(7, dtype=torch.float64), torch.zeros(1, 7, dtype=torch.float64)):
        count = 0

        def loss(w):
            nonlocal count
            count += 1
            return logistic(w)

        bl.argmin(loss, init, hypergrad=None, throw="ignore")  # the first look would count too
        counts.append(count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [1.0, 1e-6, 1e6, -3.0])
@pytest.mark.parametrize("power", [2, 4])
def test_a_minimum_at_zero_is_reached(power, start, dtype):
    one, _ = both(lambda w: (w**power + w**2).sum(-1), torch.full((2,), start, dtype=dtype))
    assert one.result is bl.Result.CONVERGED  # the batch may stagnate, where float32 squares underflow
    assert one.value.norm() <= 1e-4 * abs(start)


@pytest.mark.parametrize("dtype", DTYPES)
def test_separable_classes_have_no_minimum(dtype):
    labels = 2 * Y.to(dtype) - 1
    fit = bl.argmin(
        lambda w: torch.nn.functional.softplus(-labels * (X.to(dtype) @ w)).mean(),
        torch.zeros(7, dtype=dtype),
        hypergrad=None,
        throw="ignore",
    )
    assert fit.result is bl.Result.UNBOUNDED


def test_what_it_is_for():
    assert is_single(torch.zeros(SMALL))
    assert not is_single(torch.zeros(SMALL + 1))
    assert not is_single(torch.zeros(1, 3))
    assert not is_single(torch.zeros(3, dtype=torch.bfloat16))
    assert not torch.func.vmap(lambda y: y * is_single(y))(torch.ones(2, 3)).any()
