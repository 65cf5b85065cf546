"""The solver of those who name none."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from .._torch import NoSecondDerivativeError
from ..linalg.lanczos import Lanczos
from ..linalg.operator import Operator
from ..problem import Problem
from ..solution import Result, Solution, marked
from ..tree import axpy, dot, norm, scale
from .lbfgs import LBFGS
from .outcome import curved
from .watch import InnerStep

LARGE = 1000
"""Unknowns from which on a problem that does not converge is looked at, as networks have them."""
LOOKS, PRODUCTS = (50, 100, 200, 400), 50
"""Steps after which it is, and the Hessian products of a look at most."""
WARM = 20
"""Steps after which it is, too, where the loss fell by less than half: one that started near its end."""


@dataclass(frozen=True)
class DefaultLBFGS(LBFGS):
    """`LBFGS`, which gives up a large problem whose Hessian is indefinite after 50, 100, 200 or 400 steps.

    A network is thousands of steps away from a minimum to the accuracy of the default, and warm starts from one outer
    step to the next come nearer at a fraction of the price: a warm start is looked at after 20 steps already. A solver
    that was named makes the steps that it was given. Problems that were given up are marked in ``stats["given_up"]``.
    """

    def minimize(self, problem: Problem) -> Solution[Tensor]:
        """Minimise; see `InnerSolver`."""
        if problem.start.y.shape[-1] < LARGE:
            return super().minimize(problem)

        looks = [False]

        def hopeless(seen: InnerStep) -> bool:
            due = seen.step in LOOKS or (seen.step == WARM and _is_warm(problem, seen))
            looks.append(due and not seen.last and all_bend_down(problem, seen.flat))
            return looks[-1]

        found = LBFGS(self.max_steps, self.gtol, self.history, callback=hopeless).minimize(problem)
        if not looks[-1]:
            return found
        codes = found.stats["result"]
        given_up = codes == int(Result.STEPS_DONE)
        found = found.with_stats(result=marked(codes, given_up, Result.NEGATIVE_CURVATURE))
        return found.with_stats(given_up=given_up) if bool(given_up.all()) else found


def _is_warm(problem: Problem, seen: InnerStep) -> bool:
    start = problem.start.f
    return seen.loss is not None and bool((start - seen.loss < 0.5 * start.abs()).all())


def all_bend_down(problem: Problem, y: Tensor) -> bool:
    """Whether every problem has a direction of negative curvature at ``y``, beyond rounding."""
    with contextlib.suppress(NoSecondDerivativeError):
        bent = curved(problem, y)
        if bent is not None:
            hessian, start = bent
            resolved = 100 * torch.finfo(y.dtype).eps
            return bool(negative_ritz(hessian, start, min(PRODUCTS, hessian.size), resolved).all())
    return False


def negative_ritz(operator: Operator, start: Tensor, products: int, resolved: float) -> Tensor:
    """Where the Ritz values of conjugate gradients from ``start`` prove negative curvature, ``[*batch]``.

    They are looked at after each product, so that a network whose first ones tell costs no more, as the whole solve of
    `bends_down` would.

    Args:
        start: the right-hand side, ``[*batch, n]``. products: at most.
        resolved: the part of the largest Ritz value below which a negative one counts as none.
    """
    r = p = scale(1 / norm(start), start)
    rr = dot(r, r)
    lanczos, carried = Lanczos(rr), torch.zeros_like(rr)
    met = found = torch.zeros_like(rr, dtype=torch.bool)
    for _ in range(products):
        product = operator.matvec(p)
        curvature = dot(p, product)
        met = met | (curvature < 0)
        r = axpy(-torch.where(curvature == 0, curvature, rr / curvature), product, r)
        beta, pivot, rr = dot(r, r) / rr, curvature / rr, dot(r, r)
        lanczos.append(pivot + carried, beta.sqrt() * pivot, torch.isfinite(pivot))
        carried, p = beta * pivot, axpy(beta, p, r)
        if bool(met.any()):
            low, high = lanczos.extremes()
            found = found | (met & (low < -resolved * torch.maximum(high.abs(), low.abs())))
        if bool(found.all()):
            break
    return found
