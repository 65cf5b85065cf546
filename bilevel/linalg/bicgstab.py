"""Stabilised bi-conjugate gradients, batched: a few vectors, whatever the number of steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..recording import free_looks, recording
from ..solution import Result, marked
from ..tree import axpy, dot, norm
from .operator import Operator
from .solve import IterativeSolver, Outcome, Precondition, Stopping, default_rtol, stop_now

RESTARTS = 10
"""How often it starts again from the true residual: where the recurrence has drifted away from it, or broken down."""

SLACK = 1.005
"""Half a percent: the recurrence and the true residual differ in their last bits."""


@dataclass(frozen=True)
class BiCGSTAB(IterativeSolver):
    """Stabilised bi-conjugate gradients (van der Vorst 1992): any regular matrix, products by ``A`` only.

    Seven vectors where `GMRES` keeps fifty, two products a step, and a residual that may rise before it falls; the best
    iterate is returned. Everything stays on the device of b. A breakdown of a problem, and a recurrence that is not the
    true residual (one more product), start it again from there.

    Args:
        rtol, atol, max_steps: see `IterativeSolver`.
    """

    def iterate(
        self, operator: Operator, unit: Tensor, length: Tensor, stopping: Stopping, precondition: Precondition | None
    ) -> Outcome:
        usable, done = (length > 0) & torch.isfinite(length), stopping.target >= 1
        state = _State(torch.zeros_like(unit), unit, usable.double(), usable & ~done)
        codes = marked(stopping.initial_codes(), done, Result.CONVERGED)
        taken = 0
        for attempt in range(RESTARTS + 1):
            before = state.relative
            taken += _sweep(operator, state, stopping.target, stopping.max_steps - taken)
            if free_looks(unit) and not bool(state.steps.any()):
                break
            state.r = unit - operator.matvec(state.x)
            state.relative = torch.where(state.broken, torch.full_like(before, torch.nan), norm(state.r))
            left = usable & ~done & ~(state.relative <= SLACK * stopping.target) & ~state.broken
            codes = marked(codes, usable & ~done & ~left, Result.CONVERGED)
            codes = marked(codes, state.broken, Result.NONFINITE)
            open_ = left & (state.steps < stopping.max_steps)
            stuck = open_ & ~(state.relative < 0.5 * before)
            codes = marked(codes, stuck, Result.STAGNATED)
            state.active = open_ & ~stuck
            if attempt == RESTARTS or taken >= stopping.max_steps or recording() or not bool(state.active.any()):
                codes = marked(codes, state.active, Result.STAGNATED)
                break
        if stopping.ordered:  # as far as the precision goes, which the steps that were ordered went beyond
            codes = marked(codes, state.relative <= default_rtol(unit.dtype), Result.CONVERGED)
        return Outcome(state.x, codes, state.steps, state.relative)


@dataclass
class _State:
    """Where each problem stands: ``x`` and its residual ``r`` ``[*batch, n]``, the others ``[*batch]``."""

    x: Tensor
    r: Tensor
    relative: Tensor
    active: Tensor

    def __post_init__(self) -> None:
        self.steps = torch.zeros_like(self.active, dtype=torch.int64)
        self.broken = torch.zeros_like(self.active)


def _sweep(operator: Operator, state: _State, target: Tensor, max_steps: int) -> int:
    """Steps from ``state.x`` until no problem is active, and how many: the algorithm box, with masks."""
    roundoff = torch.finfo(state.r.dtype).eps
    x, r, active = state.x, state.r, state.active
    shadow, p = r, r
    rho, best, taken = dot(shadow, r), state.relative, 0
    for step in range(max_steps):
        if stop_now(active, step):
            break
        taken += 1
        state.steps = state.steps + active
        v = operator.matvec(p)
        across = dot(shadow, v)
        whole = active & (across.abs() > roundoff * norm(shadow) * norm(v))  # else it has broken down
        alpha = torch.where(whole, rho / across, torch.zeros_like(rho))
        s = axpy(-alpha, v, r)
        t = operator.matvec(s)
        size, seen = dot(t, t), torch.isfinite(across)
        omega = torch.where(whole & (size > 0), dot(t, s) / size, torch.zeros_like(rho))
        seen = seen & torch.isfinite(size)
        state.broken = state.broken | (active & ~seen)
        active = whole & seen
        keep = active.unsqueeze(-1)
        x = torch.where(keep, axpy(omega, s, axpy(alpha, p, x)), x)
        r = torch.where(keep, axpy(-omega, t, s), r)
        relative = norm(r)
        better = active & (relative < best)
        best = torch.where(better, relative, best)
        state.x = torch.where(better.unsqueeze(-1), x, state.x)
        rho_next = dot(shadow, r)
        stalled = (omega == 0) | (rho_next.abs() <= roundoff * norm(shadow) * relative)
        active = active & (relative > target) & ~stalled
        beta = torch.where(active, rho_next / rho * (alpha / omega), torch.zeros_like(rho))
        p = torch.where(active.unsqueeze(-1), axpy(beta, axpy(-omega, v, p), r), p)
        rho = torch.where(active, rho_next, rho)
    return taken
