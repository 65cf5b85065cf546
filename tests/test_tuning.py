from __future__ import annotations

import math

import optuna
import pytest
import torch

import bilevel as bl
from bilevel.linalg.operator import Dense
from bilevel.problems import Ridge
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
    assert bl.tuning.suggest_linear_solver(trial) == solver
    assert trial.params == params
    assert solver.solve(Dense(spd(4)), randn(4)).value.shape == (4,)


def test_unknown_choice():
    with pytest.raises(ValueError, match=r"choices has \['LU'\]"):
        bl.tuning.suggest_linear_solver(optuna.trial.FixedTrial({}), choices=("CG", "LU"))


def test_report_records_and_prunes():
    problem = Ridge()
    fit = bl.argmin(problem.inner, problem.init, problem.hparams.clone().requires_grad_())
    problem.outer(fit.value, problem.hparams).backward()

    def objective(trial):
        bl.tuning.report(trial, 0, torch.tensor(math.nan if trial.number == 1 else 1.0), fit)
        return 1.0

    study = optuna.create_study()
    study.optimize(objective, n_trials=3)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert study.trials[0].intermediate_values == {0: 1.0}
    assert study.trials[1].user_attrs["diverged_at"] == 0
    attributes = study.trials[0].user_attrs
    assert attributes["inner.result"] == attributes["adjoint.result"] == "CONVERGED"
    assert attributes["adjoint.num_steps"] >= 1
    assert attributes["inner.residual_norm"] == fit.stats["residual_norm"].item()
