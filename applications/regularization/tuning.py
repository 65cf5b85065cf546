"""What ``python -m applications.regularization tune`` searches: the fit of one problem, and its hypergradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import optuna

import bilevel as bl
from applications.frame import tune
from applications.frame.data import Examples
from applications.regularization import augmentation, features, weights
from applications.regularization.augmentation import Augmented
from applications.regularization.features import Regression
from applications.regularization.knobs import Config
from applications.regularization.parts import read_whole, split_for
from applications.regularization.weights import Network


def tunable(knobs: Config) -> tune.Tunable:
    """The problem of these knobs, features where they say all; each seed has a split and a start of its own.

    The score is the validation loss of a fit by the application's own settings at the hyperparameters reached: a bad
    solver must not win by stopping early.

    Raises:
        UserError: bad data.
    """
    problem = "features" if knobs.problem == "all" else knobs.problem
    examples = read_whole(problem, knobs)
    split_for(problem, examples, knobs, knobs.seed)  # too few examples are told now
    return {"features": penalties, "weights": decays, "augmentation": strengths}[problem](knobs, examples)


def penalties(knobs: Config, examples: Examples) -> tune.Tunable:
    """A penalty for each feature: of all numbers of them, what takes the story most of its time."""

    def suggest(trial: optuna.trial.BaseTrial) -> tune.Settings:
        choices = ("LBFGS", "NewtonCG", "GradientDescent")
        solver = bl.tuning.suggest_inner_solver(trial, choices=choices, max_steps=1000, lr=(0.1, 100.0))
        kinds = ("CG", "Jacobi-CG", "MINRES", "Neumann", "Identity")
        hypergrad = bl.tuning.suggest_hypergrad(trial, linear=kinds, max_steps=300, rtol=(1e-6, 0.5))
        match hypergrad:
            case bl.Implicit(linear_solver=bl.CG(preconditioner=bl.Jacobi()) as linear):
                probes = trial.suggest_int("linear.num_probes", 1, 30, log=True)
                hypergrad = replace(hypergrad, linear_solver=replace(linear, preconditioner=bl.Jacobi(probes)))
        return {"solver": solver, "hypergrad": hypergrad}

    def train(settings: tune.Settings, seed: int) -> Iterable[Any]:
        regression = Regression.of(*split_for("features", examples, knobs, seed))
        count, start, lr = regression.num_features, features.FIRST_LOG_PENALTY, features.PENALTY_LR
        search = regression.search(count, start, tune.UNENDING, lr, settings)
        groups, x = regression.groups(count), search.hparams["log_penalties"]
        return tune.follow(search, lambda: float(regression.fitted(x[groups])["validation_loss"]))

    default = tune.chosen(
        inner=("LBFGS", {"max_steps": 1000, "gtol": 1e-6}),
        hypergrad=("Implicit", {"damped": False}),
        linear=("Jacobi-CG", {"max_steps": 300, "rtol": 1e-2, "num_probes": 3}),
    )
    return tune.Tunable("validation loss", "minimize", default, suggest, train, seconds=3.0, steps=5)


def decays(knobs: Config, examples: Examples) -> tune.Tunable:
    """A decay for each weight."""

    def suggest(trial: optuna.trial.BaseTrial) -> tune.Settings:
        choices = ("GradientDescent", "Adam", "LBFGS")
        solver = bl.tuning.suggest_inner_solver(trial, choices=choices, max_steps=20)
        kinds = ("Neumann", "CG", "MINRES", "Identity")
        hypergrad = bl.tuning.suggest_hypergrad(trial, linear=kinds, max_steps=20)
        match hypergrad:
            case bl.Implicit(linear_solver=bl.Neumann() as linear):
                alpha = trial.suggest_float("linear.alpha", 1e-3, 1.0, log=True)
                hypergrad = replace(hypergrad, linear_solver=replace(linear, alpha=alpha))
        return {"solver": solver, "hypergrad": hypergrad}

    def train(settings: tune.Settings, seed: int) -> Iterable[Any]:
        parts = split_for("weights", examples, knobs, seed)
        training, validation, _, test = (part.tensors() for part in parts)
        network = Network(training, knobs.hidden, examples.num_classes, seed)
        search = network.search("weight", validation, test, tune.UNENDING, settings)

        def loss() -> float:
            fixed = {name: x.detach() for name, x in search.hparams.items()}
            params = network.train_with(fixed, training, knobs.steps or 12)
            return float(network.loss(params, validation))

        return tune.follow(search, loss)

    default = tune.chosen(
        inner=("GradientDescent", {"max_steps": weights.INNER_STEPS, "lr": weights.LR, "momentum": 0.9}),
        hypergrad=("Implicit", {"damped": False}),
        linear=("Neumann", {"max_steps": weights.NEUMANN_STEPS, "alpha": weights.LR}),
    )
    return tune.Tunable("validation loss", "minimize", default, suggest, train, seconds=3.0, steps=8)


def strengths(knobs: Config, examples: Examples) -> tune.Tunable:
    """The four strengths."""

    def suggest(trial: optuna.trial.BaseTrial) -> tune.Settings:
        # On new draws at every outer step a fit is never finished, so that the number of steps is all that ends one.
        inner = trial.suggest_categorical("inner", ["LBFGS", "Adam"])
        steps = trial.suggest_int("inner.max_steps", 1, 50, log=True)
        solver = (
            bl.LBFGS(max_steps=steps)
            if inner == "LBFGS"
            else bl.Steps(bl.Adam(trial.suggest_float("inner.lr", 1e-3, 0.1, log=True)), max_steps=steps)
        )
        return {"solver": solver, "hypergrad": bl.tuning.suggest_hypergrad(trial, max_steps=50)}

    def train(settings: tune.Settings, seed: int) -> Iterable[Any]:
        training, validation, test = augmentation.images(split_for("augmentation", examples, knobs, seed))
        problem = Augmented.of(training, validation, test, examples.num_classes, seed)
        search = problem.search(tune.UNENDING, augmentation.STRENGTH_LR, settings)

        def loss() -> float:
            reached = {name: x.exp().item() for name, x in search.hparams.items()}
            return float(problem.train_with(reached, augmentation.ROUNDS)["validation_loss"])

        return tune.follow(search, loss)

    default = tune.chosen(
        inner=("LBFGS", {"max_steps": 10}),
        hypergrad=("Implicit", {"damped": True, "damping": augmentation.DAMPING}),
        linear=("CG", {"max_steps": 10}),
    )
    return tune.Tunable("validation loss", "minimize", default, suggest, train, seconds=1.5, steps=15)
