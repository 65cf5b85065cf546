"""What ``python -m applications.equilibrium tune`` searches: how the equilibrium is found, and its adjoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import optuna
import torch
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.equilibrium.knobs import ADJOINT_STEPS, Config, create_network, parts_of, read
from applications.equilibrium.methods import hidden
from applications.equilibrium.train import Fitting
from applications.frame import tune


def tunable(config: Config) -> tune.Tunable:
    """The implicit method with these knobs; each seed has a split and a start of its own.

    Raises:
        UserError: bad data.
    """
    examples = read(config)

    def suggest(trial: optuna.trial.BaseTrial) -> tune.Settings:
        solver = bl.tuning.suggest_inner_solver(
            trial, choices=bl.tuning.FIXED_POINT_SOLVERS, max_steps=max(500, config.max_iterations)
        )
        linear = bl.tuning.suggest_linear_solver(
            trial, choices=bl.tuning.NONSYMMETRIC_SOLVERS, max_steps=ADJOINT_STEPS, rtol=(1e-6, 0.9)
        )
        if isinstance(linear, bl.Neumann):
            linear = replace(linear, alpha=1.0)  # the map's own iteration: no step size to find
        return {"solver": solver, "hypergrad": bl.Implicit(linear)}

    def train(settings: tune.Settings, seed: int) -> Iterator[Any]:
        network, parts = create_network(config, examples, seed), parts_of(config, examples, seed)
        fitting = Fitting(network, "implicit", parts, replace(config, epochs=tune.UNENDING), seed, settings)

        @torch.no_grad()
        def loss() -> float:
            """At equilibria that the knobs' own settings find: a bad solver must not be judged by itself."""
            x, y = parts.validation
            return float(cross_entropy(network.head(hidden(network, x, "implicit", config).z), y))

        return tune.follow(fitting, loss)

    own = {"max_steps": config.max_iterations, "tol": config.tol, "damping": 1.0, "history": config.history}
    default = tune.chosen(
        inner=("Anderson", own),
        linear=("Neumann", {"max_steps": ADJOINT_STEPS, "rtol": config.adjoint_rtol}),
    )
    return tune.Tunable("validation loss", "minimize", default, suggest, train, seconds=1.5, steps=100)
