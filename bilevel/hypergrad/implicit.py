"""The implicit hypergradient: one linear solve with the Jacobian of the residual at the solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .._torch import pytree
from ..checks import check_fields, check_linear_solver
from ..closure import Closure, Tracer
from ..inner.decay import Decayed
from ..inner.nearness import Goal
from ..linalg.cg import CG
from ..linalg.curvature import FuncHessian
from ..linalg.gauss_newton import Sandwich
from ..linalg.gmres import GMRES
from ..linalg.minres import MINRES
from ..linalg.neumann import largest_eigenvalue
from ..linalg.operator import Damped, Operator
from ..linalg.solve import LinearSolver, LinearState, default_rtol, report
from ..notices import tell
from ..problem import Linearization, Problem
from ..recording import free_looks
from ..solution import Result, Solution, SolveWarning, marked
from ..tree import dot, norm
from .advice import solver_in_use
from .base import Point, Pulled

OperatorFactory = Callable[[Problem, Linearization], Operator]


@dataclass(frozen=True)
class Implicit:
    """Differentiate the residual ``r(y, x) = 0``, not the solver (implicit function theorem). The default.

    With ``f`` the outer loss: solve ``J^T u = grad_y f``, then ``df/dx = grad_x f - (d_x r)^T u``. For `argmin`,
    ``r = grad_y g`` and ``J`` is the Hessian. Memory does not depend on the number of inner steps. The error is at
    most that of the inner solution and of the linear solve: both are in the `Solution`. Derivatives of any order, in
    both modes, also under `torch.func`.

    Args:
        linear_solver: how the system is solved; None: `CG` for `argmin`, five steps of `MINRES` where the default inner
            solver gave up, `GMRES` for `root` and `fixed_point`, `MINRES` for a `root` with a symmetric Jacobian.
        operator: how products are made. ``"graph"``: one reverse pass over the retained graph of the residual;
            ``"func"``: `torch.func.vjp` of `torch.func.grad`, recomputed each time (`argmin` only); or a factory
            such as `GaussNewton` or `EmpiricalFisher`, in place of the Hessian.
        damping: solve with ``J + damping I``. Biased; for Jacobians that are singular or slightly indefinite.
    """

    linear_solver: LinearSolver | None = None
    operator: str | OperatorFactory = "graph"
    damping: float = 0.0

    reaches_init: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_linear_solver(self.linear_solver)
        if isinstance(self.operator, type):
            raise TypeError(f"operator is the class {self.operator.__name__}: write {self.operator.__name__}(...).")
        if not callable(self.operator) and self.operator not in ("graph", "func"):
            raise ValueError(f"operator is {self.operator!r}: it is 'graph', 'func', or a factory such as GaussNewton.")
        if isinstance(self.damping, Tensor) and self.damping.requires_grad:
            raise TypeError(
                "damping is a tensor that requires grad, and no gradient flows to it: pass damping.item(). What is "
                "learned belongs into the objective."
            )
        if not self.damping >= 0:
            raise ValueError(f"damping is {self.damping}: it cannot be negative.")

    def pull(self, point: Point, cotangent: Tensor) -> Pulled:
        """See `Hypergrad`."""
        solved = self.solve_at(point, cotangent, transpose=True)
        u = point.raveler.unravel(solved.value)
        return Pulled(point.linearization().pull(u), adjoint=solved)

    def solve_at(self, point: Point, b: Tensor, *, transpose: bool) -> Solution[Tensor]:
        """Solve ``J^T u = b`` or ``J u = b`` at the solution, with the fallbacks that were allowed."""
        operator = self.operator_at(point.statement.smooth(point))
        solved = point.statement.solve(point, operator, b, transpose, partial(self._solve, point))
        if isinstance(operator, FuncHessian) and point.seen is not None:
            point.seen.check_apart(operator.apart)
        return self._doubted(point, b, solved)

    def _solve(self, point: Point, operator: Operator, b: Tensor) -> Solution[Tensor]:
        solver = solver_in_use(self, point.statement, operator.symmetric, point.found)
        state = point.state if isinstance(point.state, LinearState) else None
        solved = solver.solve(self._damped(operator, 0.0), b, state)
        if self._untold and point.raveler.coarsest != b.dtype:  # no more than the coarsest params allow
            stats = solved.stats
            small = stats["relative_residual"] <= default_rtol(point.raveler.coarsest)
            solved = solved.with_stats(result=marked(stats["result"], small, Result.CONVERGED))
        return self._recover(operator, b, solved) if point.throw == "fallback" else solved

    def operator_at(self, point: Point) -> Operator:
        """``J`` at the solution."""
        at, raveler = point.linearization(), point.raveler
        if callable(self.operator):
            closure = _closure(point)
            with closure.as_given():
                return self._made_by_factory(point, at, closure)
        if self.operator == "graph" or not point.statement.has_objective:
            return point.statement.operator(raveler, at)
        assert at.loss is not None
        hparams = [tensor.detach() for tensor in at.hparams]
        return FuncHessian(raveler, at, lambda params: point.statement.closure(params, hparams).sum())

    def _made_by_factory(self, point: Point, at: Linearization, closure: Closure) -> Operator:
        assert callable(self.operator)
        problem = _problem(point, closure)
        if point.seen is not None:
            point.seen.check_loss(problem.start.f)
        decayed = isinstance(problem.objective, Decayed)
        if isinstance(problem.objective, Decayed):
            problem.objective = problem.objective.objective  # its decay is added below
        make = self.operator if problem.ranks is None else partial(problem.ranks.operator, self.operator)
        operator = make(problem, at)
        apart = decayed or self.damping or problem.draws or problem.ranks is not None  # what is left out may be there
        if not apart and point.throw != "ignore" and _is_misstated(operator, problem):
            tell(MISSTATED.format(operator=type(self.operator).__name__), SolveWarning, kind=MISSTATED)
        return _with_decay(point, operator)

    def _damped(self, operator: Operator, more: float) -> Operator:
        damping = self.damping + more
        return Damped(operator, damping) if damping else operator

    def _recover(self, operator: Operator, b: Tensor, failed: Solution[Tensor]) -> Solution[Tensor]:
        """Try, in the problems that failed, a solver for indefinite matrices, then ever more damping.

        Each attempt is judged by the system that was asked for.
        """
        rtol = getattr(self.linear_solver, "rtol", None) or default_rtol(b.dtype)
        general: type[MINRES | GMRES] = MINRES if operator.symmetric else GMRES
        best, size = failed, None
        for damping in (0.0, *FALLBACK_DAMPING):
            if best.result.ok or best.result is Result.NONFINITE:
                break
            if damping and size is None:
                size = float(largest_eigenvalue(operator, 5).max())
            more = damping * (size or 0.0)
            solver: LinearSolver = CG(rtol) if damping and operator.symmetric else general(rtol=rtol)
            tried = solver.solve(self._damped(operator, more), b)
            if damping:
                tried = _judged(self._damped(operator, 0.0), b, tried)
            name = type(solver).__name__ + (f" with damping {more:.2g}" if damping else "")
            best = _merge(best, tried, (*best.recovered, name))
        return best

    @property
    def _untold(self) -> bool:
        """Whether the user said how accurate the solve shall be neither by a tolerance nor by a number of steps."""
        return all(getattr(self.linear_solver, name, None) is None for name in ("rtol", "max_steps"))

    def _doubted(self, point: Point, b: Tensor, solved: Solution[Tensor]) -> Solution[Tensor]:
        """`Result.INACCURATE` in the problems where solves without a tolerance are not as near as they promise.

        ``u . r`` is to first order what the distance to the solution costs the outer loss (the dual-weighted residual):
        with exact curvature it sees what the steps of the inner solver may not have seen.
        """
        codes, goal = solved.stats["result"], Goal.of(b.dtype, point.raveler.coarsest)
        doubtful = torch.zeros_like(codes, dtype=torch.bool)
        found = None if point.found is None else point.found.stats
        if found is not None and "step_norm" in found and found["step_norm"].shape == codes.shape:
            residual = point.raveler.ravel([r.detach() for r in point.linearization().residual])
            promised = goal.promised * norm(point.raveler.ravel(point.params))
            allowed = torch.maximum(promised, 100 * found["step_norm"])
            far = dot(solved.value, residual).abs() > allowed * norm(b)
            # The gradient that is left, over the smallest curvature, bounds the distance, whatever the solver saw.
            least = solved.stats.get("least_curvature", torch.full_like(allowed, torch.inf))
            far = far | (norm(residual) > torch.maximum(promised, 10 * found["step_norm"]) * least)
            doubtful = far & (found["result"] <= int(Result.STEPS_DONE))
        if self._untold and "condition" in solved.stats:
            lost = torch.finfo(b.dtype).eps * solved.stats["condition"]
            doubtful = doubtful | (lost > max(LOST_TO_ROUNDING, goal.promised))
        codes = marked(codes, doubtful & (codes < int(Result.INACCURATE)), Result.INACCURATE)
        return solved.with_stats(result=codes)


FALLBACK_DAMPING = (1e-6, 1e-3, 1.0)
"""In units of the norm of the matrix."""

LOST_TO_ROUNDING = 1e-2
"""The condition number in units of rounding errors above which a default solve doubts its own answer."""


def _judged(asked: Operator, b: Tensor, tried: Solution[Tensor]) -> Solution[Tensor]:
    """A damped answer, with the residual that it leaves in the system that was asked for, and a result of its own."""
    codes = tried.stats["result"]
    codes = marked(codes, codes <= int(Result.STEPS_DONE), Result.DAMPED)
    return report(tried.value, codes, tried.stats["num_steps"], norm(b - asked.matvec(tried.value)), norm(b))


def _closure(point: Point) -> Closure:
    """That of one problem, for operator factories."""
    closure = point.statement.closure
    if not isinstance(closure, Closure) or not point.statement.has_objective:
        raise NotImplementedError(
            "A Gauss-Newton or Fisher operator serves argmin, outside of torch.func.vmap: give it a vector objective."
        )
    return closure


def _problem(point: Point, closure: Closure) -> Problem:
    """The problem as operator factories see it: the user's own objective and args."""
    params = pytree.tree_unflatten(point.params, closure.spec)
    tracer = Tracer(differentiable=False)
    return Problem(closure.fn, params, closure.args, max_batch_dims=point.batch_dims, tracer=tracer)


MISSTATED = (
    "{operator} belongs to another objective than the one that was solved: the gradients of the two differ at the "
    "solution, so that the matrix is another one and the hypergradient wrong. The objective has to be loss(outputs) + "
    "rest, of EmpiricalFisher the mean of the losses + rest: is a penalty forgotten (rest=), or a mean taken for a "
    "sum? GaussNewton.of(module, loss) finds all parts by itself; where damping stands for what is left out, give "
    "Implicit(damping=...); throw='ignore' hides this"
)


def _is_misstated(operator: Operator, problem: Problem) -> bool:
    """Whether the objective of a matrix that was written for it has another gradient at the solution."""
    if not isinstance(operator, Sandwich) or operator.gradient is None or not free_looks(problem.start.g):
        return False
    y = problem.start.y
    size = norm(operator.matvec(y.to(operator.dtype)))  # that of gradients, as far away as the params are long
    return bool((norm(operator.gradient() - problem.start.g) > MISFIT * size).logical_and(size > 0).any())


MISFIT = 1e-2
"""What two gradients differ by, beside the size that gradients have, that rounding does not make."""


def _with_decay(point: Point, operator: Operator) -> Operator:
    """An operator that the user wrote for the objective, and the weight decay that the solver added to it."""
    fn = point.statement.closure.fn if isinstance(point.statement.closure, Closure) else None
    if not isinstance(fn, Decayed):
        return operator
    decay = fn.diagonal(point.raveler, point.params)
    return Damped(operator, decay.detach() if isinstance(decay, Tensor) else decay)


def _merge(old: Solution[Tensor], new: Solution[Tensor], recovered: tuple[str, ...]) -> Solution[Tensor]:
    """Keep the problems that were solved; in the others take ``new`` where it leaves less, or as much with less."""
    before, after = (part.stats["relative_residual"] for part in (old, new))
    smaller = (after <= 1.1 * before) & (norm(new.value) < 0.5 * norm(old.value))
    better = (after < 0.99 * before) | torch.isnan(before) | smaller | (new.stats["result"] <= int(Result.STEPS_DONE))
    take = (old.stats["result"] > int(Result.STEPS_DONE)) & better
    stats = {name: torch.where(take, new.stats[name], stat) for name, stat in old.stats.items() if name in new.stats}
    return Solution(torch.where(take.unsqueeze(-1), new.value, old.value), stats, recovered)
