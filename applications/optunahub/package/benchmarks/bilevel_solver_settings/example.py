from __future__ import annotations

import optuna
import optunahub

problem = optunahub.load_module("benchmarks/bilevel_solver_settings").Problem(metrics=("log10_error", "cost"))
study = optuna.create_study(directions=problem.directions)
study.optimize(problem, n_trials=50)
for trial in study.best_trials:
    print(trial.values, trial.params)
