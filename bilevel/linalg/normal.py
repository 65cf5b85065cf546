"""Conjugate gradients on the normal equations: for any regular matrix, symmetric or not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..solution import Result, marked
from ..tree import axpy, dot, norm
from .operator import Operator
from .solve import IterativeSolver, Outcome, Precondition, Stopping, stop_now


@dataclass(frozen=True)
class NormalCG(IterativeSolver):
    """CG on ``A^T A x = A^T b`` (Hestenes and Stiefel 1952; the CGLS form of Bjorck 1996), without forming ``A^T A``.

    For matrices that are not symmetric, where `GMRES` would keep too many vectors. Not a default: two products a step
    (``A v`` and ``A^T v``), and the condition number squared, so the steps are those of `CG` at ``c^2``. On a singular
    consistent system it finds the solution of least norm; on an inconsistent one the least-squares solution, with
    `Result.STAGNATED`. The answer is judged by the true residual (one more product).

    Args:
        rtol, atol, max_steps: see `IterativeSolver`.
    """

    def iterate(
        self, operator: Operator, unit: Tensor, length: Tensor, stopping: Stopping, precondition: Precondition | None
    ) -> Outcome:
        target, roundoff = stopping.target, torch.finfo(unit.dtype).eps
        usable, done = (length > 0) & torch.isfinite(length), stopping.target >= 1
        relative, active = usable.double(), usable & ~done
        steps = torch.zeros_like(length, dtype=torch.int64)
        codes = marked(stopping.initial_codes(), done, Result.CONVERGED)

        x, r = torch.zeros_like(unit), unit
        if stop_now(active, 0):
            return Outcome(x, codes, steps, relative)
        s = operator.rmatvec(r)
        p, gamma = s, dot(s, s)
        steepest = gamma.sqrt()
        for step in range(stopping.max_steps):
            if stop_now(active, step):
                break
            product = operator.matvec(p)
            curvature = dot(product, product)
            finite = torch.isfinite(curvature) & torch.isfinite(gamma)
            codes = marked(codes, active & ~finite, Result.NONFINITE)
            relative = torch.where(active & ~finite, torch.full_like(relative, torch.nan), relative)
            steps = steps + active
            # At a least-squares solution the gradient vanishes though the residual does not.
            flat = active & finite & ((curvature == 0) | (gamma.sqrt() <= 10 * roundoff * steepest))
            codes = marked(codes, flat, Result.STAGNATED)
            active = active & finite & ~flat
            alpha = torch.where(active, gamma / curvature, torch.zeros_like(gamma))
            keep = active.unsqueeze(-1)
            x = torch.where(keep, axpy(alpha, p, x), x)
            r = torch.where(keep, axpy(-alpha, product, r), r)
            relative = torch.where(active, norm(r), relative)
            codes = marked(codes, active & (relative <= target), Result.CONVERGED)
            active = active & (relative > target)
            s = operator.rmatvec(r)
            gamma_next = dot(s, s)
            beta = torch.where(active, gamma_next / gamma, torch.zeros_like(gamma))
            p, gamma = axpy(beta, p, s), torch.where(active, gamma_next, gamma)

        true = norm(unit - operator.matvec(x))
        relative = torch.where(torch.isfinite(relative), true, relative)
        drifted = (codes == int(Result.CONVERGED)) & (relative > 1.01 * target)
        return Outcome(x, marked(codes, drifted, Result.STAGNATED), steps, relative)
