"""`scipy.optimize.minimize` as inner solver, in float64 on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from ..linalg.curvature import GraphHessian
from ..linalg.operator import to_numpy
from ..problem import Evaluation, Problem
from ..solution import Result, Solution, make_codes
from ..tree import norm
from .lbfgs import default_gtol
from .minimize import check_settings

DERIVATIVE_FREE = ("nelder-mead", "powell", "cobyla", "cobyqa")
HESSIAN_METHODS = ("newton-cg", "trust-ncg", "trust-krylov", "trust-constr")
TOLERANCE_OPTIONS = {
    "l-bfgs-b": lambda gtol: {"gtol": gtol, "ftol": 0.0, "maxfun": 10**9},
    "tnc": lambda gtol: {"gtol": gtol, "ftol": 0.0, "xtol": 0.0, "maxfun": 10**9},
    "newton-cg": lambda gtol: {"xtol": 1e-14},
    "trust-constr": lambda gtol: {"gtol": gtol, "xtol": 1e-14},
    "nelder-mead": lambda gtol: {"xatol": 1e-10, "fatol": 1e-14, "maxfev": 10**9},
    "powell": lambda gtol: {"xtol": 1e-10, "ftol": 1e-14},
    "cobyla": lambda gtol: {"tol": 1e-10},
    "cobyqa": lambda gtol: {"final_tr_radius": 1e-8},
    "slsqp": lambda gtol: {"ftol": 1e-15},
}


@dataclass(frozen=True)
class ScipyMinimize:
    """A method of `scipy.optimize.minimize`; T problems are minimised as the sum that they are.

    Whatever SciPy reports, a problem has converged where its own gradient norm is at most ``gtol``.

    Args:
        method: such as ``"L-BFGS-B"``, ``"BFGS"``, ``"CG"``, ``"Newton-CG"``, ``"trust-ncg"``, ``"TNC"``.
        max_steps: iterations at most.
        gtol: stop at this gradient norm; None: as in `LBFGS`.
    """

    method: str = "L-BFGS-B"
    max_steps: int = 1000
    gtol: float | None = None

    def __post_init__(self) -> None:
        check_settings(max_steps=self.max_steps, gtol=self.gtol)

    def minimize(self, problem: Problem) -> Solution:
        """Minimise; see `InnerSolver`."""
        gtol = default_gtol(problem) if self.gtol is None else self.gtol
        shape = problem.start.y

        def tensor(x: np.ndarray) -> Tensor:
            return torch.from_numpy(np.array(x)).to(shape.device, shape.dtype).view_as(shape)

        def value_and_grad(x: np.ndarray) -> tuple[float, np.ndarray]:
            at = problem.evaluate(tensor(x))
            return float(at.f.sum()), to_numpy(at.g)

        def hessp(x: np.ndarray, v: np.ndarray) -> np.ndarray:
            return to_numpy(_hessian_at(problem, tensor(x)).matvec(tensor(v)))

        method = self.method.lower()
        free = method in DERIVATIVE_FREE
        outcome = scipy.optimize.minimize(
            (lambda x: value_and_grad(x)[0]) if free else value_and_grad,
            to_numpy(problem.start.y),
            jac=None if free else True,
            hessp=hessp if method in HESSIAN_METHODS else None,
            method=self.method,
            options=self._options(method, float(torch.as_tensor(gtol).min()), problem.start),
        )
        at = problem.evaluate(tensor(outcome.x))
        return self._solution(at, gtol, int(outcome.get("nit", outcome.nfev)))

    def _options(self, method: str, gtol: float, start: Evaluation) -> dict[str, Any]:
        # SciPy looks at the largest entry, we at the 2-norm of each problem.
        entry = gtol / start.g.shape[-1] ** 0.5
        tolerance = TOLERANCE_OPTIONS.get(method, lambda gtol: {"gtol": gtol})
        return {**tolerance(entry), "maxiter": self.max_steps}

    def _solution(self, at: Evaluation, gtol: float | Tensor, steps: int) -> Solution:
        size = norm(at.g)
        codes = make_codes(Result.MAX_STEPS if steps >= self.max_steps else Result.STAGNATED, at.f)
        codes = torch.where(size <= gtol, make_codes(Result.CONVERGED, codes), codes)
        codes = torch.where(torch.isfinite(size), codes, make_codes(Result.NONFINITE, codes))
        return Solution(at.y, {"num_steps": torch.full_like(codes, steps, dtype=torch.int64), "result": codes})


def _hessian_at(problem: Problem, y: Tensor) -> GraphHessian:
    return GraphHessian(problem.raveler, problem.linearize(y))
