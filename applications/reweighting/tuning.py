"""What ``python -m applications.reweighting tune`` searches: the hypergradient of the weight net, and its step size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import optuna

import bilevel as bl
from applications.frame import tune
from applications.frame.command import require
from applications.frame.data import load
from applications.frame.device import select_device
from applications.reweighting.knobs import Config, check_model, draw_for, training
from applications.reweighting.weighting import DAMPING, METHODS, Method


def tunable(knobs: Config) -> tune.Tunable:
    """The weight net on the first of the problems; each seed draws training sets of its own.

    Raises:
        UserError: bad data, or ``--methods``, which the study chooses.
    """
    require(knobs.methods == ("unroll",), "The study chooses the hypergradient: leave --methods out.")
    device, examples, problem = select_device(knobs.device), load(knobs.data, knobs.data_root), knobs.problems[0]
    check_model(knobs, examples)
    draw_for(knobs, examples, problem)  # too few examples are told now

    def suggest(trial: optuna.trial.BaseTrial) -> tune.Settings:
        method: Method = trial.suggest_categorical("hypergrad", list(METHODS))  # type: ignore[assignment]
        hypergrad = METHODS[method]
        if isinstance(hypergrad, bl.Implicit):
            steps = trial.suggest_int("linear.max_steps", 1, 20, log=True)
            damping = trial.suggest_float("hypergrad.damping", DAMPING / 100, DAMPING * 100, log=True)
            linear = bl.CG(max_steps=steps) if method == "cg" else bl.Neumann(max_steps=steps)
            hypergrad = bl.Implicit(linear, damping=damping)
        return {"hypergrad": hypergrad, "meta_lr": trial.suggest_float("meta_lr", 1e-4, 1.0, log=True)}

    def train(settings: tune.Settings, seed: int) -> Iterator[Any]:
        own = dataclasses.replace(knobs, seed=seed, steps=tune.UNENDING)
        drawn = draw_for(own, examples, problem).to(device)
        weighted = training(own, examples, problem, drawn, "unroll", settings)

        def accuracy() -> float:
            right = weighted.outputs(drawn.validation).argmax(-1) == drawn.classes[drawn.validation]
            return 100 * float(right.double().mean())

        return tune.follow(weighted, accuracy)

    default = {"hypergrad": "unroll", "meta_lr": knobs.meta_lr}
    score = f"validation accuracy (%), {problem}"
    return tune.Tunable(score, "maximize", default, suggest, train, seconds=8.0, steps=200)
