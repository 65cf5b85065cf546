import torch

import bilevel as bl

# %% tuning tuning.create_study tuning.guard tuning.report tuning.best_trial tuning.suggest_inner_solver:
# %% tuning.suggest_linear_solver tuning.solver_from_trial tuning.expression tuning.INNER_SOLVERS:
# %% tuning.LINEAR_SOLVERS:
problem = bl.problems.Ridge(per_feature=True)


def objective(trial):
    solver = bl.tuning.suggest_inner_solver(trial, choices=("GradientDescent", "LBFGS"))
    hypergrad = bl.Implicit(bl.tuning.suggest_linear_solver(trial, choices=("CG", "Neumann")))
    x = problem.hparams.clone().requires_grad_()
    outer = torch.optim.Adam([x], lr=0.3)
    for step in range(3):
        fit = bl.argmin(problem.inner, problem.init, x, solver=solver, hypergrad=hypergrad, throw="ignore")
        loss = problem.outer(fit.value, x)
        outer.zero_grad()
        loss.backward()
        outer.step()
        bl.tuning.report(trial, step, loss.detach(), fit)
    return loss.item()


study = bl.tuning.create_study("ridge")
study.optimize(bl.tuning.guard(objective), n_trials=5)
best = bl.tuning.best_trial(study)
print(bl.tuning.expression(bl.tuning.solver_from_trial(best, "inner")))

# %% tuning.suggest_hypergrad tuning.hypergradient_error tuning.limit tuning.within_limits tuning.HYPERGRADS:
problem = bl.problems.Ridge(per_feature=True)


def objective(trial):
    hypergrad = bl.tuning.suggest_hypergrad(trial, choices=("Implicit", "OneStep"))
    error, seconds = bl.tuning.hypergradient_error(trial, problem, bl.LBFGS(), hypergrad, repeats=1)
    bl.tuning.limit(trial, "seconds", seconds, at_most=1.0)
    return error


study = bl.tuning.create_study("errors")
study.optimize(bl.tuning.guard(objective), n_trials=5)
assert any(bl.tuning.within_limits(trial) for trial in study.trials)

# %% tuning.loss_within:
problem = bl.problems.Ridge(per_feature=True)


def train(lr):
    x, step = problem.hparams.clone().requires_grad_(), 0
    outer = torch.optim.Adam([x], lr=lr)
    while True:
        fit = bl.argmin(problem.inner, problem.init, x)
        loss = problem.outer(fit.value, x)
        outer.zero_grad()
        loss.backward()
        outer.step()
        step += 1
        yield step, loss.detach(), fit


study = bl.tuning.create_study("at equal time")
study.optimize(
    lambda trial: bl.tuning.loss_within(trial, train(trial.suggest_float("lr", 1e-2, 1, log=True)), seconds=0.05),
    n_trials=3,
)

# %% tuning.save tuning.load tuning.to_json tuning.from_json:
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "settings.json"
    bl.tuning.save(path, {"solver": bl.LBFGS(gtol=1e-6), "hypergrad": bl.Implicit(bl.CG(max_steps=5))})
    assert bl.tuning.load(path)["hypergrad"] == bl.Implicit(bl.CG(max_steps=5))
assert bl.tuning.from_json(bl.tuning.to_json(bl.CG(rtol=1e-3))) == bl.CG(rtol=1e-3)

# %% tuning.open_storage:
import tempfile

with tempfile.TemporaryDirectory() as folder:
    study = bl.tuning.create_study("kept", f"{folder}/study.log")  # a journal, for many processes
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    storage = bl.tuning.open_storage(f"{folder}/study.log")
    assert [summary.study_name for summary in storage.get_all_studies()] == ["kept"]

# %% tuning.FIXED_POINT_SOLVERS tuning.NONSYMMETRIC_SOLVERS:
import optuna

trial = optuna.trial.FixedTrial({"inner": "Picard", "inner.max_steps": 50, "inner.tol": 1e-4, "inner.damping": 1.0})
solver = bl.tuning.suggest_inner_solver(trial, choices=bl.tuning.FIXED_POINT_SOLVERS)
assert solver == bl.Picard(damping=1.0, max_steps=50, tol=1e-4)
trial = optuna.trial.FixedTrial({"linear": "GMRES", "linear.max_steps": 20})
assert isinstance(bl.tuning.suggest_linear_solver(trial, choices=bl.tuning.NONSYMMETRIC_SOLVERS), bl.GMRES)

# %% sklearn sklearn.BilevelSearchCV sklearn.Evaluation:
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge

X, y = load_diabetes(return_X_y=True)
search = bl.sklearn.BilevelSearchCV(Ridge(), {"alpha": (1e-4, 1e4)}, cv=5).fit(X, y)
print(search.best_params_, search.best_score_)
assert search.n_evaluations_ < 30

# %% sklearn.FeatureRidge sklearn.FeatureLogistic sklearn.FeatureKernelRidge:
from sklearn.datasets import load_diabetes

X, y = load_diabetes(return_X_y=True)
model = bl.sklearn.FeatureRidge(alphas=1.0)  # a penalty for each feature
search = bl.sklearn.BilevelSearchCV(model, {"alphas": (1e-4, 1e4)}, cv=5).fit(X, y)
assert search.best_params_["alphas"].shape == (10,)

# %% tuning.of_a_trial tuning.sweep:
assert bl.tuning.of_a_trial(torch.linalg.LinAlgError("singular"))  # what a trial may meet prunes it
assert not bl.tuning.of_a_trial(ZeroDivisionError())  # a mistake of the program ends the study
assert bl.tuning.sweep(bl.tuning.create_study("quiet")) == 0  # trials whose process is gone
