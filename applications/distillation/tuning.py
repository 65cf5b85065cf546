"""What ``python -m applications.distillation tune`` searches: the ConvNet's training on the images, and its adjoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import optuna
import torch
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.distillation.data import read
from applications.distillation.inner import CUT_OFF
from applications.distillation.knobs import Config, build, distillation
from applications.distillation.networks import initial, outputs
from applications.frame import tune
from applications.frame.command import require


def tunable(config: Config) -> tune.Tunable:
    """Images learned for one initialisation of the ConvNet, another with each seed.

    Raises:
        UserError: bad data, or ``--network linear``.
    """
    require(config.network != "linear", "tune is of the ConvNet; the linear classifier is trained to its minimum.")
    parts = read(config.data, config.data_root, config.images_per_class)

    def suggest(trial: optuna.trial.BaseTrial) -> tune.Settings:
        choices = ("LBFGS", "NewtonCG", "GradientDescent", "Adam")
        return {
            "solver": bl.tuning.suggest_inner_solver(trial, choices=choices, max_steps=200),
            "hypergrad": bl.tuning.suggest_hypergrad(trial, rtol=(1e-6, 0.5)),
        }

    def train(settings: tune.Settings, seed: int) -> Iterator[Any]:
        own = replace(config, seed=seed)
        training = distillation(own, build(own, "convnet", parts, settings), parts, fresh=False, steps=tune.UNENDING)
        judge = build(own, "convnet", parts)

        @torch.no_grad()
        def loss() -> float:
            """Loss of a network that the settings in use today train: a bad training must not be judged by itself."""
            start, images = initial(judge.network, seed), training.images.detach()
            fit = judge.train(start, images, training.labels, follow=False)
            x, y = parts.validation
            return float(cross_entropy(outputs(judge.network, fit.value, x), y))

        return tune.follow(training, loss)

    solver, linear = CUT_OFF["solver"], CUT_OFF["hypergrad"].linear_solver
    default = tune.chosen(
        inner=("LBFGS", {"max_steps": solver.max_steps, "gtol": solver.gtol}),
        hypergrad=("Implicit", {"damped": False}),
        linear=("CG", {"max_steps": linear.max_steps, "rtol": linear.rtol}),
    )
    return tune.Tunable("validation loss", "minimize", default, suggest, train, seconds=5.0, steps=20)
