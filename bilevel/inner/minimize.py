"""What all inner solvers share: their protocol, their stopping rule and the line search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..linalg.solve import stop_now
from ..problem import Evaluation, Problem
from ..solution import Result, Solution, make_codes, marked
from ..tree import axpy, dot, norm
from .nearness import Nearness
from .watch import Watch


class InnerSolver(Protocol):
    """Minimises a `Problem`. Frozen settings only: the same object twice gives the same answer."""

    def minimize(self, problem: Problem) -> Solution[Tensor]:
        """The solution's ``value`` is flat, ``[*batch, n]``; its stats lack what `argmin` measures at the end."""
        ...


def check_settings(*, max_steps: int, gtol: float | None) -> None:
    """Refuse limits and tolerances that mean nothing, naming the argument."""
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}: at least one step is needed.")
    if gtol is not None and not gtol >= 0:
        raise ValueError(f"gtol is {gtol}: a tolerance on the gradient norm cannot be negative.")


def check_tolerance(*, max_steps: int, tol: float | None) -> None:
    """The same for solvers of systems."""
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}: at least one step is needed.")
    if tol is not None and not tol >= 0:
        raise ValueError(f"tol is {tol}: a tolerance on the residual norm cannot be negative.")


@dataclass
class Ends:
    """How the problems of a batch stand: ``active`` ones go on, the others are frozen, and ``codes`` say why.

    Attributes:
        codes, steps, active: of the batch shape; the result, the steps made, and whether to go on.
    """

    codes: Tensor
    steps: Tensor
    active: Tensor

    def end(self, where: Tensor, result: Result) -> None:
        """End the active problems of a mask with this result."""
        self.codes = marked(self.codes, self.active & where, result)
        self.active = self.active & ~where

    def stop(self) -> None:
        """End all active problems, as a callback wishes: what was made is what was ordered."""
        self.end(self.active, Result.STEPS_DONE)

    def mark(self, where: Tensor, result: Result) -> None:
        """Give the problems of a mask this result, whether they have ended or not."""
        self.codes = marked(self.codes, where, result)

    def count(self) -> None:
        self.steps = self.steps + self.active

    def solution(self, y: Tensor, **stats: Tensor) -> Solution[Tensor]:
        return Solution(y, {"num_steps": self.steps, "result": self.codes, **stats})


@dataclass
class Progress(Ends):
    """The stopping rule of minimisers, problem by problem."""

    gtol: float | Tensor | None

    @classmethod
    def begin(cls, at: Evaluation, gtol: float | Tensor | None) -> Progress:
        codes = make_codes(Result.STEPS_DONE if gtol is None else Result.MAX_STEPS, at.f)
        state = cls(codes, torch.zeros_like(codes, dtype=torch.int64), torch.ones_like(codes, dtype=torch.bool), gtol)
        state.look(at)
        return state

    def look(self, at: Evaluation) -> None:
        """End the problems whose gradient is small enough, or that are not finite."""
        size = norm(at.g.detach())
        if self.gtol is not None:
            self.end(size <= self.gtol, Result.CONVERGED)
        self.end(~(torch.isfinite(size) & torch.isfinite(at.f)), Result.NONFINITE)

    def done(self, step: int) -> bool:
        """Whether all have ended; without a tolerance it does not ask."""
        return self.gtol is not None and stop_now(self.active, step)


def choose(where: Tensor, new: Evaluation, old: Evaluation) -> Evaluation:
    """Take ``new`` in the problems of the mask, ``old`` in the others."""
    keep = where.unsqueeze(-1)
    return Evaluation(
        torch.where(keep, new.y, old.y), torch.where(where, new.f, old.f), torch.where(keep, new.g, old.g)
    )


GROWTH, ENOUGH_STEPS = 1.5, 32
"""How much farther from the start the params are than when at most half of the steps were made, and how many steps it
takes to say that a loss may have no minimum."""

SUFFICIENT_DECREASE = 1e-4
CURVATURE = 0.9


MAX_TRIALS, FEW_TRIALS = 30, 5


def line_search(
    problem: Problem,
    at: Evaluation,
    direction: Tensor,
    step: Tensor,
    active: Tensor,
    near: Tensor | None = None,
) -> tuple[Evaluation, Tensor, Tensor]:
    """Bisection to a weak Wolfe point (Lewis and Overton 2013), each problem with its own bracket.

    Near the minimum, where the losses differ by rounding only, the decrease is judged by the slopes instead
    (the approximate Wolfe condition of Hager and Zhang 2005), so that small gradient norms can be reached.

    Args:
        near: problems that are near their minimum, where a step that fails does so by rounding: few trials tell.

    Returns:
        The accepted points (the old ones where none was found), the step sizes, and the mask of success.
    """
    slope = dot(at.g, direction)
    low, high = torch.zeros_like(step), torch.full_like(step, torch.inf)
    pending, best, taken = active & (slope < 0), at, torch.zeros_like(step)
    rounding = torch.finfo(at.g.dtype).eps ** 0.6 * at.f.abs()
    for trials in range(MAX_TRIALS):
        if near is not None and trials == FEW_TRIALS:
            pending = pending & ~near
        if not bool(pending.any()):
            break
        trial = problem.evaluate(axpy(torch.where(pending, step, torch.zeros_like(step)), direction, at.y))
        new_slope = dot(trial.g, direction)
        decreased = trial.f <= at.f + SUFFICIENT_DECREASE * step * slope
        level = (trial.f <= at.f + rounding) & (new_slope <= (2 * SUFFICIENT_DECREASE - 1) * slope)
        enough, steep = decreased | level, new_slope < CURVATURE * slope
        accepted = pending & enough & ~steep
        best, taken = choose(accepted, trial, best), torch.where(accepted, step, taken)
        pending = pending & ~accepted
        high = torch.where(pending & ~enough, step, high)
        low = torch.where(pending & enough, step, low)
        # A point that only fails the curvature condition is kept in hand: it does lower the loss.
        partial = pending & enough & (trial.f < best.f)
        best, taken = choose(partial, trial, best), torch.where(partial, step, taken)
        step = torch.where(torch.isinf(high), 2 * low, (low + high) / 2)
    return best, taken, active & (taken > 0)


Direction = Callable[[Evaluation, Tensor], tuple[Tensor, Tensor, Tensor]]


def descend(
    problem: Problem,
    gtol: float | Tensor | None,
    max_steps: int,
    direction: Direction,
    nearness: Nearness | None = None,
    watch: Watch | None = None,
) -> Solution[Tensor]:
    """Line-search descent.

    Args:
        direction: from the point and the last step sizes (0 at first) to directions ``[*batch, n]``, the step sizes to
            try first, and where such a step, made of positive curvature, predicts the solution.
        nearness: the rule that ends it, in place of ``gtol``. watch: who is told of each step.
    """
    at = halfway = before = problem.start
    progress = Progress.begin(at, gtol)
    if nearness is not None:
        progress.mark(progress.active, Result.MAX_STEPS)
    size = torch.zeros_like(at.f)
    for step in range(max_steps + 1):
        going = bool(progress.active.any())
        near = None
        if going:
            towards, first, known = direction(at, size)
        if going and nearness is not None:
            predicted, decrement = first * norm(towards), first * dot(at.g, towards).abs()
            predicted = torch.where(known | (decrement == 0), predicted, torch.inf)
            progress.end(nearness.look(predicted, at.y, decrement, at.f), Result.CONVERGED)
            near = nearness.acceptable
            going = bool(progress.active.any())
        if watch is not None and watch(step, at.y, at.g, at.f, progress.active):
            progress.stop()
            break
        if not going or step == max_steps:
            break
        if step & (step - 1) == 0:  # 0, 1, 2, 4, 8, ...
            before, halfway = halfway, at
        at, size, moved = line_search(problem, at, towards, first, progress.active, near)
        progress.count()
        progress.look(at)
        if nearness is not None:
            progress.end(~moved & nearness.acceptable, Result.CONVERGED)
        progress.end(~moved, Result.STAGNATED)
    progress.mark(_grows(progress, at, before, problem.start, nearness) & (at.f < halfway.f), Result.UNBOUNDED)
    return progress.solution(
        at.y, step_size=size, loss=at.f, **({} if nearness is None else {"step_norm": nearness.predicted})
    )


def _grows(
    progress: Progress, at: Evaluation, before: Evaluation, start: Evaluation, nearness: Nearness | None
) -> Tensor:
    """Which problems did not end although their params still move away from the start by steps that do not shrink."""
    unfinished = (progress.codes == int(Result.MAX_STEPS)) | (progress.codes == int(Result.STAGNATED))
    growing = norm(at.y - start.y) > GROWTH * norm(before.y - start.y)
    if nearness is not None:
        growing = growing & ~(nearness.predicted <= 1e-3 * norm(at.y))
    return unfinished & growing & (progress.steps >= ENOUGH_STEPS)
