"""Solvers of square systems ``r(y) = 0``: Newton-Krylov with a line search, and SciPy's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import scipy
import torch
from torch import Tensor

from ..linalg.direct import LU
from ..linalg.jacobian import GraphJacobian
from ..linalg.operator import to_numpy
from ..linalg.scipy import GMRES
from ..linalg.solve import LinearSolver
from ..problem import RootProblem
from ..solution import Result, Solution, make_codes
from ..tree import axpy, norm
from .minimize import Ends, check_tolerance


class RootSolver(Protocol):
    """Finds a root of a `RootProblem`. Frozen settings only: the same object twice gives the same answer."""

    def find(self, problem: RootProblem) -> Solution:
        """The solution's ``value`` is flat, ``[*batch, n]``; its stats lack what `root` measures at the end."""
        ...


@dataclass
class RootProgress(Ends):
    """The stopping rule of root solvers, problem by problem."""

    tol: float | Tensor

    @classmethod
    def begin(cls, r: Tensor, tol: float | Tensor) -> RootProgress:
        size = norm(r)
        codes = make_codes(Result.MAX_STEPS, size)
        progress = cls(codes, torch.zeros_like(codes, dtype=torch.int64), torch.ones_like(codes, dtype=torch.bool), tol)
        progress.look(size)
        return progress

    def look(self, size: Tensor) -> None:
        """End the problems whose residual norm is small enough, or not finite."""
        self.end(size <= self.tol, Result.CONVERGED)
        self.end(~torch.isfinite(size), Result.NONFINITE)


def default_tol(r: Tensor) -> Tensor:
    """A residual norm that float32 or float64 can reach on problems of these scales, for each."""
    return (1e-10 if r.dtype == torch.float64 else 1e-5) * norm(r).clamp_min(1.0)


@dataclass(frozen=True)
class Newton:
    """Newton's method with a backtracking line search on ``||r||``. The default of `root`.

    Each step solves ``J d = -r`` by Jacobian products; quadratic convergence near a regular root. T problems have
    each its own step size and stopping.

    Args:
        linear_solver: for ``J d = -r``; None: `LU` up to 512 unknowns, `GMRES` beyond.
        max_steps: Newton steps at most.
        tol: stop a problem at this residual norm; None: 1e-10 (float64) or 1e-5 (float32), times the norm at the
            start where that is larger than one.
    """

    linear_solver: LinearSolver | None = None
    max_steps: int = 100
    tol: float | None = None

    def __post_init__(self) -> None:
        check_tolerance(max_steps=self.max_steps, tol=self.tol)

    def find(self, problem: RootProblem) -> Solution:
        """Find a root; see `RootSolver`."""
        y, r = problem.y, problem.r
        tol = default_tol(r) if self.tol is None else self.tol
        progress = RootProgress.begin(r, tol)
        solver = self.linear_solver or (LU() if y.shape[-1] <= 512 else GMRES(rtol=1e-6))
        for _ in range(self.max_steps):
            if not bool(progress.active.any()):
                break
            operator = GraphJacobian(problem.raveler, problem.linearize(y))
            wanted = torch.where(progress.active.unsqueeze(-1), -r, torch.zeros_like(r))
            y, r, moved = _backtrack(problem, y, r, solver.solve(operator, wanted).value, progress.active)
            progress.count()
            progress.look(norm(r))
            progress.end(~moved, Result.STAGNATED)
        return progress.solution(y)


def _backtrack(
    problem: RootProblem, y: Tensor, r: Tensor, direction: Tensor, active: Tensor, max_halvings: int = 30
) -> tuple[Tensor, Tensor, Tensor]:
    """The first of the steps 1, 1/2, 1/4, ... that lowers ``||r||``, for each problem; where none does, none."""
    size = norm(r)
    step, pending = torch.ones_like(size), active.clone()
    best_y, best_r = y, r
    for _ in range(max_halvings):
        trial = axpy(torch.where(pending, step, torch.zeros_like(step)), direction, y)
        trial_r = problem.evaluate(trial)
        better = pending & (norm(trial_r) < (1 - 1e-4 * step) * size)
        where = better.unsqueeze(-1)
        best_y, best_r = torch.where(where, trial, best_y), torch.where(where, trial_r, best_r)
        pending = pending & ~better
        if not bool(pending.any()):
            break
        step = torch.where(pending, step / 2, step)
    return best_y, best_r, active & ~pending


@dataclass(frozen=True)
class ScipyRoot:
    """A method of `scipy.optimize.root`, in float64 on the host; T problems are solved as the one system that they are.

    Args:
        method: ``"hybr"`` and ``"lm"`` (with a dense Jacobian), ``"krylov"``, ``"broyden1"``, ``"anderson"``, ...
        max_steps: iterations (of hybr: evaluations) at most.
        tol: as in `Newton`; whatever SciPy reports, a problem has converged where its residual norm is at most this.
    """

    method: str = "hybr"
    max_steps: int = 1000
    tol: float | None = None

    def __post_init__(self) -> None:
        check_tolerance(max_steps=self.max_steps, tol=self.tol)

    def find(self, problem: RootProblem) -> Solution:
        """Find a root; see `RootSolver`."""
        like, method = problem.y, self.method.lower()
        tol = default_tol(problem.r) if self.tol is None else self.tol
        calls = 0

        def tensor(x: np.ndarray) -> Tensor:
            return torch.from_numpy(np.array(x)).to(like.device, like.dtype).view_as(like)

        def residual(x: np.ndarray) -> np.ndarray:
            nonlocal calls
            calls += 1
            return to_numpy(problem.evaluate(tensor(x)))

        def jacobian(x: np.ndarray) -> np.ndarray:
            blocks = GraphJacobian(problem.raveler, problem.linearize(tensor(x))).to_dense()
            flat = blocks.reshape(-1, *blocks.shape[-2:]).double().cpu()
            return torch.block_diag(*flat).numpy()

        dense = method in ("hybr", "lm")
        options: dict[str, Any] = (
            {"maxfev" if method == "hybr" else "maxiter": self.max_steps}
            if dense
            else {"maxiter": self.max_steps, "fatol": float(torch.as_tensor(tol).min()) / like.numel() ** 0.5}
        )
        jac: Callable[..., Any] | None = jacobian if dense else None
        try:
            x = scipy.optimize.root(
                residual, to_numpy(like), jac=jac, method=self.method, tol=1e-14 if dense else None, options=options
            ).x
        except (ValueError, FloatingPointError, np.linalg.LinAlgError) as error:
            raise ValueError(f"ScipyRoot({self.method!r}) broke down: {error}. Try Newton().") from error
        y = tensor(x)
        size = norm(problem.evaluate(y))
        codes = make_codes(Result.MAX_STEPS if calls >= self.max_steps else Result.STAGNATED, size)
        codes = torch.where(size <= tol, make_codes(Result.CONVERGED, codes), codes)
        codes = torch.where(torch.isfinite(size), codes, make_codes(Result.NONFINITE, codes))
        return Solution(y, {"num_steps": torch.full_like(codes, calls, dtype=torch.int64), "result": codes})
