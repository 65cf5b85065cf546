"""What ``python -m applications.domain_weights tune`` searches: the hypergradient and the step size of the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import optuna
import torch

import bilevel as bl
from applications.domain_weights.knobs import Config, training
from applications.domain_weights.learning import METHODS
from applications.frame import tune
from applications.frame.command import require


def tunable(knobs: Config) -> tune.Tunable:
    """The weights, learned along with one training; judged by the loss of its transformer on the validation text.

    Raises:
        UserError: bad texts, or ``--methods``, which the study chooses.
    """
    require(knobs.methods == Config.methods, "The study chooses the hypergradient: leave --methods out.")
    knobs.read()  # bad texts are told now

    def suggest(trial: optuna.trial.BaseTrial) -> tune.Settings:
        method = trial.suggest_categorical("hypergrad", list(METHODS))
        hypergrad: Any = METHODS[method]  # type: ignore[index]
        if isinstance(hypergrad, bl.Implicit):
            steps = trial.suggest_int("linear.max_steps", 1, 20, log=True)
            damping = trial.suggest_float("hypergrad.damping", 1e-4, 1.0, log=True)
            hypergrad = bl.Implicit(bl.CG(max_steps=steps), damping=damping)
        elif isinstance(hypergrad, bl.Penalty):
            strength = trial.suggest_float("hypergrad.strength", 1.0, 1e3, log=True)
            hypergrad = bl.Penalty(strength, symmetric=False)
        return {"hypergrad": hypergrad, "outer_lr": trial.suggest_float("outer_lr", 0.01, 1.0, log=True)}

    def train(settings: tune.Settings, seed: int) -> Iterator[Any]:
        own = dataclasses.replace(knobs, seed=seed)
        corpus = own.read()
        scores = torch.zeros(len(corpus.domains))
        begun = training(
            own, corpus, tune.UNENDING, scores, settings["hypergrad"], outer_lr=settings["outer_lr"], warm_up=0
        )
        return tune.follow(begun, lambda: begun.loss_on(corpus.validation))

    default = {
        "hypergrad": "implicit",
        "linear.max_steps": 10,
        "hypergrad.damping": 1e-2,
        "outer_lr": Config.outer_lr,
    }
    return tune.Tunable("loss on the validation text", "minimize", default, suggest, train, seconds=20.0, steps=200)
