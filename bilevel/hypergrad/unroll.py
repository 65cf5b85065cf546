"""The unrolled hypergradient: differentiate the steps of the solver themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..closure import in_transform
from ..inner.gradient_descent import GradientDescent
from ..inner.minimize import INNER_ADVICE, InnerSolver
from ..problem import Objective, Problem
from ..solution import Solution, Throw, settle
from ..tree import Tree, norm
from .differentiate import measured


@dataclass(frozen=True)
class Unroll:
    """Backpropagate through every step of `GradientDescent`, towards ``init`` as well.

    The exact derivative of what the solver returned, converged or not; memory grows with the steps. MAML
    (Finn et al. 2017) is this with few steps, and `Implicit` its limit where the solver converges.
    """

    def run(
        self, objective: Objective, init: Tree, args: tuple[Any, ...], solver: InnerSolver, throw: Throw
    ) -> Solution:
        """See `PathMethod`."""
        if not isinstance(solver, GradientDescent) or solver.line_search:
            raise TypeError(
                f"hypergrad=Unroll() cannot differentiate {solver!r}: it needs GradientDescent without line_search. "
                "Every solver works with hypergrad=Implicit()."
            )
        if in_transform():
            raise NotImplementedError("hypergrad=Unroll() does not work under torch.func: use Implicit(), or autograd.")
        problem = Problem(objective, init, args, differentiable=torch.is_grad_enabled())
        found = solver.minimize(problem)
        at = problem.evaluate(found.value.detach())
        measured(found, norm(at.g.detach()), torch.isfinite(at.f.detach()))
        settle(found, throw, "The inner solve", INNER_ADVICE)
        found.value = problem.raveler.unflatten(problem.raveler.unravel(found.value))
        return found
