"""The Neumann series: the cheapest solver to reason about, and the slowest to converge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..solution import Result, marked
from ..tree import axpy, norm, scale
from .noise import normal
from .operator import Operator
from .solve import IterativeSolver, Outcome, Precondition, Stopping, stop_now


@dataclass(frozen=True)
class Neumann(IterativeSolver):
    """``x = alpha * sum_k (I - alpha A)^k b`` (Lorraine et al. 2020), for any ``A`` whose ``I - alpha A`` contracts.

    For symmetric positive definite ``A`` prefer `CG`: it needs the square root of the steps. The error shrinks by
    ``1 - 1/c`` a step for condition number c. On ``A = I - J^T`` of a `fixed_point`, ``Neumann(alpha=1.0)`` is the
    fixed-point adjoint (Grazzi et al. 2020), ``u <- J^T u + b``, which converges at the rate of the map itself. A
    residual that grows by a factor ends the solve with `Result.DIVERGED`.

    Args:
        rtol, atol, max_steps: see `IterativeSolver`; without any, the default tolerance, at most 1000 steps.
        alpha: step; None: ``1 / (1.05 lambda_max)`` for each problem, by ``power_steps`` power iterations.
        power_steps: products that the estimate of the largest eigenvalue costs.
    """

    alpha: float | None = None
    power_steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}: the step must be positive.")
        if self.power_steps < 1:
            raise ValueError(f"power_steps is {self.power_steps}: at least one product is needed.")

    def iterate(
        self, operator: Operator, unit: Tensor, length: Tensor, stopping: Stopping, precondition: Precondition | None
    ) -> Outcome:
        x, r, steps = torch.zeros_like(unit), unit, torch.zeros_like(length, dtype=torch.int64)
        active = (length > 0) & torch.isfinite(length) & (stopping.target < 1)
        alpha = torch.ones_like(length) if stop_now(active, 0) else self._step_size(operator, length)
        codes = marked(stopping.initial_codes(), stopping.target >= 1, Result.CONVERGED)
        relative = ((length > 0) & torch.isfinite(length)).double()
        # On symmetric matrices the residual of a contraction never grows; on others it may, for a while.
        allowed = 1 + 10 * torch.finfo(unit.dtype).eps if operator.symmetric else 10.0
        best = relative
        for step in range(stopping.max_steps):
            if stop_now(active, step):
                break
            x = torch.where(active.unsqueeze(-1), axpy(alpha, r, x), x)
            r = torch.where(active.unsqueeze(-1), unit - operator.matvec(x), r)
            steps = steps + active
            relative = torch.where(active, norm(r), relative)
            grew = active & ~(relative <= allowed * best + 10 * torch.finfo(unit.dtype).eps)
            best = torch.minimum(best, relative)
            codes = marked(codes, active & (relative <= stopping.target), Result.CONVERGED)
            codes = marked(codes, grew, Result.DIVERGED)
            active = active & (relative > stopping.target) & ~grew
        return Outcome(x, codes, steps, relative)

    def default_steps(self, size: int) -> int:
        return 1000

    def _step_size(self, operator: Operator, like: Tensor) -> Tensor:
        if self.alpha is not None:
            return torch.full_like(like, self.alpha)
        return 1 / (1.05 * largest_eigenvalue(operator, self.power_steps))


def largest_eigenvalue(operator: Operator, num_steps: int = 20, seed: int = 0) -> Tensor:
    """Power iteration on each problem: an estimate of ``max |lambda|``, from below, ``[*batch]`` float64."""
    v = normal((*operator.batch_shape, operator.size), seed, operator.device).to(operator.dtype)
    size = norm(v)
    for _ in range(num_steps):
        v = operator.matvec(scale(1 / size, v))
        size = norm(v).clamp_min(torch.finfo(torch.float64).tiny)
    return size
