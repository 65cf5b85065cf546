"""The solver of those who name none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import Problem
from ..solution import Result, Solution, marked
from .lbfgs import LBFGS
from .outcome import bends_down
from .watch import InnerStep

LARGE = 1000
"""Unknowns from which on a problem that does not converge is looked at, as networks have them."""
LOOKS, PRODUCTS = (50, 100, 200, 400), (20, 50)
"""Steps after which it is, and the products of each look: few tell of most networks, more where these do not."""


@dataclass(frozen=True)
class DefaultLBFGS(LBFGS):
    """`LBFGS`, which gives up a large problem whose Hessian is indefinite after 50, 100, 200 or 400 steps.

    A network is thousands of steps away from a minimum to the accuracy of the default, and warm starts from one outer
    step to the next come nearer at a fifth of the price. A solver that was named makes the steps that it was given.
    """

    def minimize(self, problem: Problem) -> Solution[Tensor]:
        """Minimise; see `InnerSolver`."""
        if problem.start.y.shape[-1] < LARGE:
            return super().minimize(problem)

        def hopeless(seen: InnerStep) -> bool:
            if seen.step not in LOOKS or seen.last:
                return False
            y, resolved = seen.flat, 100 * torch.finfo(seen.flat.dtype).eps
            return any(bool(bends_down(problem, y, products, resolved).all()) for products in PRODUCTS)

        found = LBFGS(self.max_steps, self.gtol, self.history, callback=hopeless).minimize(problem)
        codes = found.stats["result"]
        given_up = codes == int(Result.STEPS_DONE)
        return found.with_stats(result=marked(codes, given_up, Result.NEGATIVE_CURVATURE))
