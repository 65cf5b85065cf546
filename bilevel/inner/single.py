"""L-BFGS of one small problem in Python's numbers: the rules of `descent`, `pairs` and `nearness` without masks.

An operation on a tensor takes a microsecond however small it is, and the rules for a batch are some hundred of them a
step, more than the gradients of a small problem. One problem needs no mask: what is a tensor of the batch shape there
is a number here, and vectors are NumPy's. The steps, the evaluations and the results are the same.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..linalg.single import as_vector
from ..problem import Problem
from ..solution import Result, Solution
from .descent import (
    CURVATURE,
    ENOUGH_STEPS,
    FEW_TRIALS,
    GROWTH,
    HIDDEN,
    MAX_TRIALS,
    ROUNDING,
    SUFFICIENT_DECREASE,
)
from .nearness import PATIENCE, STILL, VANISHED, Goal


@dataclass(frozen=True)
class _At:
    """A point: the params, the loss, and the gradient with its norm."""

    y: np.ndarray
    f: float
    g: np.ndarray
    slope: float


class _Evaluated:
    """A `Problem` from float64 vectors of NumPy to the same, by way of params of its own precision."""

    def __init__(self, problem: Problem):
        self.problem, self.dtype = problem, problem.start.y.dtype
        at = problem.start
        g = as_vector(at.g)
        self.start = _At(as_vector(at.y), float(at.f), g, _norm(g))

    def __call__(self, y: np.ndarray) -> _At:
        if self.dtype is torch.float32:
            y = y.astype(np.float32).astype(np.float64)
        f, g = self.problem.in_numbers(y)
        return _At(y, f, g, _norm(g))


def descend_single(problem: Problem, gtol: float | None, max_steps: int, history: int) -> Solution[Tensor]:
    """L-BFGS; as `descent.descend` with a `pairs.Memory`, and a `Nearness` where there is no ``gtol``."""
    with np.errstate(all="ignore"):
        walk = _Walk(problem, gtol, history)
        halfway = before = walk.start
        walk.turn()
        for step in range(max_steps):
            if walk.code is not None:
                break
            if step & (step - 1) == 0:  # 0, 1, 2, 4, 8, ...
                before, halfway = halfway, walk.at
            walk.step()
        code = Result.MAX_STEPS if walk.code is None else walk.code
        if (walk.grows(code, before) and walk.at.f < halfway.f) or walk.ran_away():
            code = Result.UNBOUNDED
    return walk.solution(code)


class _Walk:
    """Where the descent stands; ``code`` is None as long as it goes on."""

    def __init__(self, problem: Problem, gtol: float | None, history: int):
        self.evaluate, self.gtol = _Evaluated(problem), gtol
        self.at = self.start = self.evaluate.start
        kind = torch.finfo(self.evaluate.dtype)
        self.eps = kind.eps
        self.nearness = (
            _Nearness(self.start.y, Goal.of(self.evaluate.dtype, problem.raveler.coarsest)) if gtol is None else None
        )
        self.memory = _Memory(history, self.start, kind)
        self.steps, self.size, self.code = 0, 0.0, self._look()
        self.towards, self.first = self.start.g, 0.0

    def _look(self) -> Result | None:
        if self.gtol is not None and self.at.slope <= self.gtol:
            return Result.CONVERGED
        return None if math.isfinite(self.at.slope) and math.isfinite(self.at.f) else Result.NONFINITE

    def turn(self) -> None:
        """Find the next direction, and end where the solution is near."""
        if self.code is not None:
            return
        if self.steps:
            known = self.memory.remember(self.at)
            self.towards, self.first = self.memory.direction(self.at.g), 1.0
        else:
            self.towards, self.first, known = self._cautious() if self.nearness is None else self._first_step()
        if self.nearness is not None:
            predicted = self.first * _norm(self.towards)
            decrement = self.first * abs(float(self.at.g.dot(self.towards)))
            known = known or decrement == 0
            if self.nearness.look(predicted if known else math.inf, self.at, decrement):
                self.code = Result.CONVERGED

    def step(self) -> None:
        """A line search, and the next direction."""
        new, self.size = self._search()
        self.at, self.steps = new or self.at, self.steps + 1
        self.code = self._look()
        if self.code is None and new is None:
            near = self.nearness is not None and self.nearness.acceptable
            self.code = Result.CONVERGED if near else Result.STAGNATED
        self.turn()

    def _search(self) -> tuple[_At | None, float]:
        """As `descent.LineSearch`: the accepted point, None where there is none, and the step size."""
        at, towards, step = self.at, self.towards, self.first
        slope = float(at.g.dot(towards))
        low, high, best, taken = 0.0, math.inf, None, 0.0
        rounding = self.eps**ROUNDING * abs(at.f)
        near = self.nearness is not None and self.nearness.acceptable
        for _ in range(FEW_TRIALS if near else MAX_TRIALS):
            if not slope < 0:
                break
            trial = self.evaluate(at.y + step * towards)
            new_slope = float(trial.g.dot(towards))
            decreased = trial.f <= at.f + SUFFICIENT_DECREASE * step * slope
            hidden = trial.f <= at.f + rounding and -step * slope <= HIDDEN * rounding
            level = hidden and new_slope <= (2 * SUFFICIENT_DECREASE - 1) * slope
            if not (decreased or level):
                high = step
            elif not new_slope < CURVATURE * slope:
                return (trial, step) if step > 0 else (None, 0.0)
            else:
                low = step
                if trial.f < (at if best is None else best).f:  # it fails the curvature condition only
                    best, taken = trial, step
            step = 2 * low if math.isinf(high) else (low + high) / 2
        return (best, taken) if taken > 0 else (None, taken)

    def _cautious(self) -> tuple[np.ndarray, float, bool]:
        slope = self.at.slope
        return (-self.at.g / slope if slope > 0 else 0 * self.at.g), min(slope, 1.0), False

    def _first_step(self) -> tuple[np.ndarray, float, bool]:
        """As `pairs.first_step`."""
        at, size = self.at, _norm(self.at.y)
        if not at.slope > 0:
            return 0 * at.g, 0.0, False
        to_zero = abs(at.f) / at.slope
        if not (to_zero > 0 and math.isfinite(to_zero)):
            to_zero = 1.0
        reach = size if size > 0 else to_zero
        step = self._along_gradient(reach)
        if not step > 0:  # too near for the rounding of the gradient
            step = self._along_gradient(math.sqrt(reach * to_zero))
        curved = step > 0
        return -at.g / at.slope, step * at.slope if curved else to_zero, curved

    def _along_gradient(self, length: float) -> float:
        """One over the curvature along the gradient; zero where it does not show."""
        at = self.at
        reach = self.eps**0.5 * length / at.slope
        reach = reach if math.isfinite(reach) else 0.0
        ahead = self.evaluate(at.y - reach * at.g)
        curvature = float(((at.g - ahead.g) / at.slope) @ (at.g / at.slope))
        step = reach / curvature if curvature else 0.0
        return step if math.isfinite(step) else 0.0

    def ran_away(self) -> bool:
        """As `descent.ran_away`."""
        at, start, far, size = self.at, self.start, self.eps**-1.25, _norm(self.start.y)
        scale = max(abs(start.f), start.slope * size)
        return _norm(at.y) > far * size and at.f < -far * scale and scale > 0 and at.slope > 1e-3 * start.slope

    def grows(self, code: Result, before: _At) -> bool:
        """As `descent.grows`."""
        unfinished = code in (Result.MAX_STEPS, Result.STAGNATED) and self.steps >= ENOUGH_STEPS
        growing = _norm(self.at.y - self.start.y) > GROWTH * _norm(before.y - self.start.y)
        nearness = self.nearness
        return unfinished and growing and not (nearness and nearness.predicted <= 1e-3 * _norm(self.at.y))

    def solution(self, code: Result) -> Solution[Tensor]:
        """What was found, as tensors."""
        numbers = {"step_size": self.size, "loss": self.at.f}
        if self.nearness is not None:
            numbers["step_norm"] = self.nearness.predicted
        stats = {
            "num_steps": torch.tensor(self.steps, device="cpu"),
            "result": torch.tensor(int(code), dtype=torch.int8, device="cpu"),
            **{name: torch.tensor(number, dtype=torch.float64, device="cpu") for name, number in numbers.items()},
        }
        return Solution(torch.from_numpy(self.at.y).to(self.evaluate.dtype), stats)


class _Nearness:
    """As `nearness.Nearness`."""

    def __init__(self, start: np.ndarray, goal: Goal):
        self.start, self.goal = start, goal
        self.predicted = self.first = self.least = math.inf
        self.largest = 0.0
        self.idle, self.near, self.flat = 0, False, False

    def look(self, predicted: float, at: _At, decrement: float) -> bool:
        """Whether the problem has arrived."""
        last, size, wanted = self.predicted, _norm(at.y), self.goal.wanted
        both = max(predicted, predicted if math.isinf(last) else math.sqrt(predicted * last))
        self.predicted = predicted
        self.near = both <= self.goal.accepted * size
        if math.isinf(self.first):
            self.first = decrement
        self.flat = decrement <= 2 * wanted**2 * abs(at.f) and decrement <= wanted * self.first
        known, self.largest = self.largest > 0, max(self.largest, decrement if math.isfinite(decrement) else 0.0)
        fallen = decrement <= self.goal.promised**2 * self.largest
        settled = not known or fallen or predicted <= STILL * wanted * size
        if self.acceptable and not predicted <= 0.5 * self.least:
            self.idle += 1
        else:
            self.idle, self.least = 0, predicted
        reached = settled and both <= max(wanted * size, VANISHED * _norm(at.y - self.start))
        return reached or self.idle >= (2 if self.flat else PATIENCE)

    @property
    def acceptable(self) -> bool:
        return self.near or self.flat


class _Memory:
    """As `pairs.Memory` and its two loops."""

    def __init__(self, history: int, start: _At, kind: torch.finfo):
        self.start, self.last = start.y, start
        self.eps, self.tiny, self.gamma = kind.eps, kind.tiny, 1.0
        self.unit = 1 / start.slope if start.slope > 0 and math.isfinite(start.slope) else 1.0
        self.pairs: deque[tuple[np.ndarray, np.ndarray, float]] = deque(maxlen=history)

    def remember(self, at: _At) -> bool:
        """Keep the last step; whether its curvature is positive."""
        s, y = at.y - self.last.y, self.unit * (at.g - self.last.g)
        self.last = at
        curvature, yy = float(s.dot(y)), float(y.dot(y))
        useful = curvature > self.eps * _norm(s) * math.sqrt(yy)
        if useful:  # a loss that falls without end is not followed to where it underflows; params may go to zero
            way = at.y - self.start
            followed = yy * float(way.dot(way)) > self.tiny * float(s.dot(s))
            self.gamma = curvature / yy if followed and yy > 0 else math.inf
        self.pairs.append((s, y, 1 / curvature if useful else 0.0))
        return useful

    def direction(self, g: np.ndarray) -> np.ndarray:
        """Minus the inverse Hessian times the gradient."""
        q, alphas = self.unit * g, []
        for s, y, rho in reversed(self.pairs):
            alphas.append(rho * s.dot(q))
            q -= alphas[-1] * y
        q *= self.gamma
        for (s, y, rho), alpha in zip(self.pairs, reversed(alphas), strict=True):
            q += (alpha - rho * y.dot(q)) * s
        return -q


def _norm(a: np.ndarray) -> float:
    return math.sqrt(a.dot(a))
