"""What does not fit what is asked for now: misspelt defaults, other choices and ranges on resuming."""

from __future__ import annotations

import warnings

import optuna
import pytest

import bilevel as bl
from bilevel import tuning
from bilevel.tuning.resumed import refuse_unused

optuna.logging.set_verbosity(optuna.logging.ERROR)


def linear(trial, **settings):
    tuning.suggest_linear_solver(trial, **settings)
    return 1.0


def everything(trial):
    trial.suggest_float("outer_lr", 1e-3, 1.0, log=True)
    tuning.suggest_inner_solver(trial)
    tuning.suggest_hypergrad(trial)
    return 1.0


@pytest.mark.parametrize("wrap", [tuning.guard, lambda objective: objective], ids=["guard", "alone"])
@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"linear": "CG", "linear.max_step": 5}, r"'linear.max_step' \(did you mean 'linear.max_steps'\?\), but never"),
        ({"linear": "cg"}, r"'linear' = 'cg': the choices are CG"),
        ({"linear": "NystromCG"}, r"did you mean 'Nystrom-CG'\?"),
    ],
)
def test_a_misspelt_default_is_refused(wrap, defaults, message):
    study = tuning.create_study("a", sampler="random", defaults=defaults)
    with pytest.raises(ValueError, match=message):
        study.optimize(wrap(linear), n_trials=1)


def test_a_default_of_another_choice_is_refused_by_the_guard():
    study = tuning.create_study("a", sampler="random", defaults={"linear": "CG", "linear.rank": 5})
    with pytest.raises(ValueError, match=r"'linear.rank', but never asks for it: misspelt, or of another choice"):
        study.optimize(tuning.guard(linear), n_trials=1)


def test_a_program_may_ask_for_more_under_the_same_name_later():
    def objective(trial):
        tuning.suggest_linear_solver(trial, choices=("CG",))
        return float(trial.suggest_int("linear.num_probes", 1, 30))

    study = tuning.create_study("a", sampler="random", defaults={"linear": "CG", "linear.num_probes": 7})
    study.optimize(tuning.guard(objective), n_trials=1)
    assert study.trials[0].value == 7


@pytest.mark.parametrize("misspelt", ["outerlr", "inner.lrs", "hypergrad.strenght", "Linear", "lr"])
def test_any_parameter_of_a_program_is_looked_at(misspelt):
    study = tuning.create_study("a", sampler="random", defaults={misspelt: 0.5})
    with pytest.raises(ValueError, match=f"given '{misspelt}'"):
        study.optimize(tuning.guard(everything), n_trials=1)


def test_a_default_is_corrected_and_the_study_goes_on(tmp_path):
    address = f"sqlite:///{tmp_path / 'study.db'}"
    with pytest.raises(ValueError, match="did you mean"):
        tuning.create_study("a", address, defaults={"linear": "CG", "linear.max_step": 5}).optimize(
            tuning.guard(linear), n_trials=1
        )
    study = tuning.create_study("a", address, defaults={"linear": "CG", "linear.max_steps": 5})
    study.optimize(tuning.guard(linear), n_trials=1)
    assert study.trials[-1].params == {"linear": "CG", "linear.max_steps": 5}
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]


def test_a_default_that_leaves_something_out_is_no_mistake():
    study = tuning.create_study("a", sampler="random", defaults={"linear": "CG"})
    study.optimize(tuning.guard(linear), n_trials=2)
    assert study.trials[0].params["linear"] == "CG"


def test_a_default_that_is_pruned_before_it_asked_for_everything_is_no_mistake():
    def objective(trial):
        trial.suggest_float("x", 0, 1)
        raise optuna.TrialPruned

    study = tuning.create_study("a", defaults={"x": 0.5, "later": 1.0})
    study.optimize(tuning.guard(objective), n_trials=1)
    assert study.trials[0].state.name == "PRUNED"


def test_a_trial_of_no_study_has_no_defaults():
    trial = optuna.trial.FixedTrial({"linear": "CG", "linear.max_steps": 5, "more": 1})
    assert tuning.suggest_linear_solver(trial) == bl.CG(max_steps=5)
    refuse_unused(trial)


def addresses(folder):
    return [f"sqlite:///{folder / 'study.db'}", str(folder / "study.log")]


@pytest.mark.parametrize("kind", [0, 1], ids=["sqlite", "journal"])
@pytest.mark.parametrize("choices", [("CG", "Neumann"), ("CG", "MINRES", "Neumann"), ("MINRES", "CG")])
def test_other_choices_on_resuming_are_told(tmp_path, kind, choices):
    address = addresses(tmp_path)[kind]
    tuning.create_study("mine", address, sampler="random").optimize(
        tuning.guard(lambda trial: linear(trial, choices=("CG", "MINRES"))), n_trials=2
    )
    study = tuning.create_study("mine", address, sampler="random")
    with pytest.raises(ValueError, match=r"'mine' was begun with the choices CG, MINRES for 'linear'.*another name"):
        study.optimize(tuning.guard(lambda trial: linear(trial, choices=choices)), n_trials=1)
    study.optimize(tuning.guard(lambda trial: linear(trial, choices=("CG", "MINRES"))), n_trials=1)
    assert study.trials[-1].state.name == "COMPLETE"


@pytest.mark.parametrize("kind", [0, 1], ids=["sqlite", "journal"])
def test_other_ranges_on_resuming_are_told_once(tmp_path, kind):
    address, choices = addresses(tmp_path)[kind], ("CG",)
    for limit in (64, 64, 8):
        study = tuning.create_study("mine", address, sampler="random")
        objective = tuning.guard(lambda trial, limit=limit: linear(trial, choices=choices, max_steps=limit))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            study.optimize(objective, n_trials=3)
        told = [str(warning.message) for warning in seen if "was begun with" in str(warning.message)]
        assert len(told) == (limit == 8)
    assert "high=64" in told[0].split("this run has")[0]
    assert "'linear.max_steps'" in told[0]


def test_two_hypergradients_share_nothing():
    seen = []

    def objective(trial):
        first, second = (
            tuning.suggest_hypergrad(trial),
            tuning.suggest_hypergrad(trial, "second", choices=("Implicit",)),
        )
        seen.append((first, second))
        assert tuning.solver_from_trial(trial) == first
        assert tuning.solver_from_trial(trial, "second") == second
        assert tuning.solver_from_trial(trial, "second.linear") == second.linear_solver
        return 1.0

    defaults = {"hypergrad": "Implicit", "hypergrad.damped": False, "linear": "CG", "linear.max_steps": 3}
    defaults |= {"second": "Implicit", "second.damped": False, "second.linear": "MINRES", "second.linear.max_steps": 7}
    study = tuning.create_study("two", sampler="random", defaults=defaults)
    study.optimize(tuning.guard(objective), n_trials=12)
    assert seen[0] == (bl.Implicit(bl.CG(max_steps=3)), bl.Implicit(bl.MINRES(max_steps=7)))
    both = [(first.linear_solver, second.linear_solver) for first, second in seen if isinstance(first, bl.Implicit)]
    assert any(type(first) is not type(second) for first, second in both[1:])
    assert study.trials[0].params == defaults
