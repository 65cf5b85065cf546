"""The derivative of the last steps is autograd's of the loop that begins where they do."""

from __future__ import annotations

import pytest
import torch

import bilevel as bl
from bilevel.problems import Ridge
from tests.conformance import relative_error


@pytest.mark.parametrize("last", [1, 3, 4, 7, 9])
def test_it_is_autograd_of_the_last_steps(last):
    problem, count = Ridge(per_feature=True, num_features=4), 7
    x = problem.hparams.clone().requires_grad_()
    start = problem.init + 0.5  # at zero the first step does not depend on the penalty
    y = start.clone().requires_grad_()
    for step in range(count):
        y = y.detach().requires_grad_() if step <= count - last else y
        (g,) = torch.autograd.grad(problem.inner(y, x), y, create_graph=True)
        y = y - 0.1 * g
    (truth,) = torch.autograd.grad(problem.outer(y, x), x)
    solver = bl.Steps(bl.SGD(0.1), max_steps=count)
    fit = bl.argmin(problem.inner, start, x, solver=solver, hypergrad=bl.Truncated(last=last), throw="ignore")
    (found,) = torch.autograd.grad(problem.outer(fit.value, x), x)
    assert relative_error(found, truth) <= 1e-12
