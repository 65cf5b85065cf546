"""What a solve that went well may hide, looked at where a function is solved for the first time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import unwrap
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..linalg.jacobian import GraphJacobian
from ..problem import Problem, RootProblem
from ..solution import Result, Solution
from ..tree import norm
from .minimize import DEFAULT_STEPS, InnerSolver, Unasked
from .outcome import (
    ASYMMETRIC_ADVICE,
    COUPLED_ADVICE,
    ENDLESS_ADVICE,
    KINK_ADVICE,
    RAISED_ADVICE,
    SADDLE_ADVICE,
    UNASKED_ADVICE,
    asymmetry,
    bends_down,
    has_kink,
    has_kink_nearby,
    has_no_end,
    is_coupled,
    is_random,
    mixes_problems,
)
from .proximal import free_params
from .roots import RootSolver

FEWEST, MOST = 5, 20
"""Products that a look at the curvature costs: as many as the solver made steps, within these."""

LARGEST = 10_000
"""Unknowns of all problems together up to which it is looked: beyond, another graph of the gradient may not fit."""


class Known:
    """The functions that were met, by their code, each for some purpose."""

    def __init__(self) -> None:
        self._met: WeakKeyDictionary[CodeType, set[str]] = WeakKeyDictionary()

    def is_new(self, fn: Callable[..., Any], purpose: str = "") -> bool:
        """Whether a function is met for the first time; False for one without code."""
        while isinstance(fn, partial):
            fn = fn.func
        code = getattr(unwrap(fn), "__code__", None)
        if not isinstance(code, CodeType):
            return False
        met = self._met.setdefault(code, set())
        new = purpose not in met
        met.add(purpose)
        return new


PROGRESS = 1e-2
"""The part of the gradient at the start that a default number of steps may leave without a word."""


def first_look(
    fn: Callable[..., Any], solver: object, look: Callable[[Any, Any, Solution], str]
) -> Callable[[Any, Solution], str]:
    """``look``, the first time that a function of the user is solved well by such a solver; nothing after that."""

    def once(problem: Any, found: Solution) -> str:
        new = found.result.ok and LOOKED.is_new(fn, type(solver).__name__)
        return look(solver, problem, found) if new else ""

    return once


LOOKED = Known()


def hidden_minimum(solver: InnerSolver, problem: Problem, found: Solution) -> str:
    """Why what was found may be no minimum although the solver calls it good, in words; empty where nothing was seen.

    A solver that starts on a symmetry, such as equal components or zero weights, never leaves it, and sees no
    direction in which the loss bends down, nor that it falls or is flat without end; ordered steps are at no kink, but
    about it, may have raised the loss, and where nobody gave the order may have come nowhere; and the problems of a
    batch that depend on each other are no problems of their own.
    """
    y, ordered = found.value.detach(), found.stats["result"] == int(Result.STEPS_DONE)
    left, begun = found.stats["residual_norm"], norm(problem.start.g)
    part = float((left / begun).nan_to_num(0.0).max())
    if bool(ordered.any()) and isinstance(getattr(solver, "max_steps", None), Unasked) and part > PROGRESS:
        return UNASKED_ADVICE.format(steps=DEFAULT_STEPS, part=part)
    if rise := raised(problem, found):
        return rise
    if y.numel() > LARGEST:
        return ""
    if mixes_problems(problem, y):
        return COUPLED_ADVICE
    converged = found.stats["result"] == int(Result.CONVERGED)
    kink = bool(ordered.any()) and has_kink_nearby(problem, found)
    kink = kink or (bool((converged & (left > 1e-3 * begun)).any()) and has_kink(problem, found))
    if kink:  # a random objective, which may be trained without a hypergradient, has no slopes to compare
        return "" if is_random(problem, found) else KINK_ADVICE
    claimed = converged & _little_left(problem, found)
    if not bool(claimed.any()):
        return ""
    if bool((claimed & has_no_end(problem, found)).any()):
        return ENDLESS_ADVICE
    return _saddle(problem, found, claimed, None)


def _little_left(problem: Problem, found: Solution) -> Tensor:
    """Where a solve claims a minimum: a tolerance of the user's may end it anywhere, with more of the gradient left."""
    little: Tensor = found.stats["residual_norm"] <= torch.finfo(found.value.dtype).eps ** 0.4 * norm(problem.start.g)
    return little


def _saddle(problem: Problem, found: Solution, claimed: Tensor, kept: Tensor | None) -> str:
    """Where the loss bends down at what is claimed to be a minimum, along ``kept`` params, in words."""
    y, products = found.value.detach(), min(MOST, max(FEWEST, int(found.stats["num_steps"].max())))
    down = bends_down(problem, y, products, torch.finfo(y.dtype).eps ** 0.5, kept)
    return SADDLE_ADVICE if bool((down & claimed).any()) else ""


def hidden_inside(separable: bool, _: InnerSolver, problem: Problem, found: Solution) -> str:
    """The same of a problem with a prox or bounds: whether its problems depend on each other, and bends downwards.

    Args:
        separable: whether the prox acts on each param by itself.
    """
    y = found.value.detach()
    claimed = (found.stats["result"] == int(Result.CONVERGED)) & _little_left(problem, found)
    if y.numel() > LARGEST or not bool(claimed.any()):
        return ""
    if mixes_problems(problem, y):
        return COUPLED_ADVICE
    return _saddle(problem, found, claimed, free_params(problem, y, separable))


def raised(problem: Problem, found: Solution) -> str:
    """Where steps that were ordered raised the loss, in words; empty where they did not, or the objective is random."""
    ordered = found.stats["result"] == int(Result.STEPS_DONE)
    if not bool(ordered.any()):
        return ""
    y, begin = found.value.detach(), problem.start.f
    end = problem.losses(y)
    rose = ordered & (end > begin + torch.finfo(y.dtype).eps ** 0.75 * begin.abs())
    if not bool(rose.any()) or is_random(problem, found):
        return ""
    worst = (end - begin).where(rose, torch.zeros_like(end)).argmax()
    return RAISED_ADVICE.format(begin=float(begin.flatten()[worst]), end=float(end.flatten()[worst]))


def hidden_root(symmetric: bool, _: RootSolver, problem: RootProblem, found: Solution) -> str:
    """The same of a system: whether its problems depend on each other, and whether it is symmetric if that is said."""
    if not (problem.raveler.batch_shape or symmetric) or found.value.numel() > LARGEST:
        return ""
    at = problem.linearize(found.value.detach())
    if not any(residual.requires_grad for residual in at.residual):
        return ""
    jacobian = GraphJacobian(problem.raveler, at, symmetric=False)
    if problem.raveler.batch_shape and is_coupled(jacobian):
        return COUPLED_ADVICE
    part = asymmetry(jacobian) if symmetric else 0.0
    return ASYMMETRIC_ADVICE.format(part=part) if part > torch.finfo(found.value.dtype).eps ** 0.5 else ""
