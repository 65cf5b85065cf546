"""SciPy's Krylov solvers through one `LinearOperator` adapter, in float64 on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..solution import Result, make_codes, marked
from ..tree import norm
from .operator import Operator, to_numpy
from .solve import IterativeSolver, Outcome, Precondition, Stopping, default_rtol


@dataclass(frozen=True)
class ScipySolver(IterativeSolver):
    """Base of the SciPy solvers: a batch is one block-diagonal system of normalised right-hand sides.

    SciPy's own verdict is not trusted: the true residual of every problem is computed and compared with the
    tolerance, since several of its solvers report success at saddle points or on inconsistent systems.

    Args:
        rtol, atol, max_steps: see `IterativeSolver`; the limit is on the iterations of the whole system.
    """

    algorithm: ClassVar[str]

    def iterate(
        self, operator: Operator, unit: Tensor, length: Tensor, stopping: Stopping, precondition: Precondition | None
    ) -> Outcome:
        usable = (length > 0) & torch.isfinite(length)
        x, relative, steps = torch.zeros_like(unit), usable.double(), 0
        if bool((usable & (stopping.target < 1)).any()):
            rtol = float(default_rtol(unit.dtype) if stopping.ordered else stopping.target[usable].min())
            flat, steps = self._run(operator, to_numpy(unit), rtol / math.sqrt(max(1, length.numel())))
            x = torch.from_numpy(flat).to(unit.device, unit.dtype).view_as(unit)
            relative = torch.where(usable, norm(unit - operator.matvec(x)), relative)
        # Half a percent of slack: the tolerance was met by SciPy's residual, which is not this one to the last bit.
        target = torch.full_like(length, default_rtol(unit.dtype)) if stopping.ordered else stopping.target
        ended = steps < self._limit(unit.numel())
        codes = make_codes(Result.STAGNATED, length) if ended else stopping.initial_codes()
        codes = marked(codes, relative <= 1.005 * target, Result.CONVERGED)
        codes = marked(codes, ~torch.isfinite(x).all(-1), Result.NONFINITE)
        return Outcome(x, codes, torch.full_like(length, steps, dtype=torch.int64), relative)

    def _run(self, operator: Operator, b: np.ndarray, tolerance: float) -> tuple[np.ndarray, int]:
        """One call of the algorithm: the solution and the number of iterations."""
        import scipy.sparse.linalg

        steps = 0

        def count(_: object) -> None:
            nonlocal steps
            steps += 1

        settings = self._settings(tolerance, self._limit(b.size))
        with np.errstate(all="ignore"):
            x, _ = getattr(scipy.sparse.linalg, self.algorithm)(operator.to_scipy(), b, callback=count, **settings)
        return np.asarray(x), steps

    def _settings(self, tolerance: float, limit: int) -> dict[str, Any]:
        return {"rtol": tolerance, "atol": 0.0, "maxiter": limit}

    def _limit(self, size: int) -> int:
        return self.max_steps or self.default_steps(size)


@dataclass(frozen=True)
class ScipyGMRES(ScipySolver):
    """Generalised minimal residuals of SciPy: as `GMRES`, in float64 whatever the precision of the products.

    Args:
        restart: directions that are kept before a restart, each a vector of memory.
    """

    restart: int = 50
    algorithm: ClassVar[str] = "gmres"

    def _settings(self, tolerance: float, limit: int) -> dict[str, Any]:
        cycles = math.ceil(limit / self.restart)
        restart = min(self.restart, limit)
        return {"rtol": tolerance, "atol": 0.0, "maxiter": cycles, "restart": restart, "callback_type": "pr_norm"}


@dataclass(frozen=True)
class ScipyBiCGSTAB(ScipySolver):
    """Stabilised bi-conjugate gradients of SciPy: as `BiCGSTAB`, in float64 whatever the precision of the products."""

    algorithm: ClassVar[str] = "bicgstab"


@dataclass(frozen=True)
class LSMR(ScipySolver):
    """Least squares by Golub-Kahan bidiagonalisation (Fong and Saunders 2011): singular matrices too.

    Two products a step, and it sees the square of the condition number: the last resort, not the default.
    """

    def _run(self, operator: Operator, b: np.ndarray, tolerance: float) -> tuple[np.ndarray, int]:
        import scipy.sparse.linalg

        with np.errstate(all="ignore"):
            outcome = scipy.sparse.linalg.lsmr(
                operator.to_scipy(), b, atol=tolerance * 1e-4, btol=tolerance, conlim=0, maxiter=self._limit(b.size)
            )
        return outcome[0], outcome[2]
