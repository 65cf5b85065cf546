"""Proximal gradient descent, for smooth losses with a penalty or constraint that is not smooth; batched."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_fields
from ..linalg.noise import signs
from ..linalg.solve import stop_now
from ..problem import Evaluation, Objective, Problem, Shrink
from ..prox import Prox
from ..prox.parts import on_leaves
from ..solution import Result, Solution, marked
from ..tree import Tree, axpy, dot, norm, on_host, scale
from .decay import with_decay
from .minimize import InnerSolver, Progress, check_tolerance, choose
from .nearness import Goal
from .outcome import look_closer, suspicious
from .watch import Callbacks, watch


@dataclass(frozen=True)
class ProximalGradient:
    """``y <- prox(y - eta grad g(y), eta)``, accelerated (FISTA, Beck and Teboulle 2009), with backtracking.

    `argmin` with this solver minimises ``g + prox.value``: lasso, elastic net, group lasso, box, simplex and ball
    constraints. Its solution is differentiable towards everything that g and the prox reach, by the implicit function
    theorem on ``y = prox(y - eta grad g(y), eta)``. T problems have each their step size, momentum and stopping.

    Args:
        prox: of `bilevel.prox`; or a tree like ``init`` with one, or None, for each leaf.
        step_size: eta to start with; None: ``1 / curvature`` at the start, one more gradient. Halved for a problem
            whenever its loss lies above the quadratic model.
        max_steps: steps at most, two gradients each (one without acceleration), and one for each halving.
        tol: stop a problem at ``||y - prox(y - eta grad g(y), eta)|| / eta``; None: where the distance to the solution,
            as the contraction of the last steps predicts it, is at most 1e-9 (float64) or 3e-5 (float32) times
            ``||y|| + eta ||grad g||``, or as far as rounding allows: `Result.INACCURATE` where that is more than 1e-7
            (3e-4).
        callback: called with each `InnerStep`; it ends the solve where it returns True. Or several of them.
        accelerated: Nesterov's extrapolation, started again where it points uphill (O'Donoghue and Candes 2015).
    """

    prox: Prox | dict[str, object] | list[object] | tuple[object, ...]
    step_size: float | None = None
    max_steps: int = 5000
    tol: float | None = None
    accelerated: bool = True
    callback: Callbacks = field(default=None, repr=False, compare=False, kw_only=True)

    own_stats: ClassVar[tuple[str, ...]] = ("residual_norm",)
    """At the solver's own step, as it was judged."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_tolerance(max_steps=self.max_steps, tol=self.tol)
        if not isinstance(self.prox, Prox | dict | list | tuple):
            raise TypeError(
                f"prox is {self.prox!r}: it is one of bilevel.prox, such as prox.L1(0.1), or a tree of them."
            )
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size is {self.step_size}: it must be positive.")

    def prox_for(self, init: Tree) -> Prox:
        """What acts on the flat params."""
        return on_leaves(self.prox, init)

    def minimize(self, problem: Problem) -> Solution[Tensor]:
        """Minimise; see `InnerSolver`."""
        shrink = problem.shrink or self.prox_for(problem.tree).prox
        ahead = at = problem.start
        step = self._first_step(problem)
        t, r = torch.ones_like(step), residual(shrink, at, step)
        size, stretch = norm(r) / step, torch.ones_like(step)
        progress = Progress.begin(at, None)
        progress.mark(progress.active, Result.MAX_STEPS)
        progress.end(size <= self._tolerance(at, step, stretch), Result.CONVERGED)
        told, alone = watch(self, problem), torch.ones_like(progress.active)
        for index in range(self.max_steps + 1):
            if told is not None and told(index, at.y, scale(1 / step, r), at.f, progress.active):
                progress.stop()
            if index == self.max_steps or stop_now(progress.active, index):
                break
            new, tried, moved = _step(problem, shrink, ahead, step, progress.active)
            step = torch.where(moved, tried, step)
            progress.count()
            # The step from `ahead` is a descent direction; where the momentum opposes it, momentum does harm.
            restart = (dot(ahead.y - new.y, new.y - at.y) > 0) | ~moved
            t = torch.where(restart, torch.ones_like(t), t)
            t_next = (1 + (1 + 4 * t.square()).sqrt()) / 2
            momentum = torch.where(restart, torch.zeros_like(t), (t - 1) / t_next)
            last, at, t = at, choose(moved, new, at), t_next
            before, r = r, residual(shrink, at, step)
            size = norm(r) / step
            # The distance to the solution is longer than the step by as much as the last steps changed it less.
            longer = (norm(at.y - last.y) / norm(r - before)).nan_to_num(1.0, 1.0).clamp_min(1.0)
            stretch = torch.maximum(longer, stretch**0.97)
            progress.end(size <= self._tolerance(at, step, stretch), Result.CONVERGED)
            progress.end(~moved & alone, Result.STAGNATED)
            if self.accelerated:
                extrapolated = axpy(momentum, at.y - last.y, at.y)
                ahead = problem.evaluate(torch.where(progress.active.unsqueeze(-1), extrapolated, at.y))
                inside = torch.isfinite(ahead.f) & torch.isfinite(norm(ahead.g))  # momentum may leave the domain
                ahead, t = choose(inside, ahead, at), torch.where(inside, t, torch.ones_like(t))
                alone = (momentum == 0) | ~inside
            else:
                ahead = at
        if self.tol is not None:
            return progress.solution(at.y, residual_norm=size, step_size=step)
        found = progress.solution(at.y, residual_norm=size, step_size=step, step_norm=stretch * norm(r))
        far = found.stats["step_norm"] > Goal.of(at.g.dtype).accepted * step * terms(at, step)
        converged = found.stats["result"] == int(Result.CONVERGED)
        return found.with_stats(result=marked(found.stats["result"], converged & far, Result.INACCURATE))

    def _first_step(self, problem: Problem) -> Tensor:
        at = problem.start
        if self.step_size is not None:
            return torch.full_like(at.f, float(on_host(self.step_size).detach()))
        size = norm(at.y)
        for _ in range(REACHES):
            step, seen = curvature_seen(lambda y: problem.evaluate(y).g, at.y, at.g, size)
            if bool(seen.all()):
                break
            # Params that start at zero have no scale: where the gradient does not change, a larger one is tried.
            size = torch.where(seen, size, torch.where(size > 0, size, torch.ones_like(size)) * 1e3)
        return step

    def _tolerance(self, at: Evaluation, step: Tensor, stretch: Tensor) -> Tensor:
        if self.tol is not None:
            return torch.full_like(at.f, self.tol)
        # Both terms of y - eta g are as accurate as rounding, and no less is asked for.
        least = torch.full_like(step, 2 * torch.finfo(at.g.dtype).eps)
        return torch.maximum(0.1 * Goal.of(at.g.dtype).wanted / stretch, least) * terms(at, step)


def terms(at: Evaluation, step: Tensor) -> Tensor:
    """``||y|| / eta + ||grad g||``, beside which the residual is small or not."""
    return norm(at.y) / step + norm(at.g)


def prox_of(solver: InnerSolver, init: Tree) -> Prox | None:
    """The prox of a solver of ``objective + prox.value``, on the flat params; None: its problems are smooth."""
    made: Callable[[Tree], Prox | None] | None = getattr(solver, "prox_for", None)
    return None if made is None else made(init)


def minimises_more(solver: InnerSolver, objective: Objective, init: Tree, warn: bool = False) -> bool:
    """Whether a solver has a weight decay, bounds or a prox, so that its solutions are not those of the objective.

    Args:
        warn: let a decay be heard that belongs to no objective; see `with_decay`.
    """
    return with_decay(solver, objective, init, warn)[1] is not objective or prox_of(solver, init) is not None


def own_stats_of(solver: InnerSolver) -> tuple[str, ...]:
    """Names of stats that a solver knows better than they can be measured."""
    return getattr(solver, "own_stats", ())


def residual(shrink: Shrink, at: Evaluation, step: Tensor) -> Tensor:
    """``y - prox(y - eta g, eta)``, ``[*batch, n]``: eta times the gradient where the prox does nothing."""
    with torch.no_grad():
        return at.y - shrink(at.y - scale(step, at.g), step)


def free_params(problem: Problem, y: Tensor, separable: bool) -> Tensor:
    """Which params the prox leaves free to move about ``y``, ``[*batch, n]``: where it hands small changes on.

    Args:
        separable: whether each param may be free by itself; otherwise all are, or none.
    """
    shrink, at = problem.shrink, problem.evaluate(y)
    assert shrink is not None
    step = inverse_curvature(lambda y: problem.evaluate(y).g, y, at.g)
    z = y - scale(step, at.g)
    size = torch.finfo(y.dtype).eps ** 0.5 * norm(z).clamp_min(1.0)
    change, free = scale(size, signs(y.shape, 0, y.device).to(y.dtype)), torch.zeros_like(z, dtype=torch.bool)
    with torch.no_grad():
        here = shrink(z, step)
        for moved in (change, -change):  # a param that rests on its bound may leave it one way
            free = free | ((shrink(z + moved, step) - here - moved).abs() <= 1e-2 * moved.abs())
    return free if separable else free.all(-1, keepdim=True).expand_as(free)


def look_closer_inside(separable: bool, problem: Problem, found: Solution) -> Solution[Tensor]:
    """`look_closer` at the params that the prox leaves free to move."""
    if not bool(suspicious(found).any()):
        return found
    return look_closer(problem, found, free_params(problem, found.value.detach(), separable))


def inverse_curvature(gradient: Callable[[Tensor], Tensor], y: Tensor, g: Tensor) -> Tensor:
    """About ``1 / L``: one over the curvature along one fixed direction of signs, ``[*batch]`` float64, detached.

    A difference of two gradients: no Hessian product. 1 where the gradient does not change.
    """
    return curvature_seen(gradient, y, g, norm(y.detach()))[0]


REACHES = 8
"""How often the curvature at the start is looked for, ever farther away."""


def curvature_seen(gradient: Callable[[Tensor], Tensor], y: Tensor, g: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The same over a small part of ``size`` (1 for 0), and where the gradient changed by more than rounding."""
    count, roundoff = y.shape[-1], torch.finfo(y.dtype).eps
    # Signs without a pattern (multiples of the golden ratio): they meet every eigenvector, and are always the same.
    turns = torch.arange(count, device=y.device, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2)
    signs = torch.where(turns % 1 < 0.5, 1.0, -1.0).to(y.dtype)
    length = math.sqrt(roundoff) * torch.where(size > 0, size, torch.ones_like(size))
    change = norm(gradient(y.detach() + scale(length / math.sqrt(count), signs)).detach() - g.detach())
    step = length / change
    largest = torch.finfo(y.dtype).max / 1e6
    seen = (change > 0) & torch.isfinite(step)
    plain = change > 10 * roundoff * norm(g.detach())
    return torch.where(seen, step, torch.ones_like(step)).clamp(1 / largest, largest), seen & plain


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
