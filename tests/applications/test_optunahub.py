"""The benchmark package for OptunaHub: loaded as the hub loads it, deterministic, and judged by the closed form."""

from __future__ import annotations

import re
from pathlib import Path

import optuna
import pytest
import torch
import yaml

import bilevel as bl

optunahub = pytest.importorskip("optunahub")
REGISTRY = Path(__file__).parents[2] / "applications" / "optunahub" / "package"
PACKAGE = "benchmarks/bilevel_solver_settings"


@pytest.fixture(scope="module")
def module():
    return optunahub.load_local_module(PACKAGE, registry_root=str(REGISTRY))


def test_a_study_of_twenty_trials(module):
    problem = module.Problem()
    study = bl.tuning.create_study("hub", direction=[d.name.lower() for d in problem.directions])
    study.optimize(problem, n_trials=20)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 20
    assert study.best_value < -4  # the tolerances of the space reach more digits than that
    assert all(-16 <= trial.value <= 3 for trial in study.trials)
    best = study.best_trial
    assert problem.evaluate(best.params) == best.value  # the same again


@pytest.mark.parametrize("name", ["ridge", "quadratic", "kernel ridge"])
def test_the_error_is_that_against_the_closed_form(module, name):
    params = {"inner": "GradientDescent", "inner.max_steps": 5, "inner.lr": 0.01, "inner.momentum": 0.0}
    params |= {"linear": "CG", "linear.max_steps": 3}
    problem = module.Problem(name, metrics=("log10_error", "cost"))
    error, cost = problem.evaluate(params)
    known = problem._problem
    x = known.hparams.clone().requires_grad_()
    solver, hypergrad = bl.GradientDescent(0.01, max_steps=5), bl.Implicit(bl.CG(max_steps=3))
    fit = bl.argmin(known.inner, known.init, x, solver=solver, hypergrad=hypergrad, throw="ignore")
    (found,) = torch.autograd.grad(known.outer(fit.value, x).sum(), x)
    truth = known.hypergradient(x)
    assert 10**error == pytest.approx(float((found - truth).norm() / truth.norm()), rel=1e-6)
    assert 5 + 2 * 3 <= cost <= 12 + 2 * 4


def test_two_objectives_and_a_limit(module):
    problem = module.Problem(metrics=("log10_error", "cost"), max_cost=60)
    study = optuna.create_study(directions=problem.directions, sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(problem, n_trials=20)
    assert all(bl.tuning.within_limits(trial) == (trial.user_attrs["cost"] <= 60) for trial in study.trials)
    _, costs = zip(*sorted(trial.values for trial in study.best_trials), strict=True)
    assert list(costs) == sorted(costs, reverse=True)  # what is more accurate costs more


def test_a_diverging_solve_has_the_worst_value(module):
    params = {"inner": "GradientDescent", "inner.max_steps": 100, "inner.lr": 1.0, "inner.momentum": 0.9}
    params |= {"linear": "Neumann", "linear.max_steps": 64}
    assert module.Problem("quadratic").evaluate(params) == 3.0


@pytest.mark.parametrize("settings", [{"name": "none"}, {"metrics": ("speed",)}, {"metrics": ()}, {"max_cost": 0}])
def test_bad_settings_are_refused(module, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        module.Problem(**settings)


def test_the_layout_is_the_one_that_the_hub_asks_for(monkeypatch):
    folder = REGISTRY / PACKAGE
    readme = (folder / "README.md").read_text()
    matter = yaml.safe_load(readme.split("---")[1])
    assert set(matter) == {"author", "title", "description", "tags", "optuna_versions", "license"}
    assert "benchmark" in matter["tags"]
    assert matter["license"] == "MIT License"
    assert (folder / "LICENSE").read_text().startswith("MIT License")
    titles = re.findall(r"^## (.+)$", readme, re.MULTILINE)
    assert titles == ["Abstract", "APIs", "Installation", "Example", "Others"]
    monkeypatch.setattr(
        optunahub, "load_module", lambda package: optunahub.load_local_module(package, registry_root=str(REGISTRY))
    )
    (example,) = re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    exec(compile(example, "README.md", "exec", dont_inherit=True), {})
