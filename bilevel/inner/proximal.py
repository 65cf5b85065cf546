"""Proximal gradient descent, for smooth losses with a penalty or constraint that is not smooth; batched."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import Evaluation, Problem, Shrink
from ..prox import Prox
from ..solution import Result, Solution, make_codes
from ..tree import axpy, dot, norm, scale
from .minimize import Progress, check_tolerance, choose


@dataclass(frozen=True)
class ProximalGradient:
    """``y <- prox(y - eta grad g(y), eta)``, accelerated (FISTA, Beck and Teboulle 2009), with backtracking.

    `argmin` with this solver minimises ``g + prox.value``: lasso, elastic net, group lasso, box, simplex and ball
    constraints. Its solution is differentiable towards everything that g and the prox reach, by the implicit function
    theorem on ``y = prox(y - eta grad g(y), eta)``. T problems have each their step size, momentum and stopping.

    Args:
        prox: of `bilevel.prox`.
        step_size: eta to start with; None: ``1 / curvature`` at the start, one more gradient. Halved for a problem
            whenever its loss lies above the quadratic model.
        max_steps: steps at most, two gradients each (one without acceleration), and one for each halving.
        tol: stop a problem at ``||y - prox(y - eta grad g(y), eta)|| / eta``; None: 1e-9 (float64) or 1e-5 (float32),
            times ``||y|| / eta + ||grad g||``, so that the scale of the loss does not matter.
        accelerated: Nesterov's extrapolation, started again where it points uphill (O'Donoghue and Candes 2015).
    """

    prox: Prox
    step_size: float | None = None
    max_steps: int = 5000
    tol: float | None = None
    accelerated: bool = True

    def __post_init__(self) -> None:
        check_tolerance(max_steps=self.max_steps, tol=self.tol)
        if not isinstance(self.prox, Prox):
            raise TypeError(f"prox is {self.prox!r}: it is one of bilevel.prox, such as prox.L1(0.1).")
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size is {self.step_size}: it must be positive.")

    def minimize(self, problem: Problem) -> Solution:
        """Minimise; see `InnerSolver`."""
        shrink = problem.shrink or self.prox.prox
        ahead = at = problem.start
        step = self._first_step(problem)
        t, size = torch.ones_like(step), residual_norm(shrink, at, step)
        progress = Progress.begin(at, None)
        progress.codes = torch.where(progress.active, make_codes(Result.MAX_STEPS, at.f), progress.codes)
        progress.end(size <= self._tolerance(at, step), Result.CONVERGED)
        for _ in range(self.max_steps):
            if not bool(progress.active.any()):
                break
            new, step, moved = _step(problem, shrink, ahead, step, progress.active)
            progress.count()
            # The step from `ahead` is a descent direction; where the momentum opposes it, momentum does harm.
            restart = dot(ahead.y - new.y, new.y - at.y) > 0
            t = torch.where(restart, torch.ones_like(t), t)
            t_next = (1 + (1 + 4 * t.square()).sqrt()) / 2
            momentum = torch.where(restart, torch.zeros_like(t), (t - 1) / t_next)
            last, at, t = at, choose(moved, new, at), t_next
            size = residual_norm(shrink, at, step)
            progress.end(size <= self._tolerance(at, step), Result.CONVERGED)
            progress.end(~moved, Result.STAGNATED)
            if self.accelerated:
                extrapolated = axpy(momentum, at.y - last.y, at.y)
                ahead = problem.evaluate(torch.where(progress.active.unsqueeze(-1), extrapolated, at.y))
            else:
                ahead = at
        return progress.solution(at.y, residual_norm=size, step_size=step)

    def _first_step(self, problem: Problem) -> Tensor:
        at = problem.start
        if self.step_size is not None:
            return torch.full_like(at.f, self.step_size)
        return inverse_curvature(lambda y: problem.evaluate(y).g, at.y, at.g)

    def _tolerance(self, at: Evaluation, step: Tensor) -> Tensor:
        if self.tol is not None:
            return torch.full_like(at.f, self.tol)
        # Both terms of y - eta g are as accurate as this.
        base = 1e-9 if at.g.dtype == torch.float64 else 1e-5
        return base * (norm(at.y) / step + norm(at.g))


def residual_norm(shrink: Shrink, at: Evaluation, step: Tensor) -> Tensor:
    """``||y - prox(y - eta g, eta)|| / eta``, ``[*batch]`` float64: the gradient norm where the prox does nothing."""
    with torch.no_grad():
        return norm(at.y - shrink(at.y - scale(step, at.g), step)) / step


def inverse_curvature(gradient: Callable[[Tensor], Tensor], y: Tensor, g: Tensor) -> Tensor:
    """About ``1 / L``: one over the curvature along one fixed direction of signs, ``[*batch]`` float64, detached.

    A difference of two gradients: no Hessian product. 1 where the gradient does not change.
    """
    count, roundoff = y.shape[-1], torch.finfo(y.dtype).eps
    # Signs without a pattern (multiples of the golden ratio): they meet every eigenvector, and are always the same.
    turns = torch.arange(count, device=y.device, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2)
    signs = torch.where(turns % 1 < 0.5, 1.0, -1.0).to(y.dtype)
    length = norm(y.detach())
    length = math.sqrt(roundoff) * torch.where(length > 0, length, torch.ones_like(length))
    change = norm(gradient(y.detach() + scale(length / math.sqrt(count), signs)).detach() - g.detach())
    step = length / change
    largest = torch.finfo(y.dtype).max / 1e6
    return torch.where((change > 0) & torch.isfinite(step), step, torch.ones_like(step)).clamp(1 / largest, largest)


def _step(
    problem: Problem, shrink: Shrink, at: Evaluation, step: Tensor, active: Tensor
) -> tuple[Evaluation, Tensor, Tensor]:
    """One step from ``at``, its size halved until the quadratic model is an upper bound.

    Returns:
        The new points, the step sizes, and the mask of success.
    """
    pending, best = active, at
    for _ in range(60):
        with torch.no_grad():
            y = shrink(at.y - scale(step, at.g), step)
        trial = problem.evaluate(torch.where(pending.unsqueeze(-1), y, best.y))
        move = trial.y - at.y
        bound = norm(move).square() / step
        # Where the rounding of the losses hides what is compared, the slopes tell instead.
        flat = bound <= 1e3 * torch.finfo(at.g.dtype).eps * torch.maximum(at.f.abs(), trial.f.abs())
        below = trial.f <= at.f + dot(at.g, move) + bound / 2
        accepted = pending & torch.where(flat, dot(trial.g - at.g, move) <= bound, below)
        best = choose(accepted, trial, best)
        pending = pending & ~accepted
        if not bool(pending.any()):
            break
        step = torch.where(pending, step / 2, step)
    return best, step, active & ~pending
