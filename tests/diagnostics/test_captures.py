from __future__ import annotations

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import mse_loss

import bilevel as bl
from bilevel.diagnostics import BilevelProblem, advise, check_hypergradient, compare_methods, hypergradient
from bilevel.problems import Ridge

EXACT = bl.NewtonCG(gtol=1e-12)


def readme() -> tuple[BilevelProblem, torch.Tensor]:
    """The README's problem in float64, its functions written with captured tensors."""
    torch.manual_seed(0)
    double = torch.float64
    x_train, x_val = torch.randn(30, 6, dtype=double), torch.randn(30, 6, dtype=double)
    y_train, y_val = (x[:, :2].sum(1, keepdim=True) + torch.randn(30, 1, dtype=double) for x in (x_train, x_val))
    model, log_decay = torch.nn.Linear(6, 1).double(), torch.zeros(6, dtype=double, requires_grad=True)

    def train_loss(params):
        fit = mse_loss(functional_call(model, params, (x_train,)), y_train)
        return fit + (log_decay.exp() * params["weight"].square()).sum()

    def val_loss(params):
        return mse_loss(functional_call(model, params, (x_val,)), y_val)

    return BilevelProblem(train_loss, val_loss, dict(model.named_parameters())), log_decay


def test_the_captured_hyperparameters_are_found():
    problem, log_decay = readme()
    assert len(problem.hparams) == 1
    assert problem.hparams[0] is log_decay


def test_every_diagnostic_takes_functions_that_captured_their_hyperparameters():
    problem, log_decay = readme()
    fit = bl.argmin(problem.inner, problem.init, problem.hparams, solver=EXACT)
    (truth,) = torch.autograd.grad(problem.outer(fit.value, problem.hparams), log_decay)
    report = check_hypergradient(problem, solver=EXACT)
    assert report.ok
    assert report.slope.norm() > 0.01
    found = hypergradient(problem, solver=EXACT)
    torch.testing.assert_close(found.value[0], truth, rtol=1e-8, atol=0.0)
    comparison = compare_methods(problem, {"cg": bl.Implicit(), "none": bl.FirstOrder()}, repeats=1)
    errors = {row.method: row.error for row in comparison.rows}
    assert errors["cg"] < 1e-6 < 0.1 < errors["none"]
    assert advise(problem, solver=EXACT).predicted_error < 1e-5


def test_other_hyperparameters_stand_in_for_the_captured_ones():
    ridge = Ridge()
    captured = ridge.hparams.clone().requires_grad_()
    closed = BilevelProblem(
        lambda y: ridge.inner(y, captured), lambda y: ridge.outer(y, captured), ridge.init, captured
    )
    elsewhere = ridge.hparams + 0.7
    found = hypergradient(closed, elsewhere, solver=EXACT).value
    torch.testing.assert_close(found, ridge.hypergradient(elsewhere), rtol=1e-9, atol=0.0)
    assert check_hypergradient(closed, elsewhere, solver=EXACT).ok


def test_one_level_may_capture_and_the_other_take_its_hyperparameters():
    ridge = Ridge()
    problem = BilevelProblem(ridge.inner, lambda y: ridge.outer(y, ridge.hparams), ridge.init, ridge.hparams)
    assert check_hypergradient(problem, solver=EXACT).ok
    with pytest.raises(TypeError, match="hparams is missing"):
        BilevelProblem(ridge.inner, ridge.outer, ridge.init)


@pytest.mark.parametrize("kind", ["root", "fixed_point"])
def test_systems_capture_too(kind):
    shift = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    inner = {"root": lambda y: 2 * y - torch.cos(y + shift), "fixed_point": lambda y: torch.cos(y + shift) / 2}[kind]
    problem = BilevelProblem(inner, lambda y: y.square().sum(), torch.zeros(2, dtype=torch.float64), kind=kind)
    assert check_hypergradient(problem).ok


def test_a_hyperparameter_that_nothing_reads_is_refused():
    x = torch.ones(3, requires_grad=True)
    derived = x.exp()
    with pytest.raises(ValueError, match=r"Leaf 0 of hparams, of shape \(3,\), is read by neither"):
        BilevelProblem(lambda y: (y - derived).square().sum(), lambda y: y.sum(), torch.zeros(3), x)
    with pytest.raises(ValueError, match="No hyperparameter was found"):
        BilevelProblem(lambda y: (y - 1).square().sum(), lambda y: y.sum(), torch.zeros(3))


def test_a_default_binds_no_hyperparameter():
    """As loops bind their variables; what is bound is read there, whatever the problem is asked for."""
    x, scale = torch.ones(3, requires_grad=True), torch.tensor(2.0)
    problem = BilevelProblem(
        lambda y, scale=scale: (y - scale * x).square().sum(), lambda y: (y - 1).square().sum(), torch.zeros(3), x
    )
    (grad,) = torch.autograd.grad(problem.outer(bl.argmin(problem.inner, problem.init, x).value, x), x)
    torch.testing.assert_close(grad, torch.full((3,), 4.0))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_diagnostics_take_their_derivatives_under_any_mode(mode):
    """Params that were made under inference mode, too."""
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    with mode():
        problem = BilevelProblem(
            lambda y: (y - 1).square().sum() + (x.exp() * y.square()).sum(),
            lambda y: (y - 0.3).square().sum(),
            torch.zeros(3, dtype=torch.float64),
        )
        report, found, advice = check_hypergradient(problem), hypergradient(problem), advise(problem)
        table = compare_methods(problem, {"CG": bl.Implicit(bl.CG(rtol=1e-10))}, repeats=1)
    exact = -2 * (1 / (1 + x.exp()) - 0.3) * x.exp() / (1 + x.exp()) ** 2
    assert report.ok
    torch.testing.assert_close(found.value[0], exact, rtol=1e-7, atol=1e-9)
    assert advice.inner.ok
    assert table.rows[0].error < 1e-8
