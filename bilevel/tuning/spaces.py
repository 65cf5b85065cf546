"""Search spaces: a trial chooses an inner solver, a linear solver, a hypergradient method, and what each of them needs.

Names are conditional: ``linear`` is the choice, ``linear.max_steps`` a setting of some choices. Each function keeps its
choice with the trial, so that `solver_from_trial` makes an equal object without the search space.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from ..hypergrad.finite_difference import FiniteDifference
from ..hypergrad.first_order import FirstOrder
from ..hypergrad.implicit import Implicit, OperatorFactory
from ..hypergrad.one_step import OneStep
from ..hypergrad.penalty import Penalty
from ..hypergrad.truncated import Truncated
from ..hypergrad.unroll import Unroll
from ..inner.fixed_point import Anderson, Picard
from ..inner.gradient_descent import GradientDescent
from ..inner.lbfgs import LBFGS
from ..inner.minimize import InnerSolver
from ..inner.newton_cg import NewtonCG
from ..inner.steps import Adam, Steps
from ..linalg.bicgstab import BiCGSTAB
from ..linalg.cg import CG
from ..linalg.gmres import GMRES
from ..linalg.identity import Identity
from ..linalg.minres import MINRES
from ..linalg.neumann import Neumann
from ..linalg.normal import NormalCG
from ..linalg.nystrom import Nystrom, NystromPreconditioner
from ..linalg.preconditioners import Jacobi
from ..linalg.solve import LinearSolver
from .resumed import refuse_misspelt, suggest_choice
from .settings import from_json, to_json

if TYPE_CHECKING:
    import optuna

T = TypeVar("T")
Suggested = Implicit | OneStep | FiniteDifference | Penalty | Truncated | Unroll | FirstOrder

LINEAR_SOLVERS = ("CG", "Jacobi-CG", "Nystrom-CG", "Neumann", "MINRES", "Nystrom", "Identity")
ITERATIVE: dict[str, type] = {kind.__name__: kind for kind in (CG, MINRES, Neumann, GMRES, BiCGSTAB, NormalCG)}
NONSYMMETRIC_SOLVERS = ("Neumann", "GMRES", "BiCGSTAB", "NormalCG")
"""Linear solvers for `fixed_point` and `root`, whose systems are not symmetric."""
INNER_SOLVERS = ("GradientDescent", "LBFGS", "NewtonCG", "Adam")
FIXED_POINT_SOLVERS = ("Anderson", "Picard")
HYPERGRADS = ("Implicit", "OneStep", "FirstOrder", "FiniteDifference", "Penalty", "Unroll", "Truncated")
ANY_SOLVER = ("Implicit", "OneStep", "FiniteDifference")
"""Methods that do with any inner solver and tell hyperparameters from the start."""

HESSIAN = "hessian"
"""The name of the Hessian itself among the operators."""

KEPT = "settings."
"""Prefix of the user attributes that hold what was chosen."""


def suggest_linear_solver(
    trial: optuna.trial.BaseTrial,
    name: str = "linear",
    *,
    choices: tuple[str, ...] = LINEAR_SOLVERS,
    max_steps: int = 64,
    rtol: tuple[float, float] | None = None,
) -> LinearSolver:
    """Let a trial choose a linear solver and the settings that this one has.

    Args:
        trial: its parameters are ``linear``, then ``linear.max_steps``, ``linear.rtol``, ``linear.rank``,
            ``linear.damping`` or ``linear.factor`` as the choice needs.
        name: the prefix of those.
        choices: solvers to choose from, of `LINEAR_SOLVERS` and `NONSYMMETRIC_SOLVERS`.
        max_steps: upper end of the number of steps and of the rank, searched on a log scale.
        rtol: ends of the relative residual at which an iterative solver stops before ``max_steps``, searched on a log
            scale; None: each solver's own.

    Raises:
        ValueError: an unknown choice, other choices than those that the study was begun with, or a misspelt default.
    """
    choice = _choose(trial, name, choices, {*LINEAR_SOLVERS, *NONSYMMETRIC_SOLVERS})
    solver: LinearSolver
    if choice == "Identity":
        solver = Identity(trial.suggest_float(f"{name}.factor", 1e-3, 1e3, log=True))
    elif choice == "Nystrom":
        rank = trial.suggest_int(f"{name}.rank", 1, max_steps, log=True)
        solver = Nystrom(rank, damping=trial.suggest_float(f"{name}.damping", 1e-4, 1e2, log=True))
    else:
        settings: dict[str, Any] = {"max_steps": trial.suggest_int(f"{name}.max_steps", 1, max_steps, log=True)}
        if rtol is not None:
            settings["rtol"] = trial.suggest_float(f"{name}.rtol", *rtol, log=True)
        if choice == "Nystrom-CG":
            rank = trial.suggest_int(f"{name}.rank", 1, max_steps, log=True)
            solver = CG(**settings, preconditioner=NystromPreconditioner(rank))
        elif choice == "Jacobi-CG":
            solver = CG(**settings, preconditioner=Jacobi())
        else:
            solver = ITERATIVE[choice](**settings)
    return _kept(trial, name, solver)


def suggest_inner_solver(
    trial: optuna.trial.BaseTrial,
    name: str = "inner",
    *,
    choices: tuple[str, ...] = INNER_SOLVERS,
    max_steps: int = 100,
    lr: tuple[float, float] = (1e-3, 1.0),
) -> InnerSolver | Anderson | Picard:
    """Let a trial choose an inner solver and the settings that this one has.

    Step rules make exactly their ``max_steps``; `LBFGS` and `NewtonCG` stop at ``gtol`` or after ``max_steps``,
    `Anderson` and `Picard` at ``tol``.

    Args:
        trial: its parameters are ``inner``, ``inner.max_steps``, then ``inner.lr``, ``inner.momentum``, ``inner.gtol``,
            ``inner.cg_steps``, ``inner.tol``, ``inner.damping`` or ``inner.history`` as the choice needs.
        name: the prefix of those.
        choices: solvers to choose from, of `INNER_SOLVERS`, or of `FIXED_POINT_SOLVERS` for `fixed_point`.
        max_steps: upper end of the number of steps, searched on a log scale.
        lr: ends of the step size, searched on a log scale.

    Raises:
        ValueError: an unknown choice, other choices than those that the study was begun with, or a misspelt default.
    """
    choice = _choose(trial, name, choices, {*INNER_SOLVERS, *FIXED_POINT_SOLVERS})
    steps = trial.suggest_int(f"{name}.max_steps", 1, max_steps, log=True)
    solver: InnerSolver | Anderson | Picard
    if choice in ("GradientDescent", "Adam"):
        size = trial.suggest_float(f"{name}.lr", *lr, log=True)
        if choice == "Adam":
            solver = Steps(Adam(size), max_steps=steps)
        else:
            momentum = trial.suggest_float(f"{name}.momentum", 0.0, 0.95)
            solver = GradientDescent(size, max_steps=steps, momentum=momentum)
    elif choice in FIXED_POINT_SOLVERS:
        tol = trial.suggest_float(f"{name}.tol", 1e-6, 1e-1, log=True)
        damping = trial.suggest_float(f"{name}.damping", 0.5, 1.0)
        if choice == "Anderson":
            history = trial.suggest_int(f"{name}.history", 1, 20, log=True)
            solver = Anderson(history=history, damping=damping, max_steps=steps, tol=tol)
        else:
            solver = Picard(damping=damping, max_steps=steps, tol=tol)
    else:
        gtol = trial.suggest_float(f"{name}.gtol", 1e-6, 1e-1, log=True)
        if choice == "LBFGS":
            solver = LBFGS(max_steps=steps, gtol=gtol)
        else:
            cg_steps = trial.suggest_int(f"{name}.cg_steps", 1, 50, log=True)
            solver = NewtonCG(max_steps=steps, gtol=gtol, cg_steps=cg_steps)
    return _kept(trial, name, solver)


def suggest_hypergrad(
    trial: optuna.trial.BaseTrial,
    name: str = "hypergrad",
    *,
    choices: tuple[str, ...] = ANY_SOLVER,
    linear: tuple[str, ...] = LINEAR_SOLVERS,
    max_steps: int = 64,
    rtol: tuple[float, float] | None = None,
    operators: Mapping[str, OperatorFactory] | None = None,
) -> Suggested:
    """Let a trial choose a hypergradient method, the linear solver of `Implicit`, and the settings of either.

    Args:
        trial: its parameters are ``hypergrad``, then ``hypergrad.damped``, ``hypergrad.damping`` and
            ``hypergrad.operator`` with those of `suggest_linear_solver`, or ``hypergrad.step_size``, ``hypergrad.lr``,
            ``hypergrad.strength``, ``hypergrad.last``.
        name: the prefix of those. Under another name than ``hypergrad``, for a second method in one trial, the linear
            solver is ``NAME.linear``, so that the two share nothing.
        choices: methods to choose from, of `HYPERGRADS`. The default ones do with any inner solver; ``Unroll`` and
            ``Truncated`` need one whose steps can be differentiated (``GradientDescent``, ``Adam``), and ``FirstOrder``
            needs hyperparameters that are the start of the inner problem.
        linear: the choices of the linear solver.
        max_steps: upper end of its steps, and of ``Truncated``.
        rtol: ends of its relative residual, see `suggest_linear_solver`.
        operators: matrices that `Implicit` may take in place of the Hessian, by name, such as
            ``{"gauss-newton": GaussNewton.of(model, loss)}`` for networks; the trial chooses as
            ``hypergrad.operator``, with ``"hessian"`` for the Hessian itself.

    Raises:
        ValueError: an unknown choice, other choices than those that the study was begun with, or a misspelt default.
    """
    choice = _choose(trial, name, choices, HYPERGRADS)
    hypergrad: Suggested
    if choice == "Implicit":
        inverse = "linear" if name == "hypergrad" else f"{name}.linear"
        solver = suggest_linear_solver(trial, inverse, choices=linear, max_steps=max_steps, rtol=rtol)
        damped = trial.suggest_categorical(f"{name}.damped", [False, True])
        damping = trial.suggest_float(f"{name}.damping", 1e-4, 1e2, log=True) if damped else 0.0
        hypergrad = Implicit(solver, damping=damping)
        if operators:
            operator = suggest_choice(trial, f"{name}.operator", [HESSIAN, *operators])
            trial.set_user_attr(f"{KEPT}{name}.operator", operator)
            return with_operator(_kept(trial, name, hypergrad), operator, operators)
    elif choice == "OneStep":
        hypergrad = OneStep(trial.suggest_float(f"{name}.step_size", 1e-3, 1e2, log=True))
    elif choice == "FiniteDifference":
        hypergrad = FiniteDifference(trial.suggest_float(f"{name}.lr", 1e-3, 1e2, log=True))
    elif choice == "Penalty":
        hypergrad = Penalty(trial.suggest_float(f"{name}.strength", 1.0, 1e4, log=True))
    elif choice == "Truncated":
        hypergrad = Truncated(trial.suggest_int(f"{name}.last", 1, max_steps, log=True))
    else:
        hypergrad = Unroll() if choice == "Unroll" else FirstOrder()
    return _kept(trial, name, hypergrad)


def with_operator(hypergrad: Implicit, name: str, operators: Mapping[str, OperatorFactory]) -> Implicit:
    """The same with the matrix of this name.

    Raises:
        ValueError: there is none.
    """
    if name == HESSIAN:
        return hypergrad
    if name not in operators:
        raise ValueError(
            f"The trial chose the operator {name!r}, which is a function and stays in the program: pass operators="
            f"{{{name!r}: ...}} as the search space had it."
        )
    return replace(hypergrad, operator=operators[name])


def solver_from_trial(
    trial: optuna.trial.FrozenTrial | optuna.trial.BaseTrial,
    name: str = "hypergrad",
    operators: Mapping[str, OperatorFactory] | None = None,
) -> Any:
    """The object that a trial chose under this prefix (``"inner"``, ``"linear"``, ``"hypergrad"``), made anew.

    It works on trials of any storage, long after the study, and does not need the search space, but for its operators.

    Args:
        operators: those of `suggest_hypergrad`.

    Raises:
        KeyError: the trial chose nothing under this name.
        ValueError: it chose an operator that is not one of ``operators``.
    """
    kept = trial.user_attrs.get(KEPT + name)
    if kept is None:
        found = [key.removeprefix(KEPT) for key in trial.user_attrs if key.startswith(KEPT)]
        number = getattr(trial, "number", "?")
        raise KeyError(f"Trial {number} chose nothing under {name!r}: it has {', '.join(found) or 'no settings'}.")
    chosen = from_json(json.loads(kept))
    operator = trial.user_attrs.get(f"{KEPT}{name}.operator", HESSIAN)
    return chosen if operator == HESSIAN else with_operator(chosen, operator, operators or {})


def _choose(trial: optuna.trial.BaseTrial, name: str, choices: tuple[str, ...], known: Iterable[str]) -> str:
    unknown = set(choices) - set(known)
    if unknown or not choices:
        raise ValueError(f"choices has {sorted(unknown)}: it is made of {', '.join(known)}.")
    return suggest_choice(trial, name, list(choices))


def _kept(trial: optuna.trial.BaseTrial, name: str, setting: T) -> T:
    refuse_misspelt(trial, name)
    trial.set_user_attr(KEPT + name, json.dumps(to_json(setting)))
    return setting
