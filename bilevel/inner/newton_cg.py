"""Hessian-free Newton: the direction by conjugate gradients on Hessian products, then a line search."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checks import check_fields
from ..linalg.cg import truncated_cg
from ..linalg.curvature import HessianMode, hessian
from ..problem import Evaluation, Problem
from ..solution import Solution
from ..tree import norm
from .descent import descend
from .minimize import check_settings
from .nearness import Nearness
from .watch import Callbacks, watch


@dataclass(frozen=True)
class NewtonCG:
    """Truncated Newton (Dembo and Steihaug 1983): the 'Hessian-free' inner solver of implicit MAML.

    Few, expensive steps: for problems that are badly conditioned, or where L-BFGS stalls. Directions of
    negative curvature end the CG of that problem; the iterate so far, or the gradient, is taken.

    Args:
        max_steps: Newton steps at most.
        gtol: stop a problem at this gradient norm; None: as in `LBFGS`, and 0 makes ``max_steps`` steps.
        cg_steps: products for each direction at most; the paper takes 5.
        operator: how products are made: ``"graph"`` or ``"func"``.
        callback: called with each `InnerStep`; it ends the solve where it returns True. Or several of them.
    """

    max_steps: int = 200
    gtol: float | None = None
    cg_steps: int = 50
    operator: HessianMode = "graph"
    callback: Callbacks = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        check_settings(max_steps=self.max_steps, gtol=self.gtol)
        if self.cg_steps < 1:
            raise ValueError(f"cg_steps is {self.cg_steps}: at least one product is needed for a direction.")

    def minimize(self, problem: Problem) -> Solution[Tensor]:
        """Minimise; see `InnerSolver`."""

        start = norm(problem.start.g)

        def direction(at: Evaluation, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            operator = hessian(problem, problem.linearize(at.y), self.operator)
            slack = (norm(at.g) / start).sqrt().clamp_max(0.5)
            steps = truncated_cg(operator, at.g, slack, self.cg_steps)
            unusable = ~(norm(steps) > 0) | ~torch.isfinite(steps).all(-1)
            return -torch.where(unusable.unsqueeze(-1), at.g, steps), torch.ones_like(at.f), ~unusable

        nearness = Nearness(problem.start.y, problem.raveler.coarsest) if self.gtol is None else None
        told = watch(self, problem)
        return descend(problem, self.gtol, self.max_steps, direction, nearness, watch=told, cheap=False)
