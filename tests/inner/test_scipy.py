"""Every method of `ScipyMinimize`, with and without tolerance, bounds and callback, against a closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import bilevel as bl
from bilevel.inner.scipy import BOUNDED_METHODS

METHODS = ["Nelder-Mead", "Powell", "CG", "BFGS", "Newton-CG", "L-BFGS-B", "TNC", "COBYLA", "COBYQA", "SLSQP"]
METHODS += ["trust-constr", "dogleg", "trust-ncg", "trust-exact", "trust-krylov"]
START = torch.tensor([0.1, 0.2], dtype=torch.float64)
ONE_SIDED = [(0, None), (None, 5.0), (-math.inf, torch.tensor([5.0, math.inf])), (None, None), (-math.inf, math.inf)]
HELD = [(0.0, 1.0), (None, 1.0), (torch.tensor([-math.inf, 0.0]), torch.tensor([1.0, 1.0]))]
CASES = [(method, bounds) for method in METHODS for bounds in (None, *ONE_SIDED[:2], HELD[0])]
CASES = [(method, bounds) for method, bounds in CASES if bounds is None or method.lower() in BOUNDED_METHODS]


def loss(y, x):
    """Both params have its least at the root of ``2 (s - x) + 0.32 s^3``, 1.4806 for x = 2."""
    return (y - x).square().sum() + y.sum() ** 4 / 100


def fitted(solver):
    """The fit and the derivative of the sum of its params by x, without a warning."""
    x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    fit = bl.argmin(loss, START, x, solver=solver, throw="raise")
    return fit, torch.autograd.grad(fit.value.sum(), x)[0].item()


def check(solver, held):
    fit, slope = fitted(solver)
    root = np.roots([0.32, 0.0, 2.0, -4.0])
    s = 1.0 if held else root[np.isreal(root)].real.item()
    np.testing.assert_allclose(fit.value.detach().numpy(), [s, s], rtol=0, atol=1e-6)
    assert slope == pytest.approx(0.0 if held else 2 * 2 / (2 + 0.96 * s**2), abs=1e-6)
    assert fit.result is bl.Result.CONVERGED


@pytest.mark.parametrize("gtol", [None, 1e-6])
@pytest.mark.parametrize(("method", "bounds"), CASES, ids=str)
def test_every_method_arrives_whether_it_is_watched_or_not(method, bounds, gtol):
    seen: list[bl.InnerStep] = []
    check(bl.ScipyMinimize(method, gtol=gtol, bounds=bounds), bounds == HELD[0])
    check(bl.ScipyMinimize(method, gtol=gtol, bounds=bounds, callback=seen.append), bounds == HELD[0])
    assert [one.step for one in seen] == list(range(len(seen)))
    assert len(seen) > 1


@pytest.mark.parametrize("gtol", [None, 1e-6])
@pytest.mark.parametrize("method", METHODS)
def test_a_callback_ends_every_method_at_the_step_that_it_saw(method, gtol):
    seen: list[bl.InnerStep] = []

    def stop(step):
        seen.append(step)
        return step.step == 2

    solver = bl.ScipyMinimize(method, gtol=gtol, callback=stop)
    fit = bl.argmin(loss, START, 2.0, solver=solver, hypergrad=None, throw="raise")
    assert fit.result is bl.Result.STEPS_DONE
    assert int(fit.stats["num_steps"]) == seen[-1].step == 2
    torch.testing.assert_close(fit.value, seen[-1].params, rtol=0, atol=0)


@pytest.mark.parametrize("bounds", [*ONE_SIDED, *HELD], ids=str)
@pytest.mark.parametrize("make", [bl.ScipyMinimize, bl.LBFGS])
def test_a_bound_that_is_infinite_is_none(make, bounds):
    check(make(bounds=bounds), any(bounds is one for one in HELD))


def test_what_the_objective_raises_is_not_taken_for_an_end():
    calls = iter(range(3))

    def broken(y):
        next(calls)
        return y.square().sum()

    with pytest.raises(StopIteration):
        bl.argmin(broken, START, solver=bl.ScipyMinimize("TNC", gtol=1e-9))
