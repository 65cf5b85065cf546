"""Quasi-Newton descent inside bounds: steps that are projected, on the params that are free to move."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import Evaluation, Problem
from ..prox.parts import within
from ..recording import recording
from ..solution import Result, Solution
from ..tree import Tree, axpy, dot, norm, scale
from .descent import FEW_TRIALS, HIDDEN, MAX_TRIALS, ROUNDING, SUFFICIENT_DECREASE, grows, ran_away
from .minimize import Progress, choose
from .nearness import Nearness
from .pairs import first_step, pair_of, two_loops, unit_of
from .watch import Watch


@dataclass(frozen=True)
class Bounds:
    """``low <= y <= high``, both flat, ``[*batch, n]``."""

    low: Tensor
    high: Tensor

    def clip(self, y: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(y, self.low), self.high)

    def held(self, at: Evaluation, gap: Tensor | None = None) -> Tensor:
        """Which params a bound holds against their slope; with a ``gap [*batch]`` those that are as near, too."""
        slack = torch.zeros_like(at.y) if gap is None else scale(gap, torch.ones_like(at.y))
        return ((at.y - self.low <= slack) & (at.g > 0)) | ((self.high - at.y <= slack) & (at.g < 0))

    def slope(self, at: Evaluation) -> Tensor:
        """The gradient of the params that are free to move, zero for those that are held."""
        return torch.where(self.held(at), torch.zeros_like(at.g), at.g)

    def free(self, at: Evaluation) -> Evaluation:
        """The point with that gradient."""
        return Evaluation(at.y, at.f, self.slope(at))


def box_of(problem: Problem, bounds: tuple[Tree, Tree]) -> Bounds:
    """The bounds as the solver of a problem sees them; those of the hyperparameters, where these are derived by."""
    like = problem.start.y.detach()
    shrink = problem.shrink or within(bounds, problem.tree).prox
    one = torch.ones_like(problem.start.f)
    with torch.no_grad():
        return Bounds(*(shrink(torch.full_like(like, side), one) for side in (-torch.inf, torch.inf)))


def check_bounds(bounds: object) -> None:
    """Refuse what is no pair of bounds."""
    if bounds is not None and not (isinstance(bounds, tuple) and len(bounds) == 2):
        raise ValueError(f"bounds is {bounds!r}: a pair (lower, upper) is needed, where None is no bound.")


def descend_within(
    problem: Problem, box: Bounds, gtol: float | None, max_steps: int, history: int, watch: Watch | None = None
) -> Solution[Tensor]:
    """Two-metric projection (Bertsekas 1982) with the inverse Hessian of L-BFGS on the free params."""
    start = problem.start
    inside = box.clip(start.y)
    at = start if recording() or torch.equal(inside, start.y) else problem.evaluate(inside)
    memory = BoundedMemory(problem, at, box, history)
    halfway = before = begin = at
    progress = Progress.begin(box.free(at), gtol)
    nearness = Nearness(at.y, problem.raveler.coarsest) if gtol is None else None
    if nearness is not None:
        progress.mark(progress.active, Result.MAX_STEPS)
    for step in range(max_steps + 1):
        near = None
        if bool(progress.active.any()):
            towards, _, known = memory(at, at.f)
            if nearness is not None:
                move = box.clip(at.y + towards) - at.y
                decrement = dot(at.g, move).abs()
                predicted = torch.where(known | (decrement == 0), norm(move), torch.inf)
                progress.end(nearness.look(predicted, at.y, decrement, at.f), Result.CONVERGED)
                near = nearness.acceptable
        if watch is not None and watch(step, at.y, box.slope(at), at.f, progress.active):
            progress.stop()
            break
        if step == max_steps or not bool(progress.active.any()):
            break
        if step & (step - 1) == 0:
            before, halfway = halfway, at
        at, moved = _search(problem, box, at, towards, progress.active, near)
        progress.count()
        progress.look(box.free(at))
        if nearness is not None:
            progress.end(~moved & nearness.acceptable, Result.CONVERGED)
        progress.end(~moved, Result.STAGNATED)
    unbounded = (grows(progress, at, before, begin, nearness) & (at.f < halfway.f)) | ran_away(at, begin)
    progress.mark(unbounded, Result.UNBOUNDED)
    stats = {} if nearness is None else {"step_norm": nearness.predicted}
    return progress.solution(at.y, loss=at.f, **stats)


class BoundedMemory:
    """Curvature pairs, of which each step takes the part of the params that are free there."""

    def __init__(self, problem: Problem, at: Evaluation, box: Bounds, history: int):
        self.box, self.history = box, history
        self.unit = unit_of(at.g)
        self.changes: list[tuple[Tensor, Tensor]] = []
        self.previous: Evaluation | None = None
        self.first = first_step(problem, at)
        self.gap = torch.full_like(at.f, torch.inf)

    def __call__(self, at: Evaluation, last: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        """As `pairs.Memory`; the direction is to be projected."""
        if self.previous is None:
            self.previous = at
            downhill, length, curved = self.first
            self.gamma = torch.where(length > 0, length, torch.ones_like(length))
            return scale(length, downhill), torch.ones_like(length), curved
        step = at.y - self.previous.y
        self.changes = [*self.changes, (step, scale(self.unit, at.g - self.previous.g))][-self.history :]
        self.previous = at
        g = scale(self.unit, at.g)
        # Params as near to their bound as a step along the gradient goes are held by it, with a metric of their own.
        self.gap = torch.minimum(self.gap, norm(self.box.clip(at.y - scale(self.gamma, g)) - at.y))
        held = self.box.held(at, self.gap)
        zero = torch.zeros_like(g)
        among = [pair_of(*(torch.where(held, zero, part) for part in change)) for change in self.changes]
        _, size, useful = among[-1]
        self.gamma = torch.where(useful, size, self.gamma)
        free = two_loops([pair for pair, _, _ in among], self.gamma, torch.where(held, zero, g))
        towards = -torch.where(held, scale(self.gamma, g), free)
        return towards, torch.ones_like(at.f), useful | held.all(-1)


def _search(
    problem: Problem, box: Bounds, at: Evaluation, towards: Tensor, active: Tensor, near: Tensor | None
) -> tuple[Evaluation, Tensor]:
    """Backtracking along the projected arc, each problem by itself; near the solution judged by the slopes too.

    Returns:
        The points, and the mask of success.
    """
    step, pending, best = torch.ones_like(at.f), active, at
    rounding = torch.finfo(at.g.dtype).eps ** ROUNDING * at.f.abs()
    for trials in range(MAX_TRIALS):
        if near is not None and trials == FEW_TRIALS:
            pending = pending & ~near
        if not bool(pending.any()):
            break
        y = box.clip(axpy(torch.where(pending, step, torch.zeros_like(step)), towards, at.y))
        trial = problem.evaluate(y)
        slope = dot(at.g, y - at.y)
        decreased = trial.f <= at.f + SUFFICIENT_DECREASE * slope
        hidden = (trial.f <= at.f + rounding) & (-slope <= HIDDEN * rounding)
        level = hidden & (dot(trial.g, y - at.y) <= (2 * SUFFICIENT_DECREASE - 1) * slope)
        accepted = pending & (slope < 0) & (decreased | level)
        best = choose(accepted, trial, best)
        pending = pending & ~accepted
        step = torch.where(pending, step / 2, step)
    return best, active & ~pending & (best.y != at.y).any(-1)


def snapped(box: Bounds, y: Tensor, g: Tensor, slack: float = 1e-6) -> Tensor:
    """Params that a solver left a little inside of the bound that holds them, on it."""
    for bound, pulls in ((box.low, g > 0), (box.high, g < 0)):
        close = torch.isfinite(bound) & ((y - bound).abs() <= slack * bound.abs().clamp_min(1.0))
        y = torch.where(close & pulls, bound, y)
    return box.clip(y)
