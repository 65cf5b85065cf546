"""The Neumann series: the cheapest solver to reason about, and the slowest to converge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..solution import Result, Solution, make_codes
from ..tree import norm, scale
from .operator import Operator
from .solve import check_settings, default_rtol, normalise, relative_tolerance, report, stop_now


@dataclass(frozen=True)
class Neumann:
    """``x = alpha * sum_k (I - alpha A)^k b`` (Lorraine et al. 2020), for symmetric positive definite ``A``.

    Prefer `CG`: it needs the square root of the steps. The error shrinks by ``1 - 1/c`` a step for condition
    number c. A residual that grows ends the solve with `Result.DIVERGED`: on a symmetric positive definite
    matrix it only grows where ``alpha`` is too large.

    Args:
        alpha: step; None: ``1 / (1.05 lambda_max)`` for each problem, by ``power_steps`` power iterations.
        rtol, atol, max_steps: as in `CG`; None for both: the default tolerance, at most 1000 steps.
        power_steps: products that the estimate of the largest eigenvalue costs.
    """

    alpha: float | None = None
    rtol: float | None = None
    atol: float = 0.0
    max_steps: int | None = None
    power_steps: int = 20

    def __post_init__(self) -> None:
        check_settings(rtol=self.rtol, atol=self.atol, max_steps=self.max_steps)
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}: the step must be positive.")

    def solve(self, operator: Operator, b: Tensor) -> Solution:
        """Solve ``A x = b``; see `LinearSolver`."""
        unit, length = normalise(b)
        fixed = self.rtol is None and self.max_steps is not None
        rtol = torch.finfo(b.dtype).eps if fixed else default_rtol(b.dtype) if self.rtol is None else self.rtol
        target = relative_tolerance(rtol, self.atol, length)
        alpha = self._step_size(operator, length)
        x, r, steps = torch.zeros_like(unit), unit, torch.zeros_like(length, dtype=torch.int64)
        codes = make_codes(Result.STEPS_DONE if fixed else Result.MAX_STEPS, length)
        active = (length > 0) & torch.isfinite(length)
        relative = active.double()
        codes = torch.where(length == 0, make_codes(Result.CONVERGED, codes), codes)
        for step in range(self.max_steps or 1000):
            if stop_now(active, step):
                break
            x = torch.where(active.unsqueeze(-1), x + scale(alpha, r), x)
            r = torch.where(active.unsqueeze(-1), unit - operator.matvec(x), r)
            steps, previous = steps + active, relative
            relative = torch.where(active, norm(r), relative)
            grew = active & ~(relative <= previous + 10 * torch.finfo(b.dtype).eps)
            codes = torch.where(active & (relative <= target), make_codes(Result.CONVERGED, codes), codes)
            codes = torch.where(grew, make_codes(Result.DIVERGED, codes), codes)
            active = active & (relative > target) & ~grew
        bad = ~torch.isfinite(length) | ~torch.isfinite(relative)
        codes = torch.where(bad, make_codes(Result.NONFINITE, codes), codes)
        return report(scale(torch.nan_to_num(length, 0, 0, 0), x), codes, steps, relative * length, length)

    def _step_size(self, operator: Operator, like: Tensor) -> Tensor:
        if self.alpha is not None:
            return torch.full_like(like, self.alpha)
        return 1 / (1.05 * largest_eigenvalue(operator, self.power_steps))


def largest_eigenvalue(operator: Operator, num_steps: int = 20, seed: int = 0) -> Tensor:
    """Power iteration on each problem: an estimate of ``max |lambda|``, from below, ``[*batch]`` float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*operator.batch_shape, operator.size)
    v = torch.randn(shape, generator=generator, dtype=torch.float64).to(operator.device, operator.dtype)
    size = norm(v)
    for _ in range(num_steps):
        v = operator.matvec(scale(1 / size, v))
        size = norm(v).clamp_min(torch.finfo(torch.float64).tiny)
    return size
