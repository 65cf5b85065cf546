"""SciPy's Krylov solvers through one `LinearOperator` adapter, in float64 on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from ..solution import Result, Solution, make_codes
from ..tree import norm, scale
from .operator import Operator, to_numpy
from .solve import check_settings, default_rtol, normalise, relative_tolerance, report


@dataclass(frozen=True)
class ScipySolver:
    """Base of the SciPy solvers: a batch is one block-diagonal system of normalised right-hand sides.

    SciPy's own verdict is not trusted: the true residual of every problem is computed and compared with the
    tolerance, since several of its solvers report success at saddle points or on inconsistent systems.

    Args:
        rtol, atol: stop at ``||b - A x|| <= max(rtol ||b||, atol)`` in every problem; rtol None: 1e-10
            (float64) or 1e-5 (float32).
        max_steps: limit on the iterations; None: ``10 n`` of the whole system, at most 1000. Where rtol is
            None, reaching a given limit is no failure, as in `CG`.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int | None = None

    algorithm: ClassVar[Callable[..., Any]]

    def __post_init__(self) -> None:
        check_settings(rtol=self.rtol, atol=self.atol, max_steps=self.max_steps)

    def solve(self, operator: Operator, b: Tensor) -> Solution:
        """Solve ``A x = b``; see `LinearSolver`."""
        unit, length = normalise(b)
        rtol = default_rtol(b.dtype) if self.rtol is None else self.rtol
        target = relative_tolerance(rtol, self.atol, length)
        x, relative, steps = torch.zeros_like(unit), (length > 0).double(), 0
        if bool((length > 0).any()) and bool(torch.isfinite(length).all()):
            tolerance = float(target.min()) / math.sqrt(max(1, length.numel()))
            flat, steps = self._run(operator, to_numpy(unit), tolerance)
            x = torch.from_numpy(flat).to(b.device, b.dtype).view_as(b)
            relative = norm(unit - operator.matvec(x))
        return report(
            scale(torch.nan_to_num(length, 0, 0, 0), x),
            self._judge(x, relative, target, length, steps),
            torch.full_like(length, steps, dtype=torch.int64),
            relative * length,
            length,
        )

    def _run(self, operator: Operator, b: np.ndarray, tolerance: float) -> tuple[np.ndarray, int]:
        """One call of the algorithm: the solution and the number of iterations."""
        steps = 0

        def count(_: Any) -> None:
            nonlocal steps
            steps += 1

        settings = self._settings(tolerance, self._limit(b.size))
        with np.errstate(all="ignore"):
            x, _ = type(self).algorithm(operator.to_scipy(), b, callback=count, **settings)
        return np.asarray(x), steps

    def _settings(self, tolerance: float, limit: int) -> dict[str, Any]:
        return {"rtol": tolerance, "atol": 0.0, "maxiter": limit}

    def _limit(self, size: int) -> int:
        return self.max_steps or min(10 * size, 1000)

    def _judge(self, x: Tensor, relative: Tensor, target: Tensor, length: Tensor, steps: int) -> Tensor:
        if steps < self._limit(x.numel()):
            failure = Result.STAGNATED
        else:
            failure = Result.STEPS_DONE if self.rtol is None and self.max_steps is not None else Result.MAX_STEPS
        # Half a percent of slack: the tolerance was met by SciPy's residual, which is not this one to the last bit.
        codes = torch.where(relative <= 1.005 * target, int(Result.CONVERGED), int(failure)).to(torch.int8)
        codes = torch.where(length == 0, make_codes(Result.CONVERGED, codes), codes)
        finite = torch.isfinite(length) & torch.isfinite(x).all(-1)
        return torch.where(finite, codes, make_codes(Result.NONFINITE, codes))


@dataclass(frozen=True)
class MINRES(ScipySolver):
    """Minimal residuals (Paige and Saunders 1975): symmetric matrices, positive definite or not.

    The one to take where `CG` reports negative curvature, as Hessians of networks have it.
    """

    algorithm: ClassVar[Callable[..., Any]] = staticmethod(scipy.sparse.linalg.minres)

    def _settings(self, tolerance: float, limit: int) -> dict[str, Any]:
        # Its test divides by an estimate of ||A|| ||x||, which is larger than ||b||: ask for more.
        return {"rtol": tolerance * 1e-2, "maxiter": limit}


@dataclass(frozen=True)
class GMRES(ScipySolver):
    """Generalised minimal residuals (Saad and Schultz 1986): any regular matrix; keeps every direction.

    Args:
        restart: directions that are kept before a restart, each a vector of memory.
    """

    restart: int = 50
    algorithm: ClassVar[Callable[..., Any]] = staticmethod(scipy.sparse.linalg.gmres)

    def _settings(self, tolerance: float, limit: int) -> dict[str, Any]:
        cycles = math.ceil(limit / self.restart)
        restart = min(self.restart, limit)
        return {"rtol": tolerance, "atol": 0.0, "maxiter": cycles, "restart": restart, "callback_type": "pr_norm"}


@dataclass(frozen=True)
class BiCGSTAB(ScipySolver):
    """Stabilised bi-conjugate gradients (van der Vorst 1992): any regular matrix, two products a step."""

    algorithm: ClassVar[Callable[..., Any]] = staticmethod(scipy.sparse.linalg.bicgstab)


@dataclass(frozen=True)
class LSMR(ScipySolver):
    """Least squares by Golub-Kahan bidiagonalisation (Fong and Saunders 2011): singular matrices too.

    Two products a step, and it sees the square of the condition number: the last resort, not the default.
    """

    def _run(self, operator: Operator, b: np.ndarray, tolerance: float) -> tuple[np.ndarray, int]:
        outcome = scipy.sparse.linalg.lsmr(
            operator.to_scipy(), b, atol=tolerance * 1e-2, btol=tolerance, conlim=0, maxiter=self._limit(b.size)
        )
        return outcome[0], outcome[2]
