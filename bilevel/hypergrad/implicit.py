"""The implicit hypergradient: one linear solve with the Jacobian of the residual at the solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .._torch import pytree
from ..closure import Closure
from ..linalg.cg import CG
from ..linalg.curvature import FuncHessian, GraphHessian
from ..linalg.jacobian import GraphJacobian
from ..linalg.minres import MINRES
from ..linalg.operator import Damped, Operator
from ..linalg.scipy import GMRES
from ..linalg.solve import LinearSolver, LinearState
from ..problem import Linearization, Problem
from ..solution import Result, Solution
from .base import Point, Pulled
from .composite import CompositeStatement
from .statement import ResidualStatement

OperatorFactory = Callable[[Problem, Linearization], Operator]


@dataclass(frozen=True)
class Implicit:
    """Differentiate the residual ``r(y, x) = 0``, not the solver (implicit function theorem). The default.

    With ``f`` the outer loss: solve ``J^T u = grad_y f``, then ``df/dx = grad_x f - (d_x r)^T u``. For `argmin`,
    ``r = grad_y g`` and ``J`` is the Hessian. Memory does not depend on the number of inner steps. The error is at
    most that of the inner solution and of the linear solve: both are in the `Solution`. Derivatives of any order, in
    both modes, also under `torch.func`.

    Args:
        linear_solver: how the system is solved; None: `CG` for `argmin`, `GMRES` for `root` and `fixed_point`.
        operator: how products are made. ``"graph"``: one reverse pass over the retained graph of the residual;
            ``"func"``: `torch.func.jvp` of `torch.func.grad`, recomputed each time (`argmin` only); or a factory
            such as `GaussNewton` or `EmpiricalFisher`, in place of the Hessian.
        damping: solve with ``J + damping I``. Biased; for Jacobians that are singular or slightly indefinite.
    """

    linear_solver: LinearSolver | None = None
    operator: str | OperatorFactory = "graph"
    damping: float = 0.0

    reaches_init: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not callable(self.operator) and self.operator not in ("graph", "func"):
            raise ValueError(f"operator is {self.operator!r}: it is 'graph', 'func', or a factory such as GaussNewton.")
        if not self.damping >= 0:
            raise ValueError(f"damping is {self.damping}: it cannot be negative.")

    def pull(self, point: Point, cotangent: Tensor) -> Pulled:
        """See `Hypergrad`."""
        solved = self.solve_at(point, cotangent, transpose=True)
        u = point.raveler.unravel(solved.value)
        return Pulled(point.linearization().pull(u), adjoint=solved)

    def solve_at(self, point: Point, b: Tensor, *, transpose: bool) -> Solution:
        """Solve ``J^T u = b`` or ``J u = b`` at the solution, with the fallbacks that were allowed."""
        if isinstance(point.statement, CompositeStatement):
            hessian = self.operator_at(point.statement.smooth(point))
            return point.statement.solve(point, hessian, b, transpose, partial(self._solve, point))
        b = _without_unused(point, b)
        operator = self.operator_at(point)
        return self._solve(point, operator.T if transpose else operator, b)

    def _solve(self, point: Point, operator: Operator, b: Tensor) -> Solution:
        solver = self.linear_solver or (CG() if operator.symmetric else GMRES())
        state = point.state if isinstance(point.state, LinearState) else None
        solved = solver.solve(self._damped(operator, 0.0), b, state)
        return self._recover(operator, b, solved) if point.throw == "fallback" else solved

    def operator_at(self, point: Point) -> Operator:
        """``J`` at the solution."""
        at, raveler = point.linearization(), point.raveler
        if callable(self.operator):
            return self.operator(_problem(point), at)
        if isinstance(point.statement, ResidualStatement):
            return GraphJacobian(raveler, at, point.statement.symmetric)
        if self.operator == "graph":
            return GraphHessian(raveler, at)
        assert at.loss is not None
        hparams = [tensor.detach() for tensor in at.hparams]
        return FuncHessian(raveler, at, lambda params: point.statement.closure(params, hparams).sum())

    def _damped(self, operator: Operator, more: float) -> Operator:
        damping = self.damping + more
        return Damped(operator, damping) if damping else operator

    def _recover(self, operator: Operator, b: Tensor, failed: Solution) -> Solution:
        """Try, in the problems that failed, a solver for indefinite matrices, then ever more damping."""
        attempts: list[tuple[LinearSolver, float]] = (
            [(MINRES(rtol=FALLBACK_RTOL), 0.0)] if operator.symmetric else [(GMRES(rtol=FALLBACK_RTOL), 0.0)]
        )
        for damping in (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0):
            attempts.append((CG(FALLBACK_RTOL) if operator.symmetric else GMRES(FALLBACK_RTOL), damping))
        best = failed
        for solver, damping in attempts:
            if best.result.ok or best.result is Result.NONFINITE:
                break
            name = type(solver).__name__ + (f" with damping {damping:g}" if damping else "")
            tried = solver.solve(self._damped(operator, damping), b)
            best = _merge(best, tried, (*best.recovered, name))
        return best


FALLBACK_RTOL = 1e-4


def _without_unused(point: Point, b: Tensor) -> Tensor:
    """Zero where a leaf has no residual: it stays at its start whatever the hyperparameters are."""
    used = [r.requires_grad for r in point.linearization().residual]
    if all(used):
        return b
    parts = point.raveler.unravel(b)
    return point.raveler.ravel([p if use else torch.zeros_like(p) for p, use in zip(parts, used, strict=True)])


def _problem(point: Point) -> Problem:
    """The problem as operator factories see it: the user's own objective and args."""
    closure = point.statement.closure
    if not isinstance(closure, Closure) or isinstance(point.statement, ResidualStatement):
        raise NotImplementedError(
            "A Gauss-Newton or Fisher operator serves argmin, outside of torch.func.vmap: give it a vector objective."
        )
    params = pytree.tree_unflatten(point.params, closure.spec)
    return Problem(closure.fn, params, closure.args, max_batch_dims=point.batch_dims)


def _merge(old: Solution, new: Solution, recovered: tuple[str, ...]) -> Solution:
    """Keep the problems that were solved, take ``new`` in the others."""
    keep = old.stats["result"] <= int(Result.STEPS_DONE)
    stats = {name: torch.where(keep, stat, new.stats[name]) for name, stat in old.stats.items() if name in new.stats}
    return Solution(torch.where(keep.unsqueeze(-1), old.value, new.value), stats, recovered)
