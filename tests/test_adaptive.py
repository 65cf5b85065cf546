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


def logistic(dtype, scale):
    """40 examples of 5 features of this scale, a penalty for each feature: an inner and an outer loss."""
    random = torch.Generator().manual_seed(0)
    features, noise = (torch.randn(40, n, generator=random, dtype=torch.float64) for n in (5, 1))
    labels = torch.sign(features.sum(1) + noise[:, 0]).to(dtype)
    features = (scale * features).to(dtype)

    def loss(w, half):
        return torch.nn.functional.softplus(-labels[half] * (features[half] @ w)).mean()

    train, val = slice(0, 20), slice(20, 40)
    return lambda w, x: loss(w, train) + (x.exp() * w.square()).sum() / 2, lambda w: loss(w, val)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("as_number", [False, True])
def test_it_does_not_run_out_of_float32(scale, as_number):
    """Down to its smallest value: every solve is good (a warning would be an error), and the gradient as in float64."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        inner, outer = logistic(dtype, scale)
        x, params = torch.zeros(5, dtype=dtype, requires_grad=True), torch.zeros(5, dtype=dtype)
        tolerance = bl.Adaptive()
        for _ in range(20):
            fit = bl.argmin(inner, params, x, **tolerance.settings())
            loss = outer(fit.value)
            (gradient,) = torch.autograd.grad(loss, x)
            assert fit.result.ok
            assert fit.adjoint.result.ok
            params = fit.value.detach()
            with torch.no_grad():
                x -= 0.1 * gradient
            # A loss that rises tightens most.
            tolerance = tolerance.after(loss.item() if as_number else loss.detach()).after(1e9)
        assert tolerance.value == 1e-8
        found[dtype] = gradient.double()
    torch.testing.assert_close(found[torch.float32], found[torch.float64], rtol=3e-3, atol=1e-5)


def test_in_float64_it_is_as_tight_as_it_says():
    inner, _ = logistic(torch.float64, 1.0)
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    tolerance = bl.Adaptive(value=1e-8)
    fit = bl.argmin(inner, torch.zeros(5, dtype=torch.float64), x, **tolerance.settings())
    assert fit.stats["residual_norm"] <= 1e-8
    fit.value.sum().backward()
    assert fit.adjoint.stats["relative_residual"] <= 1e-8
    assert bl.Adaptive(value=1e-3).settings() == {
        "solver": bl.LBFGS(gtol=1e-3),
        "hypergrad": bl.Implicit(bl.CG(rtol=1e-3)),
    }
