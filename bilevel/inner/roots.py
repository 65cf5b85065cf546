"""Solvers of square systems ``r(y) = 0``: Newton-Krylov with a line search, and SciPy's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import scipy
import torch
from torch import Tensor

from ..checks import check_linear_solver
from ..linalg.direct import LU
from ..linalg.jacobian import GraphJacobian
from ..linalg.operator import to_numpy
from ..linalg.scipy import GMRES
from ..linalg.solve import LinearSolver
from ..problem import RootProblem
from ..solution import Result, Solution, make_codes, marked
from ..tree import axpy, norm
from .minimize import Ends, check_tolerance
from .nearness import Nearness
from .watch import Callbacks, watch


class RootSolver(Protocol):
    """Finds a root of a `RootProblem`. Frozen settings only: the same object twice gives the same answer."""

    def find(self, problem: RootProblem) -> Solution[Tensor]:
        """The solution's ``value`` is flat, ``[*batch, n]``; its stats lack what `root` measures at the end."""
        ...


@dataclass
class RootProgress(Ends):
    """The stopping rule of root solvers, problem by problem; without a tolerance only a residual of zero ends it."""

    tol: float | None

    @classmethod
    def begin(cls, r: Tensor, tol: float | None) -> RootProgress:
        size = norm(r)
        codes = make_codes(Result.MAX_STEPS, size)
        progress = cls(codes, torch.zeros_like(codes, dtype=torch.int64), torch.ones_like(codes, dtype=torch.bool), tol)
        progress.look(size)
        return progress

    def look(self, size: Tensor) -> None:
        """End the problems whose residual norm is small enough, or not finite."""
        self.end(size <= (self.tol or 0.0), Result.CONVERGED)
        self.end(~torch.isfinite(size), Result.NONFINITE)


@dataclass(frozen=True)
class Newton:
    """Newton's method with a backtracking line search on ``||r||``. The default of `root`.

    Each step solves ``J d = -r`` by Jacobian products; quadratic convergence near a regular root. T problems have
    each its own step size and stopping.

    Args:
        linear_solver: for ``J d = -r``; None: `LU` up to 512 unknowns, `GMRES` beyond.
        max_steps: Newton steps at most.
        tol: stop a problem at this residual norm; None: where the next step is at most 1e-9 (float64) or 3e-5
            (float32) times the norm of the unknowns, whatever their scale and that of the residual.
        callback: called with each `InnerStep`; it ends the solve where it returns True. Or several of them.
    """

    linear_solver: LinearSolver | None = None
    max_steps: int = 100
    tol: float | None = None
    callback: Callbacks = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_linear_solver(self.linear_solver)
        check_tolerance(max_steps=self.max_steps, tol=self.tol)

    def find(self, problem: RootProblem) -> Solution[Tensor]:
        """Find a root; see `RootSolver`."""
        y, r = problem.y, problem.r
        progress = RootProgress.begin(r, self.tol)
        nearness = Nearness(y) if self.tol is None else None
        solver = self.linear_solver or (LU() if y.shape[-1] <= 512 else GMRES(rtol=1e-6))
        told = watch(self, problem)
        for step in range(self.max_steps + 1):
            if told is not None and told(step, y, r, None, progress.active):
                progress.stop()
            if not bool(progress.active.any()):
                break
            operator = GraphJacobian(problem.raveler, problem.linearize(y))
            wanted = torch.where(progress.active.unsqueeze(-1), -r, torch.zeros_like(r))
            move, size = solver.solve(operator, wanted).value, norm(r)
            if nearness is not None:
                progress.end(nearness.look(norm(move), y), Result.CONVERGED)
            if step == self.max_steps:
                break
            y, r, moved = _backtrack(problem, y, r, move, progress.active)
            progress.count()
            progress.look(norm(r))
            if nearness is not None:
                # The next step is as much smaller as the residual is.
                arrived = nearness.reached(norm(move) * norm(r) / size, y)
                progress.end(arrived | (~moved & nearness.acceptable), Result.CONVERGED)
            progress.end(~moved, Result.STAGNATED)
        return progress.solution(y, **({} if nearness is None else {"step_norm": nearness.predicted}))


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

    def find(self, problem: RootProblem) -> Solution[Tensor]:
        """Find a root; see `RootSolver`."""
        like, method = problem.y, self.method.lower()
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

        def solve(start: np.ndarray, tol: float) -> np.ndarray:
            options: dict[str, Any] = (
                {"maxfev" if method == "hybr" else "maxiter": self.max_steps}
                if dense
                else {"maxiter": self.max_steps, "fatol": tol / like.numel() ** 0.5}
            )
            try:
                return scipy.optimize.root(
                    residual,
                    start,
                    jac=jacobian if dense else None,
                    method=self.method,
                    tol=1e-14 if dense else None,
                    options=options,
                ).x
            except (ValueError, FloatingPointError, np.linalg.LinAlgError) as error:
                raise ValueError(f"ScipyRoot({self.method!r}) broke down: {error}. Try Newton().") from error

        dense = method in ("hybr", "lm")
        y, size = like, norm(problem.r)
        done = size <= (self.tol or 0.0)
        for _ in range(1 if dense or self.tol is not None else REFERENCES):
            if bool(done.all()) or calls >= self.max_steps or not bool(torch.isfinite(size).all()):
                break
            y = tensor(solve(to_numpy(y), self.tol or 1e-4 * float(size[~done].max())))
            size = norm(problem.evaluate(y))
            done = size <= self.tol if self.tol is not None else self._arrived(problem, y, size)
        codes = make_codes(Result.MAX_STEPS if calls >= self.max_steps else Result.STAGNATED, size)
        codes = marked(codes, done, Result.CONVERGED)
        codes = marked(codes, ~torch.isfinite(size), Result.NONFINITE)
        return Solution(y, {"num_steps": torch.full_like(codes, calls, dtype=torch.int64), "result": codes})

    @staticmethod
    def _arrived(problem: RootProblem, y: Tensor, size: Tensor) -> Tensor:
        """Whether Newton's next step would be small."""
        operator = GraphJacobian(problem.raveler, problem.linearize(y))
        solver = LU() if y.shape[-1] <= 512 else GMRES(rtol=1e-2)
        nearness = Nearness(y)
        return nearness.look(norm(solver.solve(operator, -problem.evaluate(y)).value), y) | nearness.near | (size == 0)


REFERENCES = 5
"""How often SciPy is asked again for a residual of a ten thousandth, where the solution is not near yet."""
