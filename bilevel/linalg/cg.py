"""Conjugate gradients, batched: every problem has its own step sizes, mask, tolerance and statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..recording import free_looks, recording
from ..solution import Result
from ..tree import axpy, dot, norm, scale
from .lanczos import Lanczos
from .operator import Operator
from .single import RESTARTS, RUNAWAY, cg_single, is_single
from .solve import IterativeSolver, Outcome, Precondition, Preconditioner, Stopping, chosen, normalise, stop_now
from .sweep import SweepState


@dataclass(frozen=True)
class CG(IterativeSolver):
    """Conjugate gradients (Hestenes and Stiefel 1952) for symmetric positive definite ``A``.

    The default: one product a step, error after k steps at most ``2 ((sqrt(c) - 1) / (sqrt(c) + 1))^k`` for
    condition number c. Negative curvature ends a problem's solve with `Result.NEGATIVE_CURVATURE` and the iterate
    so far (Steihaug 1983); vanishing curvature, and an iterate that leaves more than ten times the right-hand side,
    with the iterate of least residual so far, zero among them. The other problems go on. A tolerance is checked with
    the true residual (one more product).

    Args:
        rtol, atol, max_steps: see `IterativeSolver`.
        preconditioner: such as `Jacobi`, `NystromPreconditioner`, `AdamPreconditioner`; positive definite.
    """

    preconditioner: Preconditioner | None = None
    symmetric_only: ClassVar[bool] = True

    def iterate(
        self, operator: Operator, unit: Tensor, length: Tensor, stopping: Stopping, precondition: Precondition | None
    ) -> Outcome:
        if is_single(unit) and not torch.is_grad_enabled():  # else a derivative may be asked for
            return cg_single(operator, unit, length, stopping, precondition)
        state = _State.begin(operator, unit, length, stopping, precondition)
        lanczos = Lanczos(length)
        _sweep(state, stopping.max_steps, lanczos)
        state.take_best((state.codes == int(Result.NEGATIVE_CURVATURE)) & (state.relative > RUNAWAY))
        if not stopping.ordered:
            _verify(state, unit, stopping.max_steps)
        condition = torch.where(torch.isfinite(state.least), state.size / state.least, torch.ones_like(state.size))
        return Outcome(state.x, state.codes, state.steps, state.relative, lanczos, condition, state.least)


def truncated_cg(operator: Operator, b: Tensor, rtol: Tensor, max_steps: int) -> Tensor:
    """At most ``max_steps`` steps towards ``A x = b``, up to negative curvature: the direction of Newton-CG.

    There it is the last iterate, along which the quadratic falls most (Steihaug 1983), whatever it leaves.
    """
    unit, length = normalise(b)
    state = _State.begin(operator, unit, length, Stopping(rtol, max_steps, ordered=True))
    _sweep(state, max_steps)
    return scale(torch.nan_to_num(length, 0, 0, 0), state.x)


@dataclass
class _State(SweepState):
    """Where each problem stands; ``best_x`` is ``[*batch, n]``, the others ``[*batch]``.

    Curvature is zero where it is below the rounding error of ``size``. ``least`` is the smallest positive curvature of
    a direction.
    """

    least: Tensor = field(init=False)
    best_x: Tensor = field(init=False)
    best_relative: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.least = torch.full_like(self.relative, torch.inf)
        self.best_x, self.best_relative = self.x, self.relative

    def remember(self) -> None:
        """Keep the iterate of least residual: on an inconsistent system the later ones grow along its null space."""
        better = self.active & (self.relative < self.best_relative)
        self.best_x = chosen(better, self.x, self.best_x)
        self.best_relative = torch.where(better, self.relative, self.best_relative)

    def take_best(self, where: Tensor) -> None:
        """Go back to the best iterate: the last ones may have run away."""
        self.x = chosen(where, self.best_x, self.x)
        self.relative = torch.where(where, self.best_relative, self.relative)


def _sweep(state: _State, max_steps: int, lanczos: Lanczos | None = None) -> None:
    """CG steps from ``state.x`` until no problem is active: the algorithm box, with masks."""
    roundoff = torch.finfo(state.r.dtype).eps
    z = state.preconditioned(state.r)
    p, rz = z, dot(state.r, z)
    carried = torch.zeros_like(rz)
    for step in range(max_steps):
        if stop_now(state.active, step):
            break
        product = state.operator.matvec(p)
        curvature = dot(p, product)
        finite = curvature.abs() < torch.inf  # a look with isfinite is four operations
        length, stretched = norm(p), norm(product)
        state.size = torch.where(state.active & finite, torch.fmax(state.size, stretched / length), state.size)
        zero = roundoff * length * torch.fmax(stretched, state.size * length)
        convex = curvature > zero
        state.mark(state.active & ~finite, Result.NONFINITE)
        state.mark(state.active & finite & ~convex, Result.NEGATIVE_CURVATURE)
        state.take_best(state.active & finite & ~convex & (curvature >= -zero))
        state.relative = torch.where(state.active & ~finite, torch.full_like(rz, torch.nan), state.relative)
        state.steps = state.steps + state.active
        made = state.active
        state.active = state.active & finite & convex
        state.least = torch.where(state.active, torch.fmin(state.least, curvature / length.square()), state.least)
        alpha = torch.where(state.active, rz / curvature, torch.zeros_like(rz))
        state.x = chosen(state.active, axpy(alpha, p, state.x), state.x)
        state.r = chosen(state.active, axpy(-alpha, product, state.r), state.r)
        remaining = norm(state.r)
        state.relative = torch.where(state.active, remaining, state.relative)
        state.remember()
        state.mark(state.active & (state.relative <= state.target), Result.CONVERGED)
        state.active = state.active & (state.relative > state.target)
        z = state.preconditioned(state.r)
        rz_next = dot(state.r, z) if state.precondition else remaining.square()
        beta = torch.where(state.active, rz_next / rz, torch.zeros_like(rz))
        if lanczos is not None:
            lanczos.append(curvature / rz + carried, beta.clamp_min(0).sqrt() * curvature / rz, made)
            carried = beta * curvature / rz
        p, rz = axpy(beta, p, z), torch.where(state.active, rz_next, rz)


def _verify(state: _State, unit: Tensor, max_steps: int) -> None:
    """Replace the recurrence's residual by the true one, and go on from it where the two have drifted apart."""
    if free_looks(state.steps) and not bool(state.steps.any()):
        return
    for attempt in range(RESTARTS + 1):
        finite = torch.isfinite(state.relative)
        state.r = unit - state.operator.matvec(state.x)
        state.relative = torch.where(finite, norm(state.r), state.relative)
        drifted = (state.codes == int(Result.CONVERGED)) & (state.relative > state.target)
        spent = state.steps >= max_steps
        if attempt == RESTARTS or recording() or not bool((drifted & ~spent).any()):
            break
        state.active = drifted & ~spent
        _sweep(state, max_steps - int(state.steps.max()))
    state.mark(drifted, Result.STAGNATED)
    state.mark(drifted & spent, Result.MAX_STEPS)
