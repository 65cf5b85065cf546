"""Minimal residuals for symmetric matrices, positive definite or not; batched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..solution import Result, make_codes
from ..tree import dot, norm, scale
from .lanczos import Lanczos
from .operator import Operator
from .solve import IterativeSolver, Outcome, Precondition, Preconditioner, Stopping, stop_now

RESTARTS = 3
"""How often MINRES starts again from the true residual where its estimate was too good, as with a preconditioner."""

JUMP = 1e4
"""A step that makes the iterate grow by this factor and does not halve the residual goes along a null vector."""


@dataclass(frozen=True)
class MINRES(IterativeSolver):
    """Minimal residuals (Paige and Saunders 1975): the residual never grows, whatever the signs of the eigenvalues.

    The one to take where `CG` reports negative curvature, as Hessians of networks have it. One product a step, and one
    more for the true residual at the end. On a consistent singular system it finds the solution of least norm; on an
    inconsistent one it stops with `Result.STAGNATED` at the last iterate that has not run away along the null space.

    Args:
        rtol, atol, max_steps: see `IterativeSolver`.
        preconditioner: symmetric positive definite, as for `CG`.
    """

    preconditioner: Preconditioner | None = None
    symmetric_only: ClassVar[bool] = True

    def iterate(
        self, operator: Operator, unit: Tensor, length: Tensor, stopping: Stopping, precondition: Precondition | None
    ) -> Outcome:
        state = _State.begin(unit, length, stopping)
        lanczos = Lanczos()
        _sweep(operator, state, stopping.target, stopping.max_steps, precondition, lanczos)
        for attempt in range(RESTARTS + 1):
            if not bool(state.steps.any()):
                break
            finite = torch.isfinite(state.relative)
            residual = unit - operator.matvec(state.x)
            state.relative = torch.where(finite, norm(residual), state.relative)
            # Half a percent of slack: the estimate and the true residual differ in their last bits.
            met = finite & (state.relative <= 1.005 * stopping.target)
            state.mark(met, Result.CONVERGED)
            short = ~met & (state.codes == int(Result.CONVERGED)) & (state.steps < stopping.max_steps)
            if stopping.ordered or attempt == RESTARTS or not bool(short.any()):
                break
            state.active, state.r = short, residual
            _sweep(operator, state, stopping.target, stopping.max_steps - int(state.steps.max()), precondition)
        unmet = (state.codes == int(Result.CONVERGED)) & ~(state.relative <= 1.005 * stopping.target)
        state.mark(unmet, Result.STAGNATED)
        return Outcome(state.x, state.codes, state.steps, state.relative, lanczos)


@dataclass
class _State:
    """Where each problem stands; ``x``, ``r`` are ``[*batch, n]``, the others ``[*batch]``."""

    x: Tensor
    r: Tensor
    relative: Tensor
    active: Tensor
    steps: Tensor
    codes: Tensor

    @classmethod
    def begin(cls, unit: Tensor, length: Tensor, stopping: Stopping) -> _State:
        usable, done = (length > 0) & torch.isfinite(length), stopping.target >= 1
        steps = torch.zeros_like(length, dtype=torch.int64)
        state = cls(torch.zeros_like(unit), unit, usable.double(), usable & ~done, steps, stopping.initial_codes())
        state.mark(done, Result.CONVERGED)
        return state

    def mark(self, where: Tensor, result: Result) -> None:
        self.codes = torch.where(where, make_codes(result, self.codes), self.codes)

    def end(self, where: Tensor, result: Result) -> None:
        """Mark those that are active, and let them go."""
        self.mark(self.active & where, result)
        self.active = self.active & ~where


def _sweep(
    operator: Operator,
    state: _State,
    target: Tensor,
    max_steps: int,
    precondition: Precondition | None,
    lanczos: Lanczos | None = None,
) -> None:
    """MINRES steps from ``state.x`` until no problem is active: Lanczos, two old rotations, a new one, the step."""
    roundoff = torch.finfo(state.r.dtype).eps
    previous, current = torch.zeros_like(state.r), state.r
    z = precondition(current) if precondition else current
    beta = dot(current, z).clamp_min(0).sqrt()
    zeros, ones = torch.zeros_like(beta), torch.ones_like(beta)
    left, first, start = beta, beta.clamp_min(torch.finfo(torch.float64).tiny), norm(state.r)
    coupling, d_before, d_last = zeros, torch.zeros_like(state.r), torch.zeros_like(state.r)
    cosine, sine, cosine_last, sine_last = ones, zeros, ones, zeros
    for step in range(max_steps):
        if stop_now(state.active, step):
            break
        inverse = torch.where(beta > 0, 1 / beta, zeros)
        v = scale(inverse, z)
        product = operator.matvec(v)
        alpha = dot(v, product)
        made = state.active
        state.steps = state.steps + made
        state.relative = torch.where(made & ~torch.isfinite(alpha), torch.full_like(ones, torch.nan), state.relative)
        state.end(~torch.isfinite(alpha), Result.NONFINITE)
        following = product - scale(alpha * inverse, current) - scale(coupling, previous)
        previous, current = scale(inverse, current), following
        z = precondition(current) if precondition else current
        beta_next = dot(current, z).clamp_min(0).sqrt()
        if lanczos is not None:
            lanczos.append(alpha, beta_next, made)

        epsilon, middle = sine_last * coupling, cosine_last * coupling
        delta, gamma_bar = cosine * middle + sine * alpha, cosine * alpha - sine * middle
        gamma = torch.hypot(gamma_bar, beta_next)
        size = alpha.abs() + beta_next + coupling
        singular = gamma <= 10 * roundoff * size
        safe = torch.where(singular, ones, gamma)
        cosine_last, sine_last, cosine, sine = cosine, sine, gamma_bar / safe, beta_next / safe
        d = scale(1 / safe, v - scale(delta, d_last) - scale(epsilon, d_before))
        d_before, d_last = d_last, d

        x = state.x + scale(cosine * left, d)
        left = -sine * left
        relative = start * left.abs() / first
        jumped = (norm(x) > JUMP * (1 + norm(state.x))) & (relative > 0.5 * state.relative)
        state.end(singular | jumped, Result.STAGNATED)
        keep = state.active
        state.x = torch.where(keep.unsqueeze(-1), x, state.x)
        state.relative = torch.where(keep, relative, state.relative)
        state.end(relative <= target, Result.CONVERGED)
        state.end(beta_next <= 10 * roundoff * size, Result.STAGNATED)
        coupling, beta = beta_next, beta_next
