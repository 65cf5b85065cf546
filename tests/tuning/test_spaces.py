from __future__ import annotations

import optuna
import pytest
import torch

import bilevel as bl
from bilevel.linalg.operator import Dense
from bilevel.problems import Ridge
from bilevel.tuning import (
    FIXED_POINT_SOLVERS,
    HYPERGRADS,
    INNER_SOLVERS,
    LINEAR_SOLVERS,
    NONSYMMETRIC_SOLVERS,
    create_study,
    guard,
    solver_from_trial,
    suggest_hypergrad,
    suggest_inner_solver,
    suggest_linear_solver,
)
from tests.conformance import randn, spd

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.mark.parametrize(
    ("params", "solver"),
    [
        ({"linear": "CG", "linear.max_steps": 7}, bl.CG(max_steps=7)),
        ({"linear": "Jacobi-CG", "linear.max_steps": 7}, bl.CG(max_steps=7, preconditioner=bl.Jacobi())),
        ({"linear": "Neumann", "linear.max_steps": 3}, bl.Neumann(max_steps=3)),
        ({"linear": "MINRES", "linear.max_steps": 9}, bl.MINRES(max_steps=9)),
        ({"linear": "Identity", "linear.factor": 0.5}, bl.Identity(0.5)),
    ],
)
def test_a_trial_chooses_the_solver_and_its_settings(params, solver):
    trial = optuna.trial.FixedTrial(params)
    assert suggest_linear_solver(trial) == solver
    assert trial.params == params
    assert solver.solve(Dense(spd(4)), randn(4)).value.shape == (4,)


@pytest.mark.parametrize(
    ("choice", "solver"),
    [
        ("CG", bl.CG(rtol=1e-3, max_steps=7)),
        ("Jacobi-CG", bl.CG(rtol=1e-3, max_steps=7, preconditioner=bl.Jacobi())),
        ("Neumann", bl.Neumann(rtol=1e-3, max_steps=7)),
        ("GMRES", bl.GMRES(rtol=1e-3, max_steps=7)),
        ("BiCGSTAB", bl.BiCGSTAB(rtol=1e-3, max_steps=7)),
        ("NormalCG", bl.NormalCG(rtol=1e-3, max_steps=7)),
    ],
)
def test_a_trial_chooses_when_to_stop(choice, solver):
    """Also solvers of systems that are not symmetric, where the search space asks for them."""
    params = {"linear": choice, "linear.max_steps": 7, "linear.rtol": 1e-3}
    trial = optuna.trial.FixedTrial(params)
    choices = (*LINEAR_SOLVERS, *NONSYMMETRIC_SOLVERS)
    assert suggest_linear_solver(trial, choices=choices, rtol=(1e-6, 0.5)) == solver
    assert trial.params == params
    assert solver_from_trial(trial, "linear") == solver


def test_choices_that_solve_any_system_are_asked_for():
    asked = bl.tuning.create_study("choices", seed=0).ask()
    suggest_linear_solver(asked)
    offered = asked.distributions["linear"].choices
    assert set(offered) == set(LINEAR_SOLVERS)
    assert "GMRES" not in offered


def test_unknown_choice():
    with pytest.raises(ValueError, match=r"choices has \['LU'\]"):
        suggest_linear_solver(optuna.trial.FixedTrial({}), choices=("CG", "LU"))


@pytest.mark.parametrize(
    ("params", "hypergrad"),
    [
        (
            {"hypergrad": "Implicit", "hypergrad.damped": True, "hypergrad.damping": 0.5, "linear": "Nystrom-CG"}
            | {"linear.max_steps": 3, "linear.rank": 2},
            bl.Implicit(bl.CG(max_steps=3, preconditioner=bl.NystromPreconditioner(2)), damping=0.5),
        ),
        (
            {"hypergrad": "Implicit", "hypergrad.damped": False, "linear": "Nystrom"}
            | {"linear.rank": 2, "linear.damping": 0.1},
            bl.Implicit(bl.Nystrom(2, damping=0.1)),
        ),
        ({"hypergrad": "OneStep", "hypergrad.step_size": 0.5}, bl.OneStep(0.5)),
        ({"hypergrad": "FiniteDifference", "hypergrad.lr": 0.5}, bl.FiniteDifference(0.5)),
        ({"hypergrad": "Penalty", "hypergrad.strength": 50.0}, bl.Penalty(50.0)),
        ({"hypergrad": "Truncated", "hypergrad.last": 2}, bl.Truncated(2)),
        ({"hypergrad": "Unroll"}, bl.Unroll()),
        ({"hypergrad": "FirstOrder"}, bl.FirstOrder()),
    ],
)
def test_a_trial_chooses_the_hypergradient(params, hypergrad):
    trial = optuna.trial.FixedTrial(params)
    assert suggest_hypergrad(trial, choices=HYPERGRADS) == hypergrad
    assert trial.params == params
    assert solver_from_trial(trial) == hypergrad


def test_a_trial_chooses_the_matrix_and_it_is_put_back():
    net = torch.nn.Linear(2, 1)
    operators = {"gauss-newton": bl.GaussNewton.of(net, torch.nn.functional.mse_loss)}
    params = {"hypergrad": "Implicit", "hypergrad.damped": True, "hypergrad.damping": 0.01, "linear": "CG"}
    params |= {"linear.max_steps": 20, "hypergrad.operator": "gauss-newton"}
    trial = optuna.trial.FixedTrial(params)
    hypergrad = bl.Implicit(bl.CG(max_steps=20), operator=operators["gauss-newton"], damping=0.01)
    assert suggest_hypergrad(trial, operators=operators) == hypergrad
    assert solver_from_trial(trial, operators=operators) == hypergrad
    with pytest.raises(ValueError, match="chose the operator 'gauss-newton', which is a function"):
        solver_from_trial(trial)
    plain = optuna.trial.FixedTrial(params | {"hypergrad.operator": "hessian"})
    assert suggest_hypergrad(plain, operators=operators) == bl.Implicit(bl.CG(max_steps=20), damping=0.01)
    assert solver_from_trial(plain) == bl.Implicit(bl.CG(max_steps=20), damping=0.01)


@pytest.mark.parametrize(
    ("params", "solver"),
    [
        (
            {"inner": "GradientDescent", "inner.max_steps": 9, "inner.lr": 0.5, "inner.momentum": 0.25},
            bl.GradientDescent(0.5, max_steps=9, momentum=0.25),
        ),
        ({"inner": "Adam", "inner.max_steps": 9, "inner.lr": 0.5}, bl.Steps(bl.Adam(0.5), max_steps=9)),
        ({"inner": "LBFGS", "inner.max_steps": 9, "inner.gtol": 1e-3}, bl.LBFGS(max_steps=9, gtol=1e-3)),
        (
            {"inner": "NewtonCG", "inner.max_steps": 9, "inner.gtol": 1e-3, "inner.cg_steps": 4},
            bl.NewtonCG(max_steps=9, gtol=1e-3, cg_steps=4),
        ),
        (
            {"inner": "Anderson", "inner.max_steps": 9, "inner.tol": 1e-3, "inner.damping": 0.75, "inner.history": 4},
            bl.Anderson(history=4, damping=0.75, max_steps=9, tol=1e-3),
        ),
        (
            {"inner": "Picard", "inner.max_steps": 9, "inner.tol": 1e-3, "inner.damping": 0.75},
            bl.Picard(damping=0.75, max_steps=9, tol=1e-3),
        ),
    ],
)
def test_a_trial_chooses_the_inner_solver(params, solver):
    trial = optuna.trial.FixedTrial(params)
    assert suggest_inner_solver(trial, choices=(*INNER_SOLVERS, *FIXED_POINT_SOLVERS)) == solver
    assert trial.params == params
    assert solver_from_trial(trial, "inner") == solver


def test_every_default_choice_gives_a_hypergradient():
    """60 random trials, each of a solver and a method that the defaults allow, run on an exact problem."""
    problem = Ridge()
    truth = problem.hypergradient(problem.hparams)

    def objective(trial):
        x = problem.hparams.clone().requires_grad_()
        solver, hypergrad = suggest_inner_solver(trial), suggest_hypergrad(trial)
        fit = bl.argmin(problem.inner, problem.init, x, solver=solver, hypergrad=hypergrad, throw="ignore")
        (found,) = torch.autograd.grad(problem.outer(fit.value, x), x)
        return ((found - truth).norm() / truth.norm()).item()

    study = create_study("choices", sampler="random")
    study.optimize(guard(objective), n_trials=60)
    for trial in study.trials:
        assert trial.state.name == "COMPLETE"
    assert {trial.params["inner"] for trial in study.trials} == set(INNER_SOLVERS)
    best = study.best_trial
    assert best.value < 1e-2
    settings = {"solver": solver_from_trial(best, "inner"), "hypergrad": solver_from_trial(best)}
    x = problem.hparams.clone().requires_grad_()
    fit = bl.argmin(problem.inner, problem.init, x, **settings, throw="ignore")
    (found,) = torch.autograd.grad(problem.outer(fit.value, x), x)
    assert ((found - truth).norm() / truth.norm()).item() == pytest.approx(best.value, rel=1e-9)


def test_a_trial_without_settings_is_told():
    trial = optuna.trial.FixedTrial({"linear": "CG", "linear.max_steps": 3})
    suggest_linear_solver(trial)
    with pytest.raises(KeyError, match="chose nothing under 'inner': it has linear"):
        solver_from_trial(trial, "inner")
