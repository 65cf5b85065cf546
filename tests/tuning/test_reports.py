from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys

import optuna
import pytest
import torch

import bilevel as bl
from bilevel.problems import Quadratics, Ridge
from bilevel.tuning import (
    create_study,
    guard,
    hypergradient_error,
    loss_within,
    report,
    solver_from_trial,
    suggest_linear_solver,
)

optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_report_records_and_prunes():
    problem = Ridge()
    fit = bl.argmin(problem.inner, problem.init, problem.hparams.clone().requires_grad_())
    problem.outer(fit.value, problem.hparams).backward()

    def objective(trial):
        report(trial, 0, torch.tensor(math.nan if trial.number == 1 else 1.0), fit, error=1e-3)
        if trial.number == 3:
            report(trial, 1, 1e9, worst=1e6)
        return 1.0

    study = optuna.create_study()
    study.optimize(objective, n_trials=4)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE", "PRUNED"]
    assert study.trials[0].intermediate_values == {0: 1.0}
    assert study.trials[1].user_attrs["diverged_at"] == 0
    assert study.trials[3].user_attrs["diverged_at"] == 1
    attributes = study.trials[0].user_attrs
    assert attributes["inner.result"] == attributes["adjoint.result"] == "CONVERGED"
    assert attributes["adjoint.num_steps"] >= 1
    assert attributes["inner.residual_norm"] == fit.stats["residual_norm"].item()
    assert attributes["adjoint.relative_residual"] == fit.adjoint.stats["relative_residual"].item()
    assert attributes["hypergradient.error"] == 1e-3


def test_reports_of_several_objectives_end_only_what_diverged():
    def objective(trial):
        report(trial, 0, math.inf if trial.number else 1.0)
        return 1.0, 2.0

    study = create_study("two", direction=["minimize", "minimize"])
    study.optimize(guard(objective), n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]


class Clock:
    """Each look at it takes an eighth of a second."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.125
        return self.now


def test_the_loss_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr("bilevel.tuning.reports.time", Clock())
    study = create_study("time")
    study.optimize(
        lambda trial: loss_within(trial, ((k, 1 / (k + 1), None) for k in itertools.count()), 1.0, points=4), n_trials=1
    )
    (trial,) = study.trials
    assert trial.user_attrs["steps"] == 8  # the numbers begin at 0
    assert trial.value == 1 / 8
    assert list(trial.intermediate_values) == [1, 2, 3, 4]
    assert trial.intermediate_values[4] == 1 / 8


def test_the_first_step_of_a_process_is_not_charged_what_libraries_take_to_load(tmp_path):
    """In a process of its own: the default comes first, and would pay for all of PyTorch's start."""
    program = tmp_path / "study.py"
    program.write_text(
        "import itertools, time, bilevel as bl\n"
        "def run(trial):\n"
        "    for k in itertools.count():\n"
        "        time.sleep(0.6 if trial.number == k == 0 else 0.02)\n"
        "        yield k, 1.0, None\n"
        "study = bl.tuning.create_study('first')\n"
        "study.optimize(lambda trial: bl.tuning.loss_within(trial, run(trial), 0.3), n_trials=2)\n"
        "print([trial.user_attrs['steps'] for trial in study.trials])\n"
        "print(study.trials[0].user_attrs['seconds'])\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    steps, seconds = done.stdout.splitlines()
    first, second = json.loads(steps)
    assert min(first, second) > 2
    assert float(seconds) < 0.6


def test_a_run_that_diverges_between_reports_is_pruned_at_once():
    seen = []

    def records():
        for k in itertools.count():
            seen.append(k)
            yield k, math.nan if k == 3 else 1.0, None

    study = create_study("diverging")
    study.optimize(lambda trial: loss_within(trial, records(), 1e6), n_trials=1)
    assert study.trials[0].state.name == "PRUNED"
    assert seen == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="records is empty"):
        study.optimize(lambda trial: loss_within(trial, [], 1.0), n_trials=1)


@pytest.mark.parametrize("first", [0, 1, 100])
def test_steps_are_those_that_were_made_whatever_their_numbers(first):
    """Also of a trial that is pruned, that fails, and of a run that ends by itself."""

    def failing():
        yield from ((first + k, 1.0, None) for k in range(3))
        raise bl.SolveError("no", bl.Solution(None, {}))

    runs = [
        ((first + k, math.nan if k == 3 else 1.0, None) for k in itertools.count()),
        failing(),
        ((first + k, 1.0, None) for k in range(5)),
    ]
    study = create_study("counting")
    study.optimize(guard(lambda trial: loss_within(trial, runs[trial.number], 1e6)), n_trials=3)
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "PRUNED", "COMPLETE"]
    assert [trial.user_attrs["steps"] for trial in study.trials] == [4, 3, 5]
    assert all(trial.user_attrs["seconds"] > 0 for trial in study.trials)


def test_error_against_seconds_has_a_front_from_rough_to_exact():
    problem = Quadratics(conditions=(100.0,))

    def objective(trial):
        hypergrad = bl.Implicit(suggest_linear_solver(trial, choices=("CG",)))
        return hypergradient_error(trial, problem, bl.NewtonCG(gtol=1e-10), hypergrad, repeats=1)

    study = create_study("front", direction=["minimize", "minimize"], sampler="random")
    for steps in (1, 64):
        study.enqueue_trial({"linear": "CG", "linear.max_steps": steps})
    study.optimize(guard(objective), n_trials=8)
    one, many = study.trials[:2]
    assert one.values[0] > 1e-2
    assert many.values[0] < 1e-8
    assert one.user_attrs["products"] < many.user_attrs["products"]
    assert many in study.best_trials
    assert solver_from_trial(many, "linear") == bl.CG(max_steps=64)


def test_a_method_that_refuses_is_pruned():
    problem = Ridge()
    study = create_study("refused", direction=["minimize", "minimize"])
    study.optimize(guard(lambda t: hypergradient_error(t, problem, bl.LBFGS(), bl.Unroll())), n_trials=1)
    assert study.trials[0].state.name == "PRUNED"


def test_validations_are_off_the_clock_and_made_at_the_points_only(monkeypatch):
    clock, asked = Clock(), []
    monkeypatch.setattr("bilevel.tuning.reports.time", clock)

    def validation(k):
        def measure():
            clock.now += 100.0
            asked.append(k)
            return 1 / (k + 1)

        return measure

    study = create_study("validated")
    study.optimize(
        lambda t: loss_within(t, ((k, validation(k), None) for k in itertools.count()), 1.0, points=2), n_trials=1
    )
    (trial,) = study.trials
    assert asked == [3, 7]
    assert trial.value == 1 / 8
    assert trial.user_attrs["seconds"] == 1.0


def test_a_run_that_ends_before_its_time_returns_its_last_loss():
    study = create_study("short")
    study.optimize(lambda trial: loss_within(trial, [(1, 3.0, None), (2, lambda: 2.0, None)], 1e6), n_trials=1)
    assert study.trials[0].value == 2.0
    assert study.trials[0].user_attrs["steps"] == 2


def test_what_a_run_that_ended_early_has_reached_stands_for_the_rest_of_its_time():
    """Six finish at once with a low loss; a slow one is pruned beside them, and a bad one that has ended is not."""

    def objective(trial):
        if trial.number == 6:
            return loss_within(trial, ((k, 2.0, None) for k in itertools.count()), 0.02, points=4)
        return loss_within(trial, [(1, 3.0 if trial.number == 7 else 1.0 + trial.number / 10, None)], 1e6, points=4)

    study = create_study("ended")
    study.optimize(objective, n_trials=8)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 6 + ["PRUNED", "COMPLETE"]
    assert study.trials[0].intermediate_values == dict.fromkeys([1, 2, 3, 4], 1.0)
    assert study.trials[7].value == 3.0

    study.optimize(lambda trial: loss_within(trial, [(1, lambda: math.nan, None)], 1e6), n_trials=1)
    assert study.trials[8].state.name == "PRUNED"


@pytest.mark.parametrize("settings", [{"seconds": 0}, {"seconds": math.nan}, {"seconds": -1}, {"points": 0}])
def test_budgets_of_nothing_are_refused(settings):
    name = next(iter(settings))
    trial = optuna.trial.FixedTrial({})
    with pytest.raises(ValueError, match=f"{name} is "):
        bl.tuning.loss_within(trial, iter([(0, 1.0, None)]), **{"seconds": 1.0, **settings})


def test_a_limit_takes_a_tensor(tmp_path):
    study = bl.tuning.create_study("s", f"sqlite:///{tmp_path / 's.db'}")

    def objective(trial):
        bl.tuning.limit(trial, "seconds", torch.tensor(2.0), torch.tensor(4.0))
        return 1.0

    study.optimize(objective, n_trials=1)
    assert study.trials[0].user_attrs["seconds"] == 2.0
    assert study.trials[0].constraints["seconds"] == -0.5


def test_several_objectives_have_no_best_trial():
    study = bl.tuning.create_study("s", direction=["minimize", "minimize"])
    study.optimize(lambda trial: (1.0, 2.0), n_trials=1)
    with pytest.raises(ValueError, match="has 2 objectives, and no best trial"):
        bl.tuning.best_trial(study)


def test_a_second_limit_of_one_name_is_refused():
    """Optuna would keep the first."""
    study = bl.tuning.create_study("s")
    trial = study.ask()
    bl.tuning.limit(trial, "seconds", 2.0, 4.0)
    bl.tuning.limit(trial, "peak_mib", 2.0, 4.0)
    with pytest.raises(ValueError, match="The limit 'seconds' is set already"):
        bl.tuning.limit(trial, "seconds", 8.0, 4.0)
    assert trial.user_attrs["seconds"] == 2.0
    study.tell(trial, 1.0)
