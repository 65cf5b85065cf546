"""Optuna studies over solver settings: a trial chooses the solver objects, and hears how they did.

The study stays Optuna's own: `suggest_linear_solver` only names settings, `report` only records and prunes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from .linalg.cg import CG
from .linalg.identity import Identity
from .linalg.minres import MINRES
from .linalg.neumann import Neumann
from .linalg.preconditioners import Jacobi
from .linalg.solve import LinearSolver
from .solution import Solution

if TYPE_CHECKING:
    import optuna

LINEAR_SOLVERS = ("CG", "Jacobi-CG", "Neumann", "MINRES", "Identity")


def suggest_linear_solver(
    trial: optuna.trial.BaseTrial,
    name: str = "linear",
    *,
    choices: tuple[str, ...] = LINEAR_SOLVERS,
    max_steps: int = 64,
) -> LinearSolver:
    """Let a trial choose a linear solver and the settings that this one has.

    Args:
        trial: its parameters are ``linear``, then ``linear.max_steps`` or ``linear.factor`` as the choice needs.
        name: the prefix of those.
        choices: solvers to choose from, of `LINEAR_SOLVERS`.
        max_steps: upper end of the number of steps, searched on a log scale.

    Raises:
        ValueError: an unknown choice.
    """
    unknown = set(choices) - set(LINEAR_SOLVERS)
    if unknown:
        raise ValueError(f"choices has {sorted(unknown)}: it is made of {', '.join(LINEAR_SOLVERS)}.")
    choice = trial.suggest_categorical(name, list(choices))
    if choice == "Identity":
        return Identity(trial.suggest_float(f"{name}.factor", 1e-3, 1e3, log=True))
    steps = trial.suggest_int(f"{name}.max_steps", 1, max_steps, log=True)
    if choice == "Neumann":
        return Neumann(max_steps=steps)
    if choice == "MINRES":
        return MINRES(max_steps=steps)
    return CG(max_steps=steps, preconditioner=Jacobi() if choice == "Jacobi-CG" else None)


def report(trial: optuna.Trial, step: int, loss: Tensor | float, fit: Solution | None = None) -> None:
    """Tell a trial its loss at an outer step; prune it where it is hopeless or not finite.

    Steps, residuals and results of the last solves become user attributes: ``inner.num_steps``,
    ``inner.residual_norm``, ``inner.result`` and the same of ``adjoint``; of T problems, the worst.

    Raises:
        optuna.TrialPruned: the loss is NaN or infinite, or the study's pruner says so.
    """
    import optuna

    value = float(loss)
    for role, solution in (("inner", fit), ("adjoint", fit.adjoint if fit is not None else None)):
        if solution is not None:
            for stat in ("num_steps", "residual_norm"):
                trial.set_user_attr(f"{role}.{stat}", solution.stats[stat].max().item())
            trial.set_user_attr(f"{role}.result", solution.result.name)
    if not math.isfinite(value):
        trial.set_user_attr("diverged_at", step)
        raise optuna.TrialPruned(f"The loss is {value} at step {step}.")
    trial.report(value, step)
    if trial.should_prune():
        raise optuna.TrialPruned(f"Pruned at step {step}.")
