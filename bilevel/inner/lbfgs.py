"""L-BFGS, batched: every problem has its own curvature pairs, line search and stopping."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..problem import Evaluation, Problem
from ..solution import Solution
from ..tree import axpy, dot, norm, scale
from .minimize import check_settings, descend
from .nearness import Nearness
from .watch import Callbacks, watch


@dataclass(frozen=True)
class LBFGS:
    """Limited-memory BFGS (Liu and Nocedal 1989) with a weak Wolfe line search. The default inner solver.

    For smooth problems of any size whose gradient is not noisy.

    Args:
        max_steps: steps at most.
        gtol: stop a problem at this gradient norm; None: where the next step is at most 1e-9 (float64) or 3e-5
            (float32) times the norm of the params, whatever the scales of loss, params and start; see `Nearness`.
        history: curvature pairs kept, two vectors each.
        callback: called with each `InnerStep`; it ends the solve where it returns True. Or several of them.
    """

    max_steps: int = 500
    gtol: float | None = None
    history: int = 10
    callback: Callbacks = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_settings(max_steps=self.max_steps, gtol=self.gtol)
        if self.history < 1:
            raise ValueError(f"history is {self.history}: at least one curvature pair must be kept.")

    def minimize(self, problem: Problem) -> Solution[Tensor]:
        """Minimise; see `InnerSolver`."""
        memory = Memory(self.history, problem, probe=self.gtol is None)
        nearness = Nearness(problem.start.y) if self.gtol is None else None
        return descend(problem, self.gtol, self.max_steps, memory.direction, nearness, watch(self, problem))


def first_step(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Down the gradient at the start, as far as the curvature along it says, at the price of one more gradient.

    Returns:
        The unit direction ``[*batch, n]``; the length, and where the curvature is positive, ``[*batch]``. Where it is
        not, the length is that which would bring a loss of that slope to zero.
    """
    at = problem.start
    slope, size = norm(at.g), norm(at.y)
    to_zero = at.f.abs() / slope
    to_zero = torch.where((to_zero > 0) & torch.isfinite(to_zero), to_zero, torch.ones_like(to_zero))
    reach = torch.where(size > 0, size, to_zero)
    step = _step_along_gradient(problem, reach, slope)
    unseen = (slope > 0) & ~(step > 0)
    if bool(unseen.any()):  # too near for the rounding of the gradient
        step = torch.where(unseen, _step_along_gradient(problem, (reach * to_zero).sqrt(), slope), step)
    curved = (step > 0) & torch.isfinite(step)
    length = torch.where(curved, step * slope, to_zero)
    downhill = scale(torch.where(slope > 0, -1 / slope, torch.zeros_like(slope)), at.g)
    return downhill, torch.where(slope > 0, length, torch.zeros_like(length)), curved


def _step_along_gradient(problem: Problem, length: Tensor, slope: Tensor) -> Tensor:
    """One over the curvature along the gradient, by a difference over a small part of ``length``."""
    at = problem.start
    reach = torch.finfo(at.g.dtype).eps ** 0.5 * length / slope
    reach = torch.where(torch.isfinite(reach), reach, torch.zeros_like(reach))
    ahead = problem.evaluate(axpy(-reach, at.g, at.y))
    # In units of the slope: the squares of a small gradient underflow in float32.
    step = reach / dot(scale(1 / slope, at.g - ahead.g), scale(1 / slope, at.g))
    return torch.where(torch.isfinite(step), step, torch.zeros_like(step))


class Memory:
    """Curvature pairs and the two-loop recursion; a pair without positive curvature counts as none.

    Gradients are taken in units of the first one: the squares of small ones underflow in float32.

    Args:
        probe: spend a gradient on the curvature at the start; else the first step is cautious.
    """

    def __init__(self, history: int, problem: Problem, probe: bool = True):
        self.history, self.problem, self.probe = history, problem, probe
        size = norm(problem.start.g)
        self.unit = torch.where((size > 0) & torch.isfinite(size), 1 / size, torch.ones_like(size))
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.previous: Evaluation | None = None
        self.gamma: Tensor | None = None

    def direction(self, at: Evaluation, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The direction, its first step size, and where the newest curvature is positive; see `descend`."""
        if self.previous is None:
            self.previous = at
            return first_step(self.problem) if self.probe else self._cautious(at)
        useful = self._remember(at.y - self.previous.y, scale(self.unit, at.g - self.previous.g))
        self.previous = at
        return -self._two_loops(scale(self.unit, at.g)), torch.ones_like(at.f), useful

    @staticmethod
    def _cautious(at: Evaluation) -> tuple[Tensor, Tensor, Tensor]:
        """Down the gradient, a step of its length and of one at most."""
        slope = norm(at.g)
        downhill = scale(torch.where(slope > 0, -1 / slope, torch.zeros_like(slope)), at.g)
        return downhill, slope.clamp_max(1.0), torch.zeros_like(slope, dtype=torch.bool)

    def _remember(self, s: Tensor, y: Tensor) -> Tensor:
        curvature, yy = dot(s, y), dot(y, y)
        useful = curvature > torch.finfo(s.dtype).eps * norm(s) * yy.sqrt()
        rho = torch.where(useful, 1 / curvature, torch.zeros_like(curvature))
        self.gamma = torch.where(useful, curvature / yy, torch.ones_like(yy) if self.gamma is None else self.gamma)
        self.pairs = [*self.pairs, (s, y, rho)][-self.history :]
        return useful

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
