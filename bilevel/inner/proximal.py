"""Proximal gradient descent, for smooth losses with a penalty or constraint that is not smooth; batched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import Evaluation, Problem, Shrink
from ..prox import Prox
from ..solution import Result, Solution, make_codes
from ..tree import dot, norm
from .minimize import check_tolerance, choose


@dataclass(frozen=True)
class ProximalGradient:
    """``y <- prox(y - eta grad g(y), eta)``, accelerated (FISTA, Beck and Teboulle 2009), with backtracking.

    `argmin` with this solver minimises ``g + prox.value``: lasso, elastic net, group lasso, box, simplex and ball
    constraints. Its solution is differentiable towards everything that g and the prox reach, by the implicit function
    theorem on ``y = prox(y - grad g(y))``. T problems have each their step size, momentum and stopping.

    Args:
        prox: of `bilevel.prox`.
        step_size: to start with; halved for a problem whenever its loss lies above the quadratic model.
        max_steps: steps at most, two gradients each (one without acceleration).
        tol: stop a problem at ``||y - prox(y - eta grad g(y), eta)|| / eta``; None: 1e-9 (float64) or 1e-4 (float32),
            times the gradient norm at the start where that is larger than one.
        accelerated: Nesterov's extrapolation, started again where it points uphill (O'Donoghue and Candes 2015).
    """

    prox: Prox
    step_size: float = 1.0
    max_steps: int = 5000
    tol: float | None = None
    accelerated: bool = True

    def __post_init__(self) -> None:
        check_tolerance(max_steps=self.max_steps, tol=self.tol)
        if not isinstance(self.prox, Prox):
            raise TypeError(f"prox is {self.prox!r}: it is one of bilevel.prox, such as prox.L1(0.1).")
        if not self.step_size > 0:
            raise ValueError(f"step_size is {self.step_size}: it must be positive.")

    def minimize(self, problem: Problem) -> Solution:
        """Minimise; see `InnerSolver`."""
        shrink = problem.shrink or self.prox.prox
        at, state = problem.start, self._begin(problem.start)
        ahead = at
        for _ in range(self.max_steps):
            if not bool(state.active.any()):
                break
            new, stalled = self._step(problem, shrink, ahead, state)
            state.steps = state.steps + state.active
            restart = dot(ahead.y - new.y, new.y - at.y) > 0
            t = torch.where(restart, torch.ones_like(state.t), state.t)
            t_next = (1 + (1 + 4 * t.square()).sqrt()) / 2
            momentum = torch.where(restart, torch.zeros_like(t), (t - 1) / t_next)
            state.t = t_next
            last, at = at, choose(state.active, new, at)
            state.look(_residual_norm(shrink, at, state.step), stalled)
            if self.accelerated:
                y = at.y + (momentum.unsqueeze(-1) * (at.y - last.y)).to(at.y.dtype)
                ahead = problem.evaluate(torch.where(state.active.unsqueeze(-1), y, at.y))
            else:
                ahead = at
        stats = {"num_steps": state.steps, "result": state.codes, "step_size": state.step}
        return Solution(at.y, stats)

    def _begin(self, at: Evaluation) -> _State:
        base = 1e-9 if at.g.dtype == torch.float64 else 1e-4
        tol = base * norm(at.g).clamp_min(1.0) if self.tol is None else self.tol
        codes = make_codes(Result.MAX_STEPS, at.f)
        step = torch.full_like(at.f, self.step_size)
        state = _State(
            torch.as_tensor(tol, dtype=torch.float64, device=at.f.device).expand_as(at.f),
            codes,
            torch.zeros_like(codes, dtype=torch.int64),
            torch.ones_like(codes, dtype=torch.bool),
            step,
            torch.ones_like(step),
        )
        return state

    def _step(self, problem: Problem, shrink: Shrink, at: Evaluation, state: _State) -> tuple[Evaluation, Tensor]:
        """One step from ``at``, its size halved until the quadratic model is an upper bound."""
        pending, best = state.active.clone(), at
        rounding = 1e3 * torch.finfo(at.g.dtype).eps * (1 + at.f.abs())
        for _ in range(60):
            with torch.no_grad():
                y = shrink(at.y - state.step.unsqueeze(-1).to(at.y.dtype) * at.g, state.step)
            trial = problem.evaluate(torch.where(pending.unsqueeze(-1), y, best.y))
            move = trial.y - at.y
            model = at.f + dot(at.g, move) + norm(move).square() / (2 * state.step)
            # Where losses differ by rounding only, the slopes tell instead.
            flat = (trial.f - at.f).abs() <= rounding
            curvature = dot(trial.g - at.g, move)
            enough = torch.where(flat, curvature <= norm(move).square() / state.step, trial.f <= model)
            accepted = pending & enough
            best = choose(accepted, trial, best)
            pending = pending & ~enough
            if not bool(pending.any()):
                break
            state.step = torch.where(pending, state.step / 2, state.step)
        return best, pending


def _residual_norm(shrink: Shrink, at: Evaluation, step: Tensor) -> Tensor:
    """``||y - prox(y - eta g, eta)|| / eta``, ``[*batch]`` float64."""
    with torch.no_grad():
        moved = shrink(at.y - step.unsqueeze(-1).to(at.y.dtype) * at.g, step)
    return norm(at.y - moved) / step


@dataclass
class _State:
    """Where each problem stands, ``[*batch]``."""

    tol: Tensor
    codes: Tensor
    steps: Tensor
    active: Tensor
    step: Tensor
    t: Tensor

    def look(self, residual: Tensor, stalled: Tensor) -> None:
        """End what is solved, what found no step, and what is not finite."""
        for where, result in (
            (residual <= self.tol, Result.CONVERGED),
            (stalled, Result.STAGNATED),
            (~torch.isfinite(residual), Result.NONFINITE),
        ):
            self.codes = torch.where(self.active & where, make_codes(result, self.codes), self.codes)
            self.active = self.active & ~where
