"""What ``python -m applications.data_cleaning tune`` searches: the fit, and the solve for its hypergradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import optuna

import bilevel as bl
from applications.data_cleaning.cleaning import Cleaning
from applications.data_cleaning.knobs import Config
from applications.data_cleaning.model import Model
from applications.data_cleaning.task import make_task
from applications.frame import tune
from applications.frame.command import require
from applications.frame.data import load


def tunable(knobs: Config) -> tune.Tunable:
    """Hyper-cleaning with these knobs; each seed has a split, wrong labels and a start of its own.

    Raises:
        UserError: bad data, or ``--setting stochastic``, which tunes each method by itself.
    """
    require(knobs.setting == "cleaning", "tune is of --setting cleaning; the other one tunes its methods itself.")
    examples = load(knobs.data, knobs.data_root)
    make_task(examples, knobs.num_train, knobs.num_val, knobs.noise, knobs.seed)  # too few examples are told now

    def suggest(trial: optuna.trial.BaseTrial) -> tune.Settings:
        choices = ("LBFGS", "NewtonCG", "GradientDescent")
        return {
            "solver": bl.tuning.suggest_inner_solver(trial, choices=choices, max_steps=500, lr=(0.01, 10.0)),
            "hypergrad": bl.tuning.suggest_hypergrad(trial, rtol=(1e-6, 0.5)),
        }

    def train(settings: tune.Settings, seed: int) -> Iterator[Any]:
        task = make_task(examples, knobs.num_train, knobs.num_val, knobs.noise, seed)
        model = Model.make(knobs.model, task, knobs.hidden, knobs.ridge, seed)
        cleaning = Cleaning(model, task, tune.UNENDING, knobs.lr, settings)

        def loss() -> float:
            """Loss of a fit by the application's own solver: a bad one must not win by stopping early."""
            params = model.fit(task.train, cleaning.weights.detach())
            return float(cleaning.val_loss(params))

        return tune.follow(cleaning, loss)

    default = tune.chosen(
        inner=("LBFGS", {"max_steps": 500, "gtol": 1e-3}),
        hypergrad=("Implicit", {"damped": False}),
        linear=("CG", {"max_steps": 40, "rtol": 1e-2}),
    )
    return tune.Tunable("validation loss", "minimize", default, suggest, train, seconds=1.0, steps=20)
