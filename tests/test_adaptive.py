from __future__ import annotations

import pytest
import torch

import bilevel as bl
from bilevel.diagnostics.compare import _CountingSolver
from bilevel.problems import Ridge


def outer_loop(settings, after, num_steps=60):
    """Per-feature ridge by Adam; the final loss and hparams, with all products and inner evaluations counted."""
    problem = Ridge(per_feature=True, seed=3)
    x = problem.hparams.clone().requires_grad_()
    outer = torch.optim.Adam([x], lr=0.1)
    params, evaluations, products = problem.init, 0, 0

    def inner(y, x):
        nonlocal evaluations
        evaluations += 1
        return problem.inner(y, x)

    for _ in range(num_steps):
        given = settings()
        counting = _CountingSolver(given["hypergrad"].linear_solver)
        fit = bl.argmin(inner, params, x, solver=given["solver"], hypergrad=bl.Implicit(counting))
        loss = problem.outer(fit.value, x)
        outer.zero_grad()
        loss.backward()
        outer.step()
        params = fit.value.detach()
        products += counting.products
        after(loss)
    return loss.item(), products, evaluations


def test_it_reaches_the_loss_of_tight_tolerances_with_less_work():
    tolerance = bl.Adaptive(smallest=1e-8)

    def after(loss):
        nonlocal tolerance
        tolerance = tolerance.after(loss)

    loose = outer_loop(lambda: tolerance.settings(), after)
    tight = outer_loop(lambda: bl.Adaptive(value=1e-8).settings(), lambda loss: None)
    assert loose[0] == pytest.approx(tight[0], rel=1e-3)
    assert loose[1] < 0.8 * tight[1]
    assert loose[2] < 0.8 * tight[2]
    assert tolerance.value < 0.01


def test_it_follows_the_progress():
    first = bl.Adaptive().after(10.0).after(9.0)
    assert first.value == pytest.approx(0.095)  # as much progress as ever: the slowest
    slower = first.after(8.9)
    assert slower.value == pytest.approx(
        0.25 * first.value
    )  # a tenth of the progress asks for a tenth, at most a quarter
    risen = first.after(9.5)
    assert risen.value == pytest.approx(0.25 * first.value)
    assert first.after(float("nan")) == first
    assert bl.Adaptive(value=2e-8).after(1.0).after(2.0).value == 1e-8
    assert bl.Adaptive(scale=50.0).gtol == pytest.approx(5.0)
    assert eval(repr(first), {"Adaptive": bl.Adaptive}) == first


@pytest.mark.parametrize("settings", [{"value": 1.0}, {"smallest": 0.0}, {"scale": -1.0}, {"fastest": 0.99}])
def test_bad_settings_name_the_argument(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        bl.Adaptive(**settings)
