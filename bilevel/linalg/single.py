"""Conjugate gradients on one small system in Python's numbers: the rules of `cg` without masks.

For the reason that `inner/single` gives: of a system of few unknowns the masks take longer than the products.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .._torch import in_dual_level
from ..closure import in_transform
from ..recording import free_looks
from ..solution import Result
from .lanczos import Lanczos
from .operator import Operator
from .solve import Outcome, Precondition, Stopping

RESTARTS = 3
"""How often CG starts again from the true residual where its recurrence has drifted away from it."""

RUNAWAY = 10.0
"""Relative residual from which on the last iterate before negative curvature is noise. Below it the residual may have
grown while the iterate came nearer, as it does in most tasks of the first meta-steps of implicit MAML."""

SMALL = 4096
"""Unknowns up to which the vectors are NumPy's, which works on one thread."""


def is_single(vector: Tensor) -> bool:
    """Whether it is of one small problem, and its values may be looked at."""
    small = vector.dim() == 1 and vector.shape[0] <= SMALL and vector.dtype in (torch.float32, torch.float64)
    return small and not in_transform() and not in_dual_level() and free_looks(vector)


def as_vector(tensor: Tensor) -> np.ndarray:
    """Its numbers in float64; of a float64 tensor it is no copy."""
    return tensor.numpy(force=True).astype(np.float64, copy=False)


class SingleCG:
    """One solve of ``A x = unit``; attributes as in `cg`, numbers in place of tensors of the batch shape."""

    def __init__(self, operator: Operator, unit: Tensor, stopping: Stopping, precondition: Precondition | None):
        self.operator, self.precondition, self.unit, self.dtype = operator, precondition, as_vector(unit), unit.dtype
        self.target, self.max_steps, self.ordered = float(stopping.target), stopping.max_steps, stopping.ordered
        self.roundoff = torch.finfo(unit.dtype).eps
        self.x = self.best_x = np.zeros_like(self.unit)
        self.r = self.unit
        self.relative = self.best_relative = 0.0
        self.steps, self.size, self.least = 0, 0.0, math.inf
        self.code = Result.STEPS_DONE if stopping.ordered else Result.MAX_STEPS
        self.seen: list[tuple[float, float]] = []

    def solve(self, length: float) -> None:
        """All steps, and what verifies them, towards a right-hand side of this length."""
        with np.errstate(all="ignore"):
            usable = length > 0 and math.isfinite(length)
            self.relative = self.best_relative = float(usable)
            if self.target >= 1:
                self.code = Result.CONVERGED
            elif usable:
                self._sweep(self.max_steps, self.seen)
            if not self.ordered and self.steps:
                self._verify()

    def _product(self, v: np.ndarray) -> np.ndarray:
        return as_vector(self.operator.matvec(torch.from_numpy(v).to(self.dtype)))

    def _preconditioned(self, r: np.ndarray) -> np.ndarray:
        return r if self.precondition is None else as_vector(self.precondition(torch.from_numpy(r).to(self.dtype)))

    def _sweep(self, max_steps: int, seen: list[tuple[float, float]] | None = None) -> None:
        z = self._preconditioned(self.r)
        p, rz, carried = z, self.r.dot(z), 0.0
        for _ in range(max_steps):
            product = self._product(p)
            curvature, length, stretched = p.dot(product), np.sqrt(p.dot(p)), np.sqrt(product.dot(product))
            self.steps += 1
            going, beta = self._step(p, product, rz, curvature, length, stretched), 0.0
            if going:
                z = self._preconditioned(self.r)
                rz_next = self.r.dot(z)
                beta = rz_next / rz
            if seen is not None:
                seen.append((float(curvature / rz + carried), float(np.sqrt(max(beta, 0.0)) * curvature / rz)))
                carried = beta * curvature / rz
            if not going:
                return
            p, rz = z + beta * p, rz_next

    def _step(
        self, p: np.ndarray, product: np.ndarray, rz: float, curvature: float, length: float, stretched: float
    ) -> bool:
        """Along ``p``; whether another step is to follow."""
        if not np.isfinite(curvature):
            self.code, self.relative = Result.NONFINITE, math.nan
            return False
        self.size = float(np.fmax(self.size, stretched / length))
        zero = self.roundoff * length * np.fmax(stretched, self.size * length)
        if not curvature > zero:
            self.code = Result.NEGATIVE_CURVATURE
            if curvature >= -zero or self.relative > RUNAWAY:
                self.x, self.relative = self.best_x, self.best_relative
            return False
        self.least = float(np.fmin(self.least, curvature / length**2))
        alpha = rz / curvature
        self.x, self.r = self.x + alpha * p, self.r - alpha * product
        self.relative = math.sqrt(self.r.dot(self.r))
        if self.relative < self.best_relative:
            self.best_x, self.best_relative = self.x, self.relative
        if self.relative <= self.target:
            self.code = Result.CONVERGED
        return self.relative > self.target

    def _verify(self, restarts: int = RESTARTS) -> None:
        """As `cg._verify`."""
        for attempt in range(restarts + 1):
            self.r = self.unit - self._product(self.x)
            if math.isfinite(self.relative):
                self.relative = math.sqrt(self.r.dot(self.r))
            drifted = self.code is Result.CONVERGED and self.relative > self.target
            left = self.max_steps - self.steps
            if not drifted:
                return
            if attempt == restarts or left <= 0:
                break
            self._sweep(left)
        self.code = Result.MAX_STEPS if left <= 0 else Result.STAGNATED

    def outcome(self) -> Outcome:
        """What was found, as tensors."""

        def number(value: float) -> Tensor:
            return torch.tensor(value, dtype=torch.float64, device="cpu")

        lanczos = Lanczos(number(0.0))
        if self.seen:
            diagonal, off_diagonal = torch.tensor(self.seen, dtype=torch.float64, device="cpu").unbind(1)
            lanczos.append(diagonal, off_diagonal, torch.ones_like(diagonal, dtype=torch.bool))
        return Outcome(
            torch.from_numpy(self.x).to(self.dtype),
            torch.tensor(int(self.code), dtype=torch.int8, device="cpu"),
            torch.tensor(self.steps, device="cpu"),
            number(self.relative),
            lanczos,
            number(self.size / self.least if math.isfinite(self.least) else 1.0),
            number(self.least),
        )


def cg_single(
    operator: Operator, unit: Tensor, length: Tensor, stopping: Stopping, precondition: Precondition | None
) -> Outcome:
    """As `CG.iterate`."""
    solve = SingleCG(operator, unit, stopping, precondition)
    solve.solve(float(length))
    return solve.outcome()
