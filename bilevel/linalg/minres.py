"""Minimal residuals for symmetric matrices, positive definite or not; batched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..recording import free_looks, recording
from ..solution import Result
from ..tree import dot, norm, scale
from .lanczos import Lanczos
from .operator import Operator
from .solve import IterativeSolver, Outcome, Precondition, Preconditioner, Stopping, stop_now
from .sweep import SweepState

RESTARTS = 3
"""How often MINRES starts again from the true residual where its estimate was too good or a step was not trusted."""

SLACK = 1.005
"""Half a percent: the estimate and the true residual differ in their last bits."""

RUNAWAY, PROGRESS, JUMP = 1e2, 1e-3, 1e4
"""Where ``||A r||`` is small beside ``||A|| ||r||``, growth of the iterate by the factor ``RUNAWAY`` that does not take
the part ``PROGRESS`` off the residual goes along a null vector: the system is inconsistent. Growth by ``JUMP`` in one
step may do so too, its estimated residual being made of rounding errors; starting again from there tells."""


@dataclass(frozen=True)
class MINRES(IterativeSolver):
    """Minimal residuals (Paige and Saunders 1975): the residual never grows, whatever the signs of the eigenvalues.

    The one to take where `CG` reports negative curvature, as Hessians of networks have it. One product a step, and one
    more for the true residual at the end. On a consistent singular system it finds the solution of least norm; on
    an inconsistent one it stops with `Result.STAGNATED` near the least-squares solution, before the iterates run away
    along the null space.

    Args:
        rtol, atol, max_steps: see `IterativeSolver`.
        preconditioner: symmetric positive definite, as for `CG`.
    """

    preconditioner: Preconditioner | None = None
    symmetric_only: ClassVar[bool] = True

    def iterate(
        self, operator: Operator, unit: Tensor, length: Tensor, stopping: Stopping, precondition: Precondition | None
    ) -> Outcome:
        state = _State.begin(operator, unit, length, stopping, precondition)
        lanczos = Lanczos(length)
        _sweep(state, stopping.max_steps, lanczos)
        for attempt in range(RESTARTS + 1):
            if free_looks(state.steps) and not bool(state.steps.any()):
                break
            short = state.verify(unit) & (state.steps < stopping.max_steps)
            if stopping.ordered or attempt == RESTARTS or recording() or not bool(short.any()):
                break
            state.active = short
            _sweep(state, stopping.max_steps - int(state.steps.max()))
        unmet = (state.codes == int(Result.CONVERGED)) & ~(state.relative <= SLACK * stopping.target)
        state.mark(unmet, Result.STAGNATED)
        return Outcome(state.x, state.codes, state.steps, state.relative, lanczos)


@dataclass
class _State(SweepState):
    """Where each problem stands; ``verified`` holds ``x``, its true residual, and the norm of that."""

    verified: tuple[Tensor, Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.verified = self.x, self.r, self.relative

    def verify(self, unit: Tensor) -> Tensor:
        """Replace estimates by true residuals, and what became worse by what was before; where to start again."""
        finite, (x, r, relative) = torch.isfinite(self.relative), self.verified
        residual = unit - self.operator.matvec(self.x)
        worse = finite & ~(norm(residual) < relative)
        self.x = torch.where(worse.unsqueeze(-1), x, self.x)
        self.r = torch.where(worse.unsqueeze(-1), r, residual)
        self.relative = torch.where(worse, relative, torch.where(finite, norm(residual), self.relative))
        self.verified = self.x, self.r, self.relative
        met = finite & (self.relative <= SLACK * self.target)
        self.mark(met, Result.CONVERGED)
        ended = (self.codes == int(Result.CONVERGED)) | (self.codes == int(Result.STAGNATED))
        return ended & finite & ~met & ~worse

    def end(self, where: Tensor, result: Result) -> None:
        """Mark those that are active, and let them go."""
        self.mark(self.active & where, result)
        self.active = self.active & ~where


@dataclass
class _Anchor:
    """The last iterate that made progress: where an inconsistent system is left when its iterates run away."""

    x: Tensor
    relative: Tensor

    def leaves(self, state: _State, x: Tensor, relative: Tensor, stationary: Tensor, *, may_jump: bool) -> Tensor:
        """Which problems must not take the step to ``x``; those that have run away by small steps are put back."""
        better = ~stationary | (state.relative < (1 - PROGRESS) * self.relative)
        self.x = torch.where(better.unsqueeze(-1), state.x, self.x)
        self.relative = torch.where(better, state.relative, self.relative)
        unit = 1 / state.size
        stuck = stationary & (relative > (1 - PROGRESS) * self.relative)
        runaway = stuck & (norm(x) > RUNAWAY * torch.fmax(norm(self.x), unit))
        state.x = torch.where((state.active & runaway).unsqueeze(-1), self.x, state.x)
        if may_jump:
            return runaway
        return runaway | (stationary & (norm(x) > JUMP * torch.fmax(norm(state.x), unit)))


def _sweep(state: _State, max_steps: int, lanczos: Lanczos | None = None) -> None:
    """MINRES steps from ``state.x`` until no problem is active: Lanczos, two old rotations, a new one, the step."""
    roundoff = torch.finfo(state.r.dtype).eps
    previous, current = torch.zeros_like(state.r), state.r
    z = state.preconditioned(current)
    beta = dot(current, z).clamp_min(0).sqrt()
    zeros, ones = torch.zeros_like(beta), torch.ones_like(beta)
    left, first, start = beta, beta.clamp_min(torch.finfo(torch.float64).tiny), norm(state.r)
    coupling, d_before, d_last = zeros, torch.zeros_like(state.r), torch.zeros_like(state.r)
    anchor = _Anchor(state.x, state.relative)
    cosine, sine, cosine_last, sine_last = ones, zeros, ones, zeros
    for step in range(max_steps):
        if stop_now(state.active, step):
            break
        inverse = torch.where(beta > 0, 1 / beta, zeros)
        v = scale(inverse, z)
        product = state.operator.matvec(v)
        alpha = dot(v, product)
        made = state.active
        state.steps = state.steps + made
        state.relative = torch.where(made & ~torch.isfinite(alpha), torch.full_like(ones, torch.nan), state.relative)
        state.end(~torch.isfinite(alpha), Result.NONFINITE)
        following = product - scale(alpha * inverse, current) - scale(coupling, previous)
        previous, current = scale(inverse, current), following
        z = state.preconditioned(current)
        beta_next = dot(current, z).clamp_min(0).sqrt()
        if lanczos is not None:
            lanczos.append(alpha, beta_next, made)

        epsilon, middle = sine_last * coupling, cosine_last * coupling
        delta, gamma_bar = cosine * middle + sine * alpha, cosine * alpha - sine * middle
        gamma = torch.hypot(gamma_bar, beta_next)
        state.size = size = torch.where(made, torch.fmax(state.size, alpha.abs() + beta_next + coupling), state.size)
        singular = gamma <= 10 * roundoff * size
        # ||A r|| <= c ||A|| ||r|| before this step: near a least-squares solution.
        stationary = torch.hypot(gamma_bar, cosine * beta_next) <= roundoff**0.4 * size
        safe = torch.where(singular, ones, gamma)
        cosine_last, sine_last, cosine, sine = cosine, sine, gamma_bar / safe, beta_next / safe
        d = scale(1 / safe, v - scale(delta, d_last) - scale(epsilon, d_before))
        d_before, d_last = d_last, d

        x = state.x + scale(cosine * left, d)
        left = -sine * left
        relative = start * left.abs() / first
        astray = anchor.leaves(state, x, relative, stationary, may_jump=lanczos is None and step == 0)
        state.end(singular | astray, Result.STAGNATED)
        keep = state.active
        state.x = torch.where(keep.unsqueeze(-1), x, state.x)
        state.relative = torch.where(keep, relative, state.relative)
        state.end(relative <= state.target, Result.CONVERGED)
        state.end(beta_next <= 10 * roundoff * size, Result.STAGNATED)
        coupling, beta = beta_next, beta_next
