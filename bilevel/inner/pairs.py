"""What L-BFGS knows of the curvature: its pairs, the two-loop recursion, the length of the first step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..problem import Evaluation, Problem
from ..tree import axpy, dot, norm, scale


def first_step(problem: Problem, at: Evaluation | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Down the gradient at the start, or at another point, as far as the curvature along it says, by one more gradient.

    Returns:
        The unit direction ``[*batch, n]``; the length, and where the curvature is positive, ``[*batch]``. Where it is
        not, the length is that which would bring a loss of that slope to zero.
    """
    at = problem.start if at is None else at
    slope, size = norm(at.g), norm(at.y)
    to_zero = at.f.abs() / slope
    to_zero = torch.where((to_zero > 0) & torch.isfinite(to_zero), to_zero, torch.ones_like(to_zero))
    reach = torch.where(size > 0, size, to_zero)
    step = _step_along_gradient(problem, at, reach, slope)
    unseen = (slope > 0) & ~(step > 0)
    if bool(unseen.any()):  # too near for the rounding of the gradient
        step = torch.where(unseen, _step_along_gradient(problem, at, (reach * to_zero).sqrt(), slope), step)
    curved = (step > 0) & torch.isfinite(step)
    length = torch.where(curved, step * slope, to_zero)
    downhill = scale(torch.where(slope > 0, -1 / slope, torch.zeros_like(slope)), at.g)
    return downhill, torch.where(slope > 0, length, torch.zeros_like(length)), curved


def _step_along_gradient(problem: Problem, at: Evaluation, length: Tensor, slope: Tensor) -> Tensor:
    """One over the curvature along the gradient, by a difference over a small part of ``length``."""
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
        self.unit = unit_of(problem.start.g)
        self.gamma = torch.ones_like(self.unit)
        self.pairs: list[Pair] = []
        self.previous: Evaluation | None = None

    def __call__(self, at: Evaluation, last: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        """The direction, its first step size, and where the newest curvature is positive; see `Direction`."""
        if self.previous is None:
            self.previous = at
            return first_step(self.problem) if self.probe else self._cautious(at)
        pair, size, useful = pair_of(at.y - self.previous.y, scale(self.unit, at.g - self.previous.g))
        self.pairs, self.previous = [*self.pairs, pair][-self.history :], at
        self.gamma = torch.where(useful, size, self.gamma)
        towards = two_loops(self.pairs, self.gamma, scale(self.unit, at.g))
        return -towards, torch.ones_like(at.f), useful

    @staticmethod
    def _cautious(at: Evaluation) -> tuple[Tensor, Tensor, Tensor]:
        """Down the gradient, a step of its length and of one at most."""
        slope = norm(at.g)
        downhill = scale(torch.where(slope > 0, -1 / slope, torch.zeros_like(slope)), at.g)
        return downhill, slope.clamp_max(1.0), torch.zeros_like(slope, dtype=torch.bool)


Pair = tuple[Tensor, Tensor, Tensor]
"""A step, the change of the gradient over it, and one over their product (0: the pair counts as none)."""


def unit_of(g: Tensor) -> Tensor:
    """One over the norms of these gradients, ``[*batch]``: 1 where there is none."""
    size = norm(g)
    return torch.where((size > 0) & torch.isfinite(size), 1 / size, torch.ones_like(size))


def pair_of(s: Tensor, y: Tensor) -> tuple[Pair, Tensor, Tensor]:
    """The pair of a step and of the change over it.

    Returns:
        The pair; the size ``s y / y y`` of the inverse Hessian along it, and where its curvature is positive,
        ``[*batch]``.
    """
    curvature, yy = dot(s, y), dot(y, y)
    useful = curvature > torch.finfo(s.dtype).eps * norm(s) * yy.sqrt()
    return (s, y, torch.where(useful, 1 / curvature, torch.zeros_like(curvature))), curvature / yy, useful


def two_loops(pairs: Sequence[Pair], gamma: Tensor, g: Tensor) -> Tensor:
    """The inverse Hessian that the pairs stand for, times ``g [*batch, n]``; ``gamma [*batch]`` is where it starts."""
    q, alphas = g, []
    for s, y, rho in reversed(pairs):
        alpha = rho * dot(s, q)
        alphas.append(alpha)
        q = torch.addcmul(q, alpha.to(y.dtype).unsqueeze(-1), y, value=-1)
    q = scale(gamma, q)
    for (s, y, rho), alpha in zip(pairs, reversed(alphas), strict=True):
        q = axpy(alpha - rho * dot(y, q), s, q)
    return q
