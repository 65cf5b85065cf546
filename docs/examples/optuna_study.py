"""
A study over solver settings
============================

You will let Optuna choose the inner solver and the linear solver of a hypergradient, and see what speed costs in
accuracy. The problem has a closed form, so the error of every trial is the true one.
"""

# %%
# An ill-conditioned quadratic problem: short solves are cheap and wrong.
import matplotlib.pyplot as plt
import optuna

import bilevel as bl

optuna.logging.set_verbosity(optuna.logging.WARNING)
problem = bl.problems.Quadratics(conditions=(300.0,))


# %%
# A trial chooses objects. `hypergradient_error` solves the problem with them and returns two numbers, the relative
# error and the seconds; `guard` ends a trial that diverges as pruned and goes on with the study.
def objective(trial):
    solver = bl.tuning.suggest_inner_solver(trial, choices=("GradientDescent", "LBFGS", "NewtonCG"))
    linear = bl.tuning.suggest_linear_solver(trial, choices=("CG", "MINRES", "Neumann"), max_steps=100)
    return bl.tuning.hypergradient_error(trial, problem, solver, bl.Implicit(linear), repeats=1)


# The settings that you would take without a study are its first trial.
default = {"inner": "NewtonCG", "inner.max_steps": 50, "inner.gtol": 1e-6, "inner.cg_steps": 50}
default |= {"linear": "CG", "linear.max_steps": 100}
study = bl.tuning.create_study("error and seconds", direction=["minimize", "minimize"], defaults=default)
study.optimize(bl.tuning.guard(objective), n_trials=60)

# %%
# The front: trials of which none is better in both. The settings of each are a line of Python to paste.
front = sorted(study.best_trials, key=lambda trial: trial.values[0])
for trial in front[:: max(1, len(front) // 4)]:
    settings = [bl.tuning.expression(bl.tuning.solver_from_trial(trial, name)) for name in ("inner", "linear")]
    print(f"error {trial.values[0]:.0e}, {1e3 * trial.values[1]:.1f} ms:  {'  '.join(settings)}")
assert front[0].values[0] < 1e-3
assert front[-1].values[1] <= study.trials[0].values[1]  # and none of the front is worse than the default in both

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
complete = [trial for trial in study.trials if trial.values]
for kind, marker in (("GradientDescent", "o"), ("LBFGS", "s"), ("NewtonCG", "^")):
    own = [trial for trial in complete if trial.params["inner"] == kind]
    axes.plot([1e3 * t.values[1] for t in own], [t.values[0] for t in own], marker, label=kind, alpha=0.7)
axes.step([1e3 * t.values[1] for t in front], [t.values[0] for t in front], color="tab:gray", where="pre", zorder=0)
axes.set(xlabel="milliseconds", ylabel="relative error of the hypergradient", xscale="log", yscale="log")
axes.set_ylim(1e-9, 1e2)  # gradient descent that diverged is above
axes.legend()
plt.show()
