from __future__ import annotations

import pytest
import torch

import bilevel as bl
from bilevel.diagnostics import BilevelProblem, HypergradientError, check_hypergradient
from bilevel.problems import Quadratics, Ridge

EXACT = bl.NewtonCG(gtol=1e-13)


@pytest.mark.parametrize("problem", [Ridge(), Ridge(per_feature=True), Quadratics(conditions=(3.0, 30.0))])
def test_a_right_one_passes(problem):
    report = check_hypergradient(problem, solver=EXACT, throw="ignore")
    assert report.ok
    assert report.relative_error < 1e-6
    assert report.exact_error < 1e-9
    assert str(report).startswith("right: relative error")


def test_a_wrong_one_is_an_error_with_both_slopes():
    problem = Quadratics(conditions=(1.0, 30.0))
    identity = bl.Implicit(bl.Identity())
    with pytest.raises(HypergradientError, match=r"WRONG: .* Slopes along 3 random directions"):
        check_hypergradient(problem, solver=EXACT, hypergrad=identity, throw="ignore")
    report = check_hypergradient(problem, solver=EXACT, hypergrad=identity, throw="ignore", raise_exception=False)
    assert not report.ok
    assert report.relative_error == pytest.approx(report.exact_error, rel=1.0)


def test_a_detached_objective_is_found_out():
    """The classic mistake: a hyperparameter that enters through detached values."""
    problem = BilevelProblem(
        inner=lambda y, x: (y - x).square().sum() + (x.detach() * y.square()).sum(),
        outer=lambda y, x: (y - 1).square().sum(),
        init=torch.zeros(3, dtype=torch.float64),
        hparams=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64),
    )
    with pytest.raises(HypergradientError, match="parts of the objective that are detached"):
        check_hypergradient(problem, solver=EXACT, throw="ignore")


def test_an_inaccurate_solver_is_told_by_the_uncertainty():
    report = check_hypergradient(
        Ridge(per_feature=True), solver=bl.GradientDescent(0.1, 3), throw="ignore", raise_exception=False
    )
    assert not report.ok


def test_trees_and_roots():
    weight = torch.linspace(-0.3, 0.3, 9, dtype=torch.float64).view(3, 3)
    problem = BilevelProblem(
        inner=lambda z, x: {"z": torch.tanh(weight @ z["z"] + x["a"]) * x["b"]},
        outer=lambda z, x: z["z"].sum() * x["b"],
        init={"z": torch.zeros(3, dtype=torch.float64)},
        hparams={"a": torch.ones(3, dtype=torch.float64), "b": torch.tensor(0.7, dtype=torch.float64)},
        kind="fixed_point",
    )
    assert check_hypergradient(problem, solver=bl.Newton(tol=1e-13), throw="ignore").relative_error < 1e-6


def test_float32_knows_its_limits():
    problem = Ridge(per_feature=True, dtype=torch.float32)
    report = check_hypergradient(problem, solver=bl.NewtonCG(gtol=1e-6), tolerance=1e-2, throw="ignore")
    assert report.exact_error < 1e-4


def test_complex_hyperparameters_are_refused_in_words():
    c = torch.ones(2, dtype=torch.complex128)
    with pytest.raises(TypeError, match="hparams contains a complex tensor"):
        BilevelProblem(lambda y, c: (y * c).abs().square().sum(), lambda y, c: y.sum(), init=torch.zeros(2), hparams=c)
