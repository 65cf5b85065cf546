"""What is told of a solution after it was evaluated once more."""

from __future__ import annotations

import pytest
import torch

from bilevel.hypergrad.call import measured, rounding_hint
from bilevel.solution import Result, Solution


def again(ended, loss, residual=0.0, code=Result.CONVERGED):
    ended, loss = (torch.tensor(value, dtype=torch.float64) for value in (ended, loss))
    found = Solution(None, {"result": torch.full(ended.shape, int(code), dtype=torch.int8), "loss": ended})
    return measured(found, torch.full((*ended.shape, 4), residual, dtype=torch.float64), loss)


@pytest.mark.parametrize("scale", [1.0, -1.0, 1e6, 1e-6])
def test_a_loss_that_is_another_one_is_no_minimum(scale):
    """Compared to the square root of the rounding error, 1.5e-8, of the larger loss, in each problem."""
    found = again([scale] * 4, [scale, scale * (1 + 1e-9), scale * (1 + 1e-6), scale * (1 - 0.25)])
    assert found.stats["result"].tolist() == [int(Result.CONVERGED)] * 2 + [int(Result.STAGNATED)] * 2


def test_what_was_worse_stays_so_and_what_is_not_finite_is_told():
    assert again([1.0], [2.0], code=Result.MAX_STEPS).result is Result.STAGNATED
    assert again([1.0], [2.0], code=Result.DIVERGED).result is Result.DIVERGED
    assert again([1.0], [torch.inf]).result is Result.NONFINITE
    assert again([1.0], [1.0], residual=torch.nan).result is Result.NONFINITE


def test_norm_and_loss_are_those_of_the_last_evaluation():
    found = again([1.0, 2.0], [1.0, 2.0], residual=0.5)
    assert found.stats["residual_norm"].tolist() == [1.0, 1.0]
    assert found.stats["loss"].tolist() == [1.0, 2.0]


@pytest.fixture
def switches():
    """Both switches, off, and as they were afterwards: they are properties that monkeypatch cannot undo."""
    both = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in both]
    for switch in both:
        switch.allow_tf32 = False
    yield both
    for switch, value in zip(both, before, strict=True):
        switch.allow_tf32 = value


def test_tf32_is_named_where_it_is_on_and_matters(switches):
    assert rounding_hint("cuda", torch.float32) == ""
    switches[0].allow_tf32 = True
    assert "TF32 is on (torch.backends.cudnn.allow_tf32;" in rounding_hint("cuda", torch.float32)
    switches[1].allow_tf32 = True
    assert "allow_tf32 and torch.backends.cuda.matmul.allow_tf32;" in rounding_hint("cuda", torch.float32)
    assert rounding_hint("cpu", torch.float32) == rounding_hint("cuda", torch.float64) == ""
