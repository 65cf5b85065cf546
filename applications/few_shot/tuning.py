"""What `python -m applications.few_shot tune` searches: adaptation, its hypergradient, and lambda."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import optuna

import bilevel as bl
from applications.few_shot.config import Config
from applications.few_shot.train import Session, validation
from applications.few_shot.trained import start_of
from applications.frame.command import require
from applications.frame.tune import UNENDING, Settings, Tunable, chosen

LINEAR = ("CG", "MINRES", "Neumann", "Nystrom", "Identity")
VALIDATION_TASKS = 60


def tunable(config: Config) -> Tunable:
    """Implicit MAML with these knobs; what the search does not choose stays as they say.

    Raises:
        UserError: another method, or an outer step size that follows the number of steps.
    """
    require(config.method == "imaml", f"tune searches the solvers of --method imaml, not of {config.method}.")
    config, start = replace(config, schedule="constant", steps=UNENDING), start_of(config)

    def suggest(trial: optuna.trial.BaseTrial) -> Settings:
        # Newton's steps cost tens of gradients, so that a trial of equal seconds would make a handful of meta-steps.
        solver = bl.tuning.suggest_inner_solver(trial, choices=("GradientDescent",), max_steps=16, lr=(0.01, 2.0))
        solver = replace(solver, safeguard=config.safeguard)  # type: ignore[type-var]
        hypergrad = bl.tuning.suggest_hypergrad(trial, choices=("Implicit",), linear=LINEAR, max_steps=8)
        assert isinstance(hypergrad, bl.Implicit)
        return {
            "solver": solver,
            "hypergrad": replace(hypergrad, operator=config.hessian),
            "strength": trial.suggest_float("strength", 0.05, 20.0, log=True),
        }

    def train(settings: Settings, seed: int) -> Iterator[tuple[int, Callable[[], float], bl.Solution | None]]:
        # Now: reading data is not training.
        session = Session.create(replace(config, seed=seed), settings, start.put_into if start else None)

        def accuracy() -> float:
            return float(validation(session, VALIDATION_TASKS)["validation_accuracy"])

        return ((row["step"], accuracy, session.solution) for row in session.rows())

    own = {"max_steps": config.inner_steps, "lr": config.inner_lr, "momentum": config.inner_momentum}
    default = chosen(
        inner=("GradientDescent", own),
        hypergrad=("Implicit", {"damped": False}),
        linear=("CG", {"max_steps": max(1, config.cg_steps)}),
    )
    default["strength"] = config.strength
    return Tunable("validation accuracy (%)", "maximize", default, suggest, train, seconds=8.0, steps=20)
