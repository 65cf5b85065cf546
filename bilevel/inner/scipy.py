"""`scipy.optimize.minimize` as inner solver, in float64 on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from ..checks import check_fields
from ..linalg.cg import truncated_cg
from ..linalg.jacobian import GraphJacobian
from ..linalg.operator import Operator, Restricted, to_numpy
from ..problem import Evaluation, Problem
from ..prox import Prox
from ..prox.parts import within
from ..solution import Result, Solution, make_codes, marked
from ..tree import Tree, dot, norm, scale
from .bounded import BoundedMemory, Bounds, box_of, check_bounds, snapped
from .minimize import check_settings
from .nearness import Nearness
from .pairs import Memory
from .watch import Callbacks, watch

DERIVATIVE_FREE = ("nelder-mead", "powell", "cobyla", "cobyqa")
HESSIAN_METHODS = ("newton-cg", "trust-ncg", "trust-krylov", "trust-constr")
DENSE_HESSIAN_METHODS = ("dogleg", "trust-exact")
BOUNDED_METHODS = ("l-bfgs-b", "tnc", "slsqp", "trust-constr", "nelder-mead", "powell", "cobyla", "cobyqa")
METHODS = tuple(dict.fromkeys(("cg", "bfgs", *BOUNDED_METHODS, *HESSIAN_METHODS, *DENSE_HESSIAN_METHODS)))
TOLERANCE_OPTIONS: dict[str, Callable[[float], dict[str, float]]] = {
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
        bounds: as in `LBFGS`, of the methods that have them. Params that are within 1e-6 of a bound that pulls them are
            put on it. Within bounds trust-constr goes on until its trust region is of rounding, whatever ``gtol`` is.
        callback: called with each `InnerStep`; it ends the solve where it returns True. Or several of them. Whether a
            step is the last one is not known of most methods.
    """

    method: str = "L-BFGS-B"
    max_steps: int = 1000
    gtol: float | None = None
    bounds: tuple[Tree, Tree] | None = None
    callback: Callbacks = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        check_settings(max_steps=self.max_steps, gtol=self.gtol)
        check_bounds(self.bounds)
        if not isinstance(self.method, str) or self.method.lower() not in METHODS:
            raise ValueError(f"method is {self.method!r}: it is one of scipy.optimize.minimize, {', '.join(METHODS)}.")
        if self.bounds is not None and self.method.lower() not in BOUNDED_METHODS:
            raise ValueError(
                f"{self.method} has no bounds in SciPy: take one of {', '.join(BOUNDED_METHODS)}, or LBFGS."
            )

    def prox_for(self, init: Tree) -> Prox | None:
        """The bounds as a projection of the flat params; None: there are none."""
        return None if self.bounds is None else within(self.bounds, init)

    def minimize(self, problem: Problem) -> Solution[Tensor]:
        """Minimise; see `InnerSolver`."""
        shape, start = problem.start.y, problem.start
        box = None if self.bounds is None else box_of(problem, self.bounds)
        if box is not None:
            start = problem.evaluate(box.clip(start.y))
        method = self.method.lower()
        free = method in DERIVATIVE_FREE
        latest, judge, told = start, _Judge(problem, start, box), watch(self, problem)
        slope = _free(start, box)
        end: Evaluation | None = None
        calls, stopped = 0, told is not None and told(0, start.y, slope.g, start.f, torch.ones_like(start.f))
        if stopped or self._done(slope) or (self.gtol is None and not free and judge.arrived(start)):
            return self._solution(problem, start, 0, stopped, box)

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
            dense: np.ndarray = torch.block_diag(*blocks.reshape(-1, *blocks.shape[-2:]).double().cpu()).numpy()
            return dense

        def after_step(x: np.ndarray, *_: object) -> None:  # trust-constr tells of its state, too
            nonlocal calls, stopped, end
            y, calls = tensor(x), calls + 1
            at = latest if torch.equal(latest.y, y) else problem.evaluate(y)
            arrived = self.gtol is None and not free and judge.arrived(at)
            stopped = told is not None and told(calls, at.y, _free(at, box).g, at.f, torch.full_like(at.f, not arrived))
            if arrived or stopped:
                end = at
                raise StopIteration

        products: dict[str, Any] = {"hessp": hessp} if method in HESSIAN_METHODS else {}
        if method in DENSE_HESSIAN_METHODS:
            products = {"hess": hess}
        try:
            outcome = scipy.optimize.minimize(
                (lambda x: value_and_grad(x)[0]) if free else value_and_grad,
                to_numpy(start.y),
                jac=None if free else True,
                method=self.method,
                options=self._options(method, self.gtol or 0.0, start),
                callback=after_step if told is not None or (self.gtol is None and not free) else None,
                bounds=None if box is None else scipy.optimize.Bounds(to_numpy(box.low), to_numpy(box.high)),
                **products,
            )
        except StopIteration:  # TNC lets through what ends a solve; the others catch it
            if end is None:
                raise
        if end is None:
            at, steps = problem.evaluate(tensor(outcome.x)), int(outcome.get("nit", outcome.nfev))
        else:
            at, steps = end, calls
        if box is not None:
            at = problem.evaluate(snapped(box, at.y, at.g))
        return self._solution(problem, at, steps, stopped, box)

    def _done(self, at: Evaluation) -> bool:
        return bool((norm(at.g) <= (self.gtol or 0.0)).all())

    def _options(self, method: str, gtol: float, start: Evaluation) -> dict[str, Any]:
        # SciPy looks at the largest entry, we at the 2-norm of each problem.
        entry = gtol / start.g.shape[-1] ** 0.5
        limit = "maxfun" if method == "tnc" else "maxiter"  # TNC counts evaluations only
        if method == "trust-constr" and self.bounds is not None:
            entry = 0.0  # it is for the Lagrangian, which ends too soon; so the size of the trust region does
        tolerance = TOLERANCE_OPTIONS[method](entry) if method in TOLERANCE_OPTIONS else {"gtol": entry}
        return {**tolerance, limit: self.max_steps}

    def _solution(
        self, problem: Problem, at: Evaluation, steps: int, stopped: bool, box: Bounds | None
    ) -> Solution[Tensor]:
        size = norm(_free(at, box).g)
        near = size <= self.gtol if self.gtol is not None else _near(problem, at, box)
        codes = make_codes(Result.MAX_STEPS if steps >= self.max_steps else Result.STAGNATED, at.f)
        codes = make_codes(Result.STEPS_DONE, at.f) if stopped else codes
        codes = marked(codes, near, Result.CONVERGED)
        codes = marked(codes, ~torch.isfinite(size), Result.NONFINITE)
        return Solution(at.y, {"num_steps": torch.full_like(codes, steps, dtype=torch.int64), "result": codes})


class _Judge:
    """Judges SciPy's iterates by the step that L-BFGS would make of them."""

    def __init__(self, problem: Problem, start: Evaluation, box: Bounds | None):
        self.box, self.nearness = box, Nearness(start.y, problem.raveler.coarsest)
        self.memory = Memory(10, problem) if box is None else BoundedMemory(problem, start, box, 10)

    def arrived(self, at: Evaluation) -> bool:
        """Whether all problems are near their solutions."""
        towards, first, known = self.memory(at, at.f)
        move = scale(first, towards) if self.box is None else self.box.clip(at.y + towards) - at.y
        decrement = dot(at.g, move).abs()
        predicted = torch.where(known | (decrement == 0), norm(move), torch.inf)
        return bool(self.nearness.look(predicted, at.y, decrement, at.f).all())


def _free(at: Evaluation, box: Bounds | None) -> Evaluation:
    return at if box is None else box.free(at)


def _near(problem: Problem, at: Evaluation, box: Bounds | None) -> Tensor:
    """Which problems are near their solutions, by Newton's step there."""
    hessian: Operator = _hessian_at(problem, at.y)
    if box is not None:
        hessian, at = Restricted(hessian, ~box.held(at)), box.free(at)
    step = truncated_cg(hessian, at.g, torch.full_like(at.f, 0.1), 50)
    nearness = Nearness(at.y, problem.raveler.coarsest)
    return nearness.look(norm(step), at.y, dot(at.g, step).abs(), at.f) | nearness.acceptable


def _hessian_at(problem: Problem, y: Tensor) -> GraphJacobian:
    return GraphJacobian(problem.raveler, problem.linearize(y), symmetric=True)
