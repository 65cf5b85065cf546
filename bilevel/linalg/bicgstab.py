"""Stabilised bi-conjugate gradients, batched: a few vectors, whatever the number of steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..recording import free_looks, recording
from ..solution import Result, marked
from ..tree import dot, norm
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
    """Steps from ``state.x`` until no problem is active, and how many: the algorithm box, with masks.

    What a problem has one of is ``[*batch, 1]`` here. A step size of zero is the mask: only p, which the user's product
    sees, must not become NaN.
    """
    r, target, none = state.r, target.unsqueeze(-1), state.r.new_zeros((), dtype=torch.float64)
    x, shadow, p, active, broken = state.x, r, r, state.active.unsqueeze(-1), state.broken.unsqueeze(-1)
    rho, best, made = _dot(shadow, r), state.relative.unsqueeze(-1), []
    roundoff = torch.finfo(r.dtype).eps * norm(shadow).unsqueeze(-1)
    for step in range(max_steps):
        if stop_now(active, step):
            break
        made.append(active)
        v = operator.matvec(p)
        across = _dot(shadow, v)
        size = across.abs()
        whole = active & (size > roundoff * norm(v).unsqueeze(-1))  # else it has broken down
        alpha = torch.where(whole, rho / across, none)
        s = torch.addcmul(r, alpha.to(r.dtype), v, value=-1)
        t = operator.matvec(s)
        square = _dot(t, t)
        finite = size + square < torch.inf
        broken, active = broken | (active > finite), whole & finite
        omega = torch.where(active & (square > 0), _dot(t, s) / square, none)
        by = omega.to(r.dtype)
        x = torch.addcmul(torch.addcmul(x, alpha.to(r.dtype), p), by, s)
        r = torch.addcmul(s, by, t, value=-1)
        relative, rho_next = norm(r).unsqueeze(-1), _dot(shadow, r)
        better = active & (relative < best)
        best, state.x = torch.where(better, relative, best), torch.where(better, x, state.x)
        active = active & (relative > target) & (omega != 0) & (rho_next.abs() > roundoff * relative)
        beta = (rho_next / rho * (alpha / omega)).to(r.dtype)
        p = torch.where(active, torch.addcmul(r, beta, torch.addcmul(p, by, v, value=-1)), p)
        rho = rho_next
    state.broken = broken.squeeze(-1)
    if made:
        state.steps = state.steps + torch.cat(made, -1).sum(-1)
    return len(made)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return dot(a, b).unsqueeze(-1)
