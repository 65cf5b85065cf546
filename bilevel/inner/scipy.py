"""`scipy.optimize.minimize` as inner solver, in float64 on the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from ..linalg.cg import truncated_cg
from ..linalg.jacobian import GraphJacobian
from ..linalg.operator import to_numpy
from ..problem import Evaluation, Problem
from ..solution import Result, Solution, make_codes, marked
from ..tree import dot, norm
from .lbfgs import Memory
from .minimize import check_settings
from .nearness import Nearness
from .watch import Callbacks, watch

DERIVATIVE_FREE = ("nelder-mead", "powell", "cobyla", "cobyqa")
HESSIAN_METHODS = ("newton-cg", "trust-ncg", "trust-krylov", "trust-constr")
DENSE_HESSIAN_METHODS = ("dogleg", "trust-exact")
TOLERANCE_OPTIONS = {
    "l-bfgs-b": lambda gtol: {"gtol": gtol, "ftol": 0.0, "maxfun": 10**9},
    "tnc": lambda gtol: {"gtol": gtol, "ftol": 0.0, "xtol": 0.0},
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
            Those that want a Hessian get its products, ``"dogleg"`` and ``"trust-exact"`` the matrices.
        max_steps: iterations at most.
        gtol: stop at this gradient norm; None: as in `LBFGS`.
        callback: called with each `InnerStep`; it ends the solve where it returns True. Or several of them. COBYLA,
            SLSQP and TNC cannot be ended. Whether a step is the last one is not known of most methods.
    """

    method: str = "L-BFGS-B"
    max_steps: int = 1000
    gtol: float | None = None
    callback: Callbacks = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_settings(max_steps=self.max_steps, gtol=self.gtol)

    def minimize(self, problem: Problem) -> Solution[Tensor]:
        """Minimise; see `InnerSolver`."""
        shape, start = problem.start.y, problem.start
        method = self.method.lower()
        free = method in DERIVATIVE_FREE
        latest, judge, told = start, _Judge(problem), watch(self, problem)
        calls, stopped = 0, told is not None and told(0, start.y, start.g, start.f, torch.ones_like(start.f))
        if stopped or self._done(start) or (self.gtol is None and not free and judge.arrived(start)):
            return self._solution(problem, start, 0, stopped)

        def tensor(x: np.ndarray) -> Tensor:
            return torch.from_numpy(np.array(x)).to(shape.device, shape.dtype).view_as(shape)

        def value_and_grad(x: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal latest
            latest = problem.evaluate(tensor(x))
            return float(latest.f.sum()), to_numpy(latest.g)

        def hessp(x: np.ndarray, v: np.ndarray) -> np.ndarray:
            return to_numpy(_hessian_at(problem, tensor(x)).matvec(tensor(v)))

        def hess(x: np.ndarray) -> np.ndarray:
            blocks = _hessian_at(problem, tensor(x)).to_dense()
            return torch.block_diag(*blocks.reshape(-1, *blocks.shape[-2:]).double().cpu()).numpy()

        def after_step(x: np.ndarray) -> None:
            nonlocal calls, stopped
            y, calls = tensor(x), calls + 1
            at = latest if torch.equal(latest.y, y) else problem.evaluate(y)
            arrived = self.gtol is None and not free and judge.arrived(at)
            stopped = told is not None and told(calls, at.y, at.g, at.f, torch.full_like(at.f, not arrived))
            if arrived or stopped:
                raise StopIteration

        products: dict[str, Any] = {"hessp": hessp} if method in HESSIAN_METHODS else {}
        if method in DENSE_HESSIAN_METHODS:
            products = {"hess": hess}
        outcome = scipy.optimize.minimize(
            (lambda x: value_and_grad(x)[0]) if free else value_and_grad,
            to_numpy(start.y),
            jac=None if free else True,
            method=self.method,
            options=self._options(method, self.gtol or 0.0, start),
            callback=after_step if told is not None or (self.gtol is None and not free) else None,
            **products,
        )
        steps = int(outcome.get("nit", outcome.nfev))
        return self._solution(problem, problem.evaluate(tensor(outcome.x)), steps, stopped)

    def _done(self, at: Evaluation) -> bool:
        return bool((norm(at.g) <= (self.gtol or 0.0)).all())

    def _options(self, method: str, gtol: float, start: Evaluation) -> dict[str, Any]:
        # SciPy looks at the largest entry, we at the 2-norm of each problem.
        entry = gtol / start.g.shape[-1] ** 0.5
        tolerance = TOLERANCE_OPTIONS.get(method, lambda gtol: {"gtol": gtol})
        limit = "maxfun" if method == "tnc" else "maxiter"  # TNC counts evaluations only
        return {**tolerance(entry), limit: self.max_steps}

    def _solution(self, problem: Problem, at: Evaluation, steps: int, stopped: bool) -> Solution[Tensor]:
        size = norm(at.g)
        near = size <= self.gtol if self.gtol is not None else _near(problem, at)
        codes = make_codes(Result.MAX_STEPS if steps >= self.max_steps else Result.STAGNATED, at.f)
        codes = make_codes(Result.STEPS_DONE, at.f) if stopped else codes
        codes = marked(codes, near, Result.CONVERGED)
        codes = marked(codes, ~torch.isfinite(size), Result.NONFINITE)
        return Solution(at.y, {"num_steps": torch.full_like(codes, steps, dtype=torch.int64), "result": codes})


class _Judge:
    """Judges SciPy's iterates by the step that L-BFGS would make of them."""

    def __init__(self, problem: Problem):
        self.memory, self.nearness = Memory(10, problem), Nearness(problem.start.y)

    def arrived(self, at: Evaluation) -> bool:
        """Whether all problems are near their solutions."""
        towards, first, known = self.memory.direction(at, at.f)
        decrement = first * dot(at.g, towards).abs()
        predicted = torch.where(known | (decrement == 0), first * norm(towards), torch.inf)
        return bool(self.nearness.look(predicted, at.y, decrement, at.f).all())


def _near(problem: Problem, at: Evaluation) -> Tensor:
    """Which problems are near their solutions, by Newton's step there."""
    step = truncated_cg(_hessian_at(problem, at.y), at.g, torch.full_like(at.f, 0.1), 50)
    nearness = Nearness(at.y)
    return nearness.look(norm(step), at.y, dot(at.g, step).abs(), at.f) | nearness.acceptable


def _hessian_at(problem: Problem, y: Tensor) -> GraphJacobian:
    return GraphJacobian(problem.raveler, problem.linearize(y), symmetric=True)
