"""Line-search descent, batched: every problem has its own bracket, step size and stopping."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..problem import Evaluation, Problem
from ..recording import free_looks
from ..solution import Result, Solution
from ..tree import axpy, dot, norm
from .minimize import Progress, choose
from .nearness import Nearness
from .watch import Watch

GROWTH, ENOUGH_STEPS = 1.5, 32
"""How much farther from the start the params are than when at most half of the steps were made, and how many steps it
takes to say that a loss may have no minimum."""

SUFFICIENT_DECREASE = 1e-4
CURVATURE = 0.9

ROUNDING, HIDDEN = 0.75, 4.0
"""Losses are as accurate as this power of the dtype's eps, relative to their size; a step is judged by its slopes where
it promises at most so many times that: a longer one that does not lower the loss has missed the minimum."""

MAX_TRIALS, FEW_TRIALS = 60, 5

TRIALS_UNSEEN = 3
"""Trials of a line search between two looks at whether it has ended, where a look is not free."""


class LineSearch:
    """Bisection to a weak Wolfe point (Lewis and Overton 2013), each problem with its own bracket.

    Near the minimum, where the losses differ by rounding only, the decrease is judged by the slopes instead
    (the approximate Wolfe condition of Hager and Zhang 2005), so that small gradient norms can be reached.

    Args:
        at: where the search starts: points ``[*batch, n]`` with their losses and gradients.
        direction: ``[*batch, n]``, downhill. step: ``[*batch]``, the sizes to try first.
        active: ``[*batch]``, the problems that take part.
        near: problems that are near their minimum, where a step that fails does so by rounding: few trials tell.

    Attributes:
        best, taken: the accepted points (the old ones where none was found yet), and the step sizes there.
        moved: where a step was found. pending: the problems that are still searching.
    """

    def __init__(
        self,
        problem: Problem,
        at: Evaluation,
        direction: Tensor,
        step: Tensor,
        active: Tensor,
        near: Tensor | None = None,
    ):
        self.problem, self.at, self.direction, self.step = problem, at, direction, step
        self.active, self.near, self.trials = active, near, 0
        self.slope = dot(at.g, direction)
        self.low, self.high = torch.zeros_like(step), torch.full_like(step, torch.inf)
        self.pending, self.best, self.taken = active & (self.slope < 0), at, torch.zeros_like(step)
        self.rounding = torch.finfo(at.g.dtype).eps ** ROUNDING * at.f.abs()

    def advance(self, trials: int, free: bool = False) -> None:
        """Some more trials; where looks are not free nothing looks at a value."""
        for _ in range(trials):
            trial, enough = self._try()
            if not (free and not bool(self.pending.any())):
                self._narrow(trial, enough)
            self.trials += 1
            if self.trials == FEW_TRIALS and self.near is not None:
                self.pending = self.pending & ~self.near
            if self.trials >= MAX_TRIALS:
                self.pending = torch.zeros_like(self.pending)

    def run(self) -> LineSearch:
        """All trials that it takes, with a look after each whether it has ended; the search itself is returned."""
        while self.trials < MAX_TRIALS and bool(self.pending.any()):
            self.advance(1, free=True)
        return self

    @property
    def moved(self) -> Tensor:
        """Where a step was found."""
        return self.active & (self.taken > 0)

    def _try(self) -> tuple[Evaluation, Tensor]:
        """The points at the present step sizes, and where the loss falls enough there; what suffices is accepted."""
        pending, step, at = self.pending, self.step, self.at
        move = torch.where(pending, step, torch.zeros_like(step))
        trial = self.problem.evaluate(axpy(move, self.direction, at.y))
        new_slope = dot(trial.g, self.direction)
        decreased = trial.f <= at.f + SUFFICIENT_DECREASE * step * self.slope
        hidden = (trial.f <= at.f + self.rounding) & (-step * self.slope <= HIDDEN * self.rounding)
        level = hidden & (new_slope <= (2 * SUFFICIENT_DECREASE - 1) * self.slope)
        enough, steep = decreased | level, new_slope < CURVATURE * self.slope
        accepted = pending & enough & ~steep
        self.best, self.taken = choose(accepted, trial, self.best), torch.where(accepted, step, self.taken)
        self.pending = pending & ~accepted
        return trial, enough

    def _narrow(self, trial: Evaluation, enough: Tensor) -> None:
        """The brackets of the problems that are still searching, and the next step sizes."""
        pending, step = self.pending, self.step
        self.high = torch.where(pending & ~enough, step, self.high)
        self.low = torch.where(pending & enough, step, self.low)
        # A point that only fails the curvature condition is kept in hand: it does lower the loss.
        partial = pending & enough & (trial.f < self.best.f)
        self.best, self.taken = choose(partial, trial, self.best), torch.where(partial, step, self.taken)
        self.step = torch.where(torch.isinf(self.high), 2 * self.low, (self.low + self.high) / 2)


class Direction(Protocol):
    """From the point and the last step sizes (0 at first) to directions ``[*batch, n]``, the step sizes to try first,
    and where such a step, made of positive curvature, predicts the solution. ``copy.copy`` keeps what it remembers."""

    def __call__(self, at: Evaluation, last: Tensor, /) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass
class _Walk:
    """A descent between two line searches.

    Attributes:
        towards, first, near: of the next line search.
    """

    at: Evaluation
    size: Tensor
    progress: Progress
    direction: Direction
    nearness: Nearness | None
    towards: Tensor
    first: Tensor
    near: Tensor | None = None

    def after(self, search: LineSearch) -> _Walk:
        """The walk where that search has ended; this one stays as it was."""
        new = replace(
            self,
            at=search.best,
            size=search.taken,
            progress=copy.copy(self.progress),
            direction=copy.copy(self.direction),
            nearness=copy.copy(self.nearness),
        )
        new.progress.count()
        new.progress.look(new.at)
        if new.nearness is not None:
            new.progress.end(~search.moved & new.nearness.acceptable, Result.CONVERGED)
        new.progress.end(~search.moved, Result.STAGNATED)
        return new

    def turn(self) -> None:
        """Find the next direction, and end the problems that have arrived."""
        self.towards, self.first, known = self.direction(self.at, self.size)
        if self.nearness is not None:
            at, predicted = self.at, self.first * norm(self.towards)
            decrement = self.first * dot(at.g, self.towards).abs()
            predicted = torch.where(known | (decrement == 0), predicted, torch.inf)
            self.progress.end(self.nearness.look(predicted, at.y, decrement, at.f), Result.CONVERGED)
            self.near = self.nearness.acceptable

    def step(self, problem: Problem, free: bool) -> tuple[_Walk, bool]:
        """The walk after one more line search, and whether any problem is to go on.

        Args:
            free: looks are. Else it makes one: the next direction is found before it is known whether the line search
                has ended, and dropped where it has not.
        """
        search = LineSearch(problem, self.at, self.towards, self.first, self.progress.active, self.near)
        if free:
            new = self.after(search.run())
            return new, new.goes_on()
        search.advance(1)
        while True:
            new = self.after(search)
            new.turn()
            seen = int(2 * search.pending.any() + new.progress.active.any())
            if seen < 2:
                return new, seen == 1
            search.advance(TRIALS_UNSEEN)

    def goes_on(self) -> bool:
        """Turn, and look whether any problem is to go on."""
        if not bool(self.progress.active.any()):
            return False
        self.turn()
        return bool(self.progress.active.any())


def descend(
    problem: Problem,
    gtol: float | Tensor | None,
    max_steps: int,
    direction: Direction,
    nearness: Nearness | None = None,
    *,
    watch: Watch | None = None,
    cheap: bool = True,
) -> Solution[Tensor]:
    """Line-search descent.

    Args:
        nearness: the rule that ends it, in place of ``gtol``. watch: who is told of each step.
        cheap: finding a direction costs less than waiting for a value.
    """
    start = halfway = before = problem.start
    progress, size = Progress.begin(start, gtol), torch.zeros_like(start.f)
    if nearness is not None:
        progress.mark(progress.active, Result.MAX_STEPS)
    walk, free = _Walk(start, size, progress, direction, nearness, start.g, size), not cheap or free_looks(start.f)
    going = walk.goes_on() if free else True
    if not free:
        walk.turn()
    for step in range(max_steps + 1):
        if watch is not None and watch(step, walk.at.y, walk.at.g, walk.at.f, walk.progress.active):
            walk.progress.stop()
            break
        if not going or step == max_steps:
            break
        if step & (step - 1) == 0:  # 0, 1, 2, 4, 8, ...
            before, halfway = halfway, walk.at
        walk, going = walk.step(problem, free)
    progress, at, nearness = walk.progress, walk.at, walk.nearness
    progress.mark(grows(progress, at, before, start, nearness) & (at.f < halfway.f), Result.UNBOUNDED)
    progress.mark(ran_away(at, start), Result.UNBOUNDED)
    return progress.solution(
        at.y, step_size=walk.size, loss=at.f, **({} if nearness is None else {"step_norm": nearness.predicted})
    )


def ran_away(at: Evaluation, start: Evaluation) -> Tensor:
    """Which problems are so far from their start that nothing of it is left in rounding, params and loss alike.

    A loss that falls without end leads there. Every step is short beside such params, and gradients are rounding.
    """
    far, size, slope = torch.finfo(at.y.dtype).eps ** -1.25, norm(start.y), norm(start.g)
    scale = torch.maximum(start.f.abs(), slope * size)
    away: Tensor = (norm(at.y) > far * size) & (at.f < -far * scale) & (scale > 0) & (norm(at.g) > 1e-3 * slope)
    return away


def grows(
    progress: Progress, at: Evaluation, before: Evaluation, start: Evaluation, nearness: Nearness | None
) -> Tensor:
    """Which problems did not end although their params still move away from the start by steps that do not shrink."""
    unfinished = (progress.codes == int(Result.MAX_STEPS)) | (progress.codes == int(Result.STAGNATED))
    growing = norm(at.y - start.y) > GROWTH * norm(before.y - start.y)
    if nearness is not None:
        growing = growing & ~(nearness.predicted <= 1e-3 * norm(at.y))
    return unfinished & growing & (progress.steps >= ENOUGH_STEPS)
