"""L-BFGS, batched: every problem has its own curvature pairs, line search and stopping."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import Evaluation, Problem
from ..solution import Solution
from ..tree import axpy, dot, norm, scale
from .minimize import check_settings, descend


@dataclass(frozen=True)
class LBFGS:
    """Limited-memory BFGS (Liu and Nocedal 1989) with a weak Wolfe line search. The default inner solver.

    For smooth problems of any size whose gradient is not noisy.

    Args:
        max_steps: steps at most.
        gtol: stop a problem at this gradient norm; None: 1e-4 (float32) or 1e-9 (float64), times the gradient
            norm at the start where that is larger than one.
        history: curvature pairs kept, two vectors each.
    """

    max_steps: int = 500
    gtol: float | None = None
    history: int = 10

    def __post_init__(self) -> None:
        check_settings(max_steps=self.max_steps, gtol=self.gtol)
        if self.history < 1:
            raise ValueError(f"history is {self.history}: at least one curvature pair must be kept.")

    def minimize(self, problem: Problem) -> Solution:
        """Minimise; see `InnerSolver`."""
        memory = _Memory(self.history)
        gtol = default_gtol(problem) if self.gtol is None else self.gtol
        return descend(problem, gtol, self.max_steps, memory.direction)


def default_gtol(problem: Problem) -> Tensor:
    """A gradient norm that float32 or float64 can reach on problems of these scales, for each."""
    base = 1e-9 if problem.start.g.dtype == torch.float64 else 1e-4
    return base * norm(problem.start.g).clamp_min(1.0)


class _Memory:
    """Curvature pairs and the two-loop recursion; a pair without positive curvature counts as none."""

    def __init__(self, history: int):
        self.history = history
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.previous: Evaluation | None = None
        self.gamma: Tensor | None = None

    def direction(self, at: Evaluation, last: Tensor) -> tuple[Tensor, Tensor]:
        if self.previous is None:
            self.previous = at
            return -at.g, 1 / norm(at.g).clamp_min(1.0)
        self._remember(at.y - self.previous.y, at.g - self.previous.g)
        self.previous = at
        return -self._two_loops(at.g), torch.ones_like(at.f)

    def _remember(self, s: Tensor, y: Tensor) -> None:
        curvature, yy = dot(s, y), dot(y, y)
        useful = curvature > torch.finfo(s.dtype).eps * yy
        rho = torch.where(useful, 1 / curvature, torch.zeros_like(curvature))
        self.gamma = torch.where(useful, curvature / yy, torch.ones_like(yy) if self.gamma is None else self.gamma)
        self.pairs = [*self.pairs, (s, y, rho)][-self.history :]

    def _two_loops(self, g: Tensor) -> Tensor:
        assert self.gamma is not None
        q, alphas = g, []
        for s, y, rho in reversed(self.pairs):
            alpha = rho * dot(s, q)
            alphas.append(alpha)
            q = axpy(-alpha, y, q)
        q = scale(self.gamma, q)
        for (s, y, rho), alpha in zip(self.pairs, reversed(alphas), strict=True):
            q = axpy(alpha - rho * dot(y, q), s, q)
        return q
