"""Conjugate gradients, batched: every problem has its own step sizes, mask, tolerance and statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..solution import Result, Solution, make_codes
from ..tree import dot, norm, scale
from .operator import Operator
from .solve import (
    check_settings,
    default_rtol,
    normalise,
    relative_tolerance,
    report,
    stop_now,
)

Preconditioner = Callable[[Operator], Callable[[Tensor], Tensor]]
"""Looks at an operator once and returns ``r -> M^{-1} r``, an approximate inverse, ``[*batch, n] -> [*batch, n]``."""

RESTARTS = 3
"""How often CG starts again from the true residual where its recurrence has drifted away from it."""


@dataclass(frozen=True)
class CG:
    """Conjugate gradients (Hestenes and Stiefel 1952) for symmetric positive definite ``A``.

    The default: one product a step, error after k steps at most ``2 ((sqrt(c) - 1) / (sqrt(c) + 1))^k`` for
    condition number c. Zero or negative curvature ends a problem's solve with `Result.NEGATIVE_CURVATURE` and
    the iterate so far; the other problems go on.

    Args:
        rtol: stop a problem at ``||b - A x|| <= max(rtol ||b||, atol)``, checked with the true residual (one
            more product). None: 1e-5 (float32) or 1e-10 (float64) where ``max_steps`` is None as well, else
            make ``max_steps`` steps, which is then no failure.
        atol: absolute part of the tolerance.
        max_steps: limit on the products; None: ``10 n``, at most 1000.
        preconditioner: such as `Jacobi`.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int | None = None
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_settings(rtol=self.rtol, atol=self.atol, max_steps=self.max_steps)

    def solve(self, operator: Operator, b: Tensor) -> Solution:
        """Solve ``A x = b``; see `LinearSolver`."""
        precondition = self.preconditioner(operator) if self.preconditioner else None
        limit = self.max_steps or min(10 * operator.size, 1000)
        if self.rtol is None and self.max_steps is not None:
            return conjugate_gradient(operator, b, None, self.atol, limit, precondition)
        rtol = default_rtol(b.dtype) if self.rtol is None else self.rtol
        return conjugate_gradient(operator, b, rtol, self.atol, limit, precondition)


@dataclass(frozen=True)
class Jacobi:
    """Diagonal preconditioner, its entries estimated with Hutchinson probes (Bekas et al. 2007).

    For problems whose parameters have very different curvatures, such as penalties of their own for each.

    Args:
        num_probes: products that it costs, once for each solve.
        seed: of the random signs.
    """

    num_probes: int = 10
    seed: int = 0

    def __call__(self, operator: Operator) -> Callable[[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        total = torch.zeros(*operator.batch_shape, operator.size, dtype=operator.dtype, device=operator.device)
        for _ in range(self.num_probes):
            signs = torch.randint(0, 2, total.shape, generator=generator).to(total) * 2 - 1
            total = total + signs * operator.matvec(signs)
        diagonal = total / self.num_probes
        floor = diagonal.abs().amax(-1, keepdim=True) * 1e-3
        inverse = 1 / torch.maximum(diagonal.abs(), floor).clamp_min(torch.finfo(total.dtype).tiny)
        return lambda r: r * inverse


def conjugate_gradient(
    operator: Operator,
    b: Tensor,
    rtol: float | Tensor | None,
    atol: float,
    max_steps: int,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> Solution:
    """CG with a tolerance for each problem; ``rtol=None`` makes ``max_steps`` steps without a check."""
    unit, length = normalise(b)
    finite = torch.isfinite(length)
    target = relative_tolerance(torch.finfo(b.dtype).eps if rtol is None else rtol, atol, length)
    state = _State(
        x=torch.zeros_like(unit),
        r=unit,
        relative=((length > 0) & finite).double(),
        active=(length > 0) & finite,
        steps=torch.zeros_like(length, dtype=torch.int64),
        codes=make_codes(Result.STEPS_DONE if rtol is None else Result.MAX_STEPS, length),
    )
    _sweep(operator, state, target, max_steps, precondition)
    if rtol is not None:
        _verify(operator, unit, state, target, max_steps, precondition)
    state.mark(length == 0, Result.CONVERGED)
    state.mark(~finite | ~torch.isfinite(state.relative), Result.NONFINITE)
    scaled = scale(torch.where(finite, length, torch.zeros_like(length)), state.x)
    return report(scaled, state.codes, state.steps, state.relative * length, length)


@dataclass
class _State:
    """Where each problem stands; ``x``, ``r`` are ``[*batch, n]``, the others ``[*batch]``."""

    x: Tensor
    r: Tensor
    relative: Tensor
    active: Tensor
    steps: Tensor
    codes: Tensor

    def mark(self, where: Tensor, result: Result) -> None:
        self.codes = torch.where(where, make_codes(result, self.codes), self.codes)


def _sweep(
    operator: Operator,
    state: _State,
    target: Tensor,
    max_steps: int,
    precondition: Callable[[Tensor], Tensor] | None,
) -> None:
    """CG steps from ``state.x`` until no problem is active: the algorithm box, with masks."""
    roundoff = torch.finfo(state.r.dtype).eps
    z = precondition(state.r) if precondition else state.r
    p, rz = z, dot(state.r, z)
    for step in range(max_steps):
        if stop_now(state.active, step):
            break
        product = operator.matvec(p)
        curvature = dot(p, product)
        finite = torch.isfinite(curvature)
        convex = curvature > roundoff * norm(p) * norm(product)
        state.mark(state.active & ~finite, Result.NONFINITE)
        state.mark(state.active & finite & ~convex, Result.NEGATIVE_CURVATURE)
        state.steps = state.steps + state.active
        state.active = state.active & finite & convex
        alpha = torch.where(state.active, rz / curvature, torch.zeros_like(rz))
        keep = state.active.unsqueeze(-1)
        state.x = torch.where(keep, state.x + scale(alpha, p), state.x)
        state.r = torch.where(keep, state.r - scale(alpha, product), state.r)
        state.relative = torch.where(state.active, norm(state.r), state.relative)
        state.mark(state.active & (state.relative <= target), Result.CONVERGED)
        state.active = state.active & (state.relative > target)
        z = precondition(state.r) if precondition else state.r
        rz_next = dot(state.r, z)
        beta = torch.where(state.active, rz_next / rz, torch.zeros_like(rz))
        p, rz = torch.where(keep, z + scale(beta, p), p), torch.where(state.active, rz_next, rz)


def _verify(
    operator: Operator,
    unit: Tensor,
    state: _State,
    target: Tensor,
    max_steps: int,
    precondition: Callable[[Tensor], Tensor] | None,
) -> None:
    """Replace the recurrence's residual by the true one, and go on from it where the two have drifted apart."""
    for attempt in range(RESTARTS + 1):
        finite = torch.isfinite(state.relative)
        state.r = unit - operator.matvec(state.x)
        state.relative = torch.where(finite, norm(state.r), state.relative)
        drifted = (state.codes == int(Result.CONVERGED)) & (state.relative > target)
        spent = state.steps >= max_steps
        if attempt == RESTARTS or not bool((drifted & ~spent).any()):
            break
        state.active = drifted & ~spent
        _sweep(operator, state, target, max_steps - int(state.steps.max()), precondition)
    state.mark(drifted, Result.STAGNATED)
    state.mark(drifted & spent, Result.MAX_STEPS)
