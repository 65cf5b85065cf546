"""What ``applications.learned_optimizer_settings tune`` searches: the hypergradient, and Adam's learning rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import optuna

import bilevel as bl
from applications.frame import tune
from applications.learned_optimizer_settings import baselines
from applications.learned_optimizer_settings.knobs import Config
from applications.learned_optimizer_settings.learn import EXACT, Learning, Method
from applications.learned_optimizer_settings.networks import Data, Networks
from applications.learned_optimizer_settings.settings import Settings


def tunable(knobs: Config) -> tune.Tunable:
    """Learning with these knobs; each seed has a split, starts and mini-batches of its own.

    A training ends by itself after ``--outer-steps``, where Adam's learning rate has fallen to 0; a method that is too
    slow for its time is judged by where it stands then.

    Raises:
        UserError: bad data.
    """
    Data.read(knobs.data, knobs.data_root, knobs.seed)  # bad data is told now

    def suggest(trial: optuna.trial.BaseTrial) -> tune.Settings:
        choice = trial.suggest_categorical("hypergrad", [*EXACT, "truncated"])
        hypergrad: Method
        if choice == "truncated":
            hypergrad = bl.Truncated(trial.suggest_int("hypergrad.last", 1, knobs.steps - 1, log=True))
        else:
            hypergrad = EXACT[choice]
        low, high = min(LOWEST, knobs.outer_lr), max(HIGHEST, knobs.outer_lr)
        return {"hypergrad": hypergrad, "outer_lr": trial.suggest_float("outer_lr", low, high, log=True)}

    def train(settings: tune.Settings, seed: int) -> Iterator[Any]:
        data = Data.read(knobs.data, knobs.data_root, seed)
        networks = Networks(data, knobs.networks, knobs.hidden, knobs.batch)
        learned = Settings.constant(knobs.start_lr, knobs.start_momentum, knobs.points)
        lr, hypergrad = settings["outer_lr"], settings["hypergrad"]
        learning = Learning(networks, learned, knobs.steps, knobs.outer_steps, lr, seed, hypergrad)

        def loss() -> float:
            """Loss of whole runs of fresh networks, however far the hypergradient saw: a short horizon must not win."""
            fresh = replace(networks, count=knobs.fresh)
            return baselines.loss_of(fresh, *learned.numbers(knobs.steps), seed)

        return tune.follow(learning, loss)

    default = {"hypergrad": knobs.hypergrad, "outer_lr": knobs.outer_lr}
    steps = min(10, knobs.outer_steps)
    return tune.Tunable("validation loss", "minimize", default, suggest, train, seconds=12.0, steps=steps, trials=20)


LOWEST, HIGHEST = 0.02, 1.0
"""Ends of Adam's learning rate; the settings are logarithms, and 1 is a factor of e in one step."""
