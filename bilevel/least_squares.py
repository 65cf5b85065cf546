"""`least_squares`: fit by nonlinear least squares, and let gradients pass through the fit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ._torch import innermost, shown
from .argmin import Params, argmin
from .checks import (
    check_flag,
    check_function,
    check_hypergrad,
    check_number_or_tensor,
    check_solver,
    check_start,
    check_warm_start,
)
from .closure import Closure, Tracer, VmappedClosure, without_graph
from .context import solves
from .hypergrad.base import Hypergrad, PathMethod
from .hypergrad.differentiate import differentiable_solve
from .hypergrad.implicit import Implicit
from .hypergrad.penalty import Penalty
from .hypergrad.search import Search
from .hypergrad.statement import ObjectiveStatement
from .inner.lbfgs import LBFGS
from .inner.minimize import InnerSolver
from .inner.proximal import minimises_more
from .inner.trust_region import LevenbergMarquardt, Loss, Rho, Terms
from .linalg.cg import CG
from .linalg.direct import Cholesky
from .linalg.gauss_newton import GaussNewton
from .linalg.jacobian import GraphJacobian
from .linalg.operator import Operator
from .linalg.scaled import SMALL, Equilibrated
from .problem import Problem, check_batch, check_init
from .recording import recording
from .solution import Result, Solution, Throw, check_throw, marked
from .tree import Raveler, Tree, leaves, on_host

LossName = Literal["linear", "soft_l1", "huber", "cauchy", "arctan"]

LOSSES: dict[str, Rho | None] = {
    "linear": None,
    "soft_l1": lambda z: 2 * z / ((1 + z).sqrt() + 1),
    "huber": lambda z: torch.where(z <= 1, z, 2 * torch.where(z <= 1, torch.ones_like(z), z).sqrt() - 1),
    "cauchy": torch.log1p,
    "arctan": torch.arctan,
}
"""``rho(z)`` of `scipy.optimize.least_squares`, of squared residuals in units of the scale."""


@solves
def least_squares(
    residuals: Callable[..., Tree],
    init: Params,
    *args: Any,
    loss: LossName | Rho = "linear",
    loss_scale: float | Tensor = 1.0,
    solver: InnerSolver | None = None,
    curvature: Literal["full", "gauss_newton"] = "full",
    hypergrad: Hypergrad | None = Implicit(),  # noqa: B008 (frozen)
    batched: bool = False,
    throw: Throw = "warn",
    warm_start: Solution | None = None,
) -> Solution[Params]:
    """Minimise ``sum rho(r^2 / s^2) s^2 / 2`` of the residuals ``r(params, *args)``; the fit is differentiable.

    For parameters of models that have many outputs: curves, differential equations, cameras, kinematics. The solvers
    use what a plain minimiser cannot see, that the objective is a sum of squares. Gradients flow as those of `argmin`:
    to the data that the residuals captured, to weights in them, to ``args``, to ``loss_scale``.

    Args:
        residuals: returns a tensor, or a tree of tensors, of as many numbers as there are residuals; differentiable
            twice. More residuals than params are not needed, but then the fit is not unique, which the backward pass
            tells.
        init: where to start: any tree of floating-point tensors.
        loss: ``rho``, as in `scipy.optimize.least_squares`: ``"linear"`` is plain least squares, the others let
            outliers count less; or an elementwise function of ``(r / s)^2`` with slope 1 at 0.
        loss_scale: ``s``, the residual from which on one counts as an outlier: a number, or one for each residual,
            ``[m]`` (``[T, m]``, or ``[T, 1]`` for each fit), in the order of the flattened residuals.
        solver: `LevenbergMarquardt` by default; `GaussNewtonCG` for many params; any solver of `argmin`, whose bounds,
            prox or weight decay count as in `argmin`.
        curvature: of the adjoint solve. ``"full"``: the Hessian, and the derivative is exact. ``"gauss_newton"``:
            without the second derivatives of the residuals, whose products are cheaper and never of negative curvature;
            biased by what the residuals at the fit weigh, and exact where they vanish.
        hypergrad: as in `argmin`; an `Implicit` without a linear solver factorises up to 512 params (with the
            coordinates scaled) and takes `CG` beyond. Methods that differentiate a path serve `argmin` only.
        batched: the first dimension of every leaf of ``init`` and of the residuals counts T independent fits, each with
            its own region and stopping.
        args, throw, warm_start: as in `argmin`.

    Returns:
        As `argmin`; ``stats["loss"]`` is the sum above, and ``residual_norm`` the norm of its gradient. A fit that
        ended at a saddle or a maximum of it has `Result.NEGATIVE_CURVATURE`.

    Raises:
        TypeError, ValueError, SolveError: as `argmin`.

    Example:
        ``fit = bl.least_squares(lambda p: p[0] * torch.exp(-p[1] * t) - data, torch.tensor([1.0, 0.1]))``
    """
    check_throw(throw)
    check_flag("batched", batched)
    check_function("residuals", residuals, init, "least_squares")
    if getattr(residuals, "sums_over_ranks", False):
        raise ValueError(
            "residuals is made by bl.distributed.sharded, which adds what the ranks return: residuals of different "
            "data would be added to each other. Add their squares: argmin(sharded(cost), init, ...), where cost "
            "returns the residuals of this rank's data .square().sum() / 2."
        )
    check_start(init)
    check_solver(solver, "minimize", "least_squares")
    check_hypergrad(hypergrad)
    check_warm_start(warm_start)
    check_init(init)
    of_residuals = Loss(_rho(loss, loss_scale), loss_scale)
    if curvature not in ("full", "gauss_newton"):
        raise ValueError(f"curvature is {curvature!r}: it is 'full' or 'gauss_newton'.")
    if isinstance(hypergrad, PathMethod):
        raise NotImplementedError(
            f"{type(hypergrad).__name__} differentiates the path of a solver of argmin, and trust regions have none: "
            "take Implicit, or write the sum of squares as an objective for argmin."
        )
    if curvature == "gauss_newton":
        _check_curvature(hypergrad)
    dims = int(batched)
    check_batch(init, dims)

    def flat(params: Tree, *args: Any) -> Tensor:
        return _flat(residuals(params, *args), dims)

    def cost(params: Tree, *args: Any) -> Tensor:
        return of_residuals.cost(flat(params, *args))

    def build(tracer: Tracer) -> Problem:
        problem = Problem(cost, init, args, tracer=tracer)
        problem.terms = Terms(_evaluated(problem, flat), of_residuals)
        return problem

    method = solver or LevenbergMarquardt()
    warn = isinstance(hypergrad, Implicit | Penalty) and torch.is_grad_enabled() and throw != "ignore"
    if minimises_more(method, cost, init, warn):
        if curvature != "full":
            raise ValueError(
                f"curvature is {curvature!r}, and {method!r} minimises more than the sum of squares (bounds, a prox or "
                "a weight decay): take curvature='full'."
            )
        return argmin(cost, init, *args, solver=method, hypergrad=hypergrad, throw=throw, warm_start=warm_start)
    complete = None if throw == "ignore" else _look_at_curvature
    found: Solution[Params] = differentiable_solve(
        lambda closure: LeastSquaresStatement(closure, replace(closure, fn=flat), of_residuals),
        cost,
        init,
        args,
        build=build,
        batch_dims_of=lambda _, __: dims,
        search=Search.by(method, throw, "The fit", fallback=LBFGS(), complete=complete),
        hypergrad=_adjoint(hypergrad, init, dims, curvature, flat, of_residuals),
        minimize=LBFGS().minimize,
        warm_start=warm_start,
    )
    return found


def _check_curvature(hypergrad: Hypergrad | None) -> None:
    if hypergrad is not None and not isinstance(hypergrad, Implicit):
        raise ValueError(f"curvature='gauss_newton' is of Implicit: {type(hypergrad).__name__} takes no such products.")
    if hypergrad is not None and hypergrad.operator != "graph":
        raise ValueError(
            f"curvature='gauss_newton' is an operator, and hypergrad has another one, {hypergrad.operator!r}: give one "
            "of the two."
        )


@dataclass(frozen=True)
class LeastSquaresStatement(ObjectiveStatement):
    """The objective, with the residuals for the solver. ``flat``: a closure of ``[*batch, m]`` residuals."""

    flat: Closure | VmappedClosure
    loss: Loss

    def problem(self, start: list[Tensor], hparams: Sequence[Tensor], batch_dims: int) -> Problem:
        problem = super().problem(start, hparams, batch_dims)
        problem.terms = Terms(lambda point: self.flat(point, hparams), self.loss)
        return problem

    def vmapped(self, in_dims: tuple[int | None, ...]) -> LeastSquaresStatement:
        closure, flat = (VmappedClosure(part, in_dims) for part in (self.closure, self.flat))
        return replace(self, closure=closure, flat=flat)


def _rho(loss: LossName | Rho, scale: float | Tensor) -> Rho | None:
    check_number_or_tensor("loss_scale", scale)
    if not bool((innermost(on_host(scale)) > 0).all()):
        raise ValueError(f"loss_scale is {shown(scale)}: it must be positive.")
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}: it is one of {', '.join(LOSSES)}, or a function of squared residuals.")
    return LOSSES[loss]


def _flat(found: Tree, dims: int) -> Tensor:
    """The residuals as one vector for each problem, ``[*batch, m]``."""
    parts = leaves(found)
    if not parts or not all(isinstance(part, Tensor) and part.is_floating_point() for part in parts):
        raise ValueError("residuals returned no tensors of floating point: return the residuals, not their squares.")
    if any(part.dim() < dims for part in parts):
        raise ValueError("residuals returned a scalar for T fits: with batched=True its first dimension is T.")
    if sum(part.numel() for part in parts) == 0:
        raise ValueError("residuals returned no numbers: there is nothing to fit.")
    flat = [part.reshape(*part.shape[:dims], -1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat, -1)


def _evaluated(problem: Problem, flat: Callable[..., Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
    """The residuals, evaluated as the problem evaluates its objective; it is the problem that holds them."""
    held = weakref.proxy(problem)

    def residuals(point: Sequence[Tensor]) -> Tensor:
        found: Tensor = held.under_rules(flat, held.raveler.unflatten(list(point)))
        return found

    def evaluated(point: Sequence[Tensor]) -> Tensor:
        without = held.differentiates and not torch.is_grad_enabled()
        found: Tensor = without_graph(residuals, point) if without else residuals(point)
        return found

    return evaluated


def _adjoint(
    hypergrad: Hypergrad | None,
    init: Tree,
    dims: int,
    curvature: str,
    flat: Callable[..., Tensor],
    loss: Loss,
) -> Hypergrad | None:
    """The method with a linear solver and an operator of its own where the user left them open."""
    if not isinstance(hypergrad, Implicit):
        return hypergrad
    if hypergrad.linear_solver is None:
        small = Raveler(init, check_batch(init, dims)).size <= SMALL
        hypergrad = replace(hypergrad, linear_solver=Equilibrated(Cholesky()) if small else CG())
    if curvature == "gauss_newton":
        hypergrad = replace(hypergrad, operator=GaussNewton(flat, lambda r, *_: loss.cost(r)))
    return hypergrad


def _look_at_curvature(problem: Problem, found: Solution[Tensor]) -> Solution[Tensor]:
    """`Result.NEGATIVE_CURVATURE` where the Hessian is not positive: Gauss and Newton's matrix cannot see it."""
    good = found.stats["result"] <= int(Result.STEPS_DONE)
    if recording() or problem.raveler.size > SMALL or not bool(good.any()):
        return found
    at = problem.linearize(found.value.detach())
    if not any(residual.requires_grad for residual in at.residual):
        return found
    return found.with_stats(result=_marked_saddles(GraphJacobian(problem.raveler, at, symmetric=True), found, good))


def _marked_saddles(hessian: Operator, found: Solution[Tensor], good: Tensor) -> Tensor:
    matrix = Equilibrated.scaled(hessian.to_dense().double())[0].nan_to_num(0, 0, 0)
    lowest = torch.linalg.eigvalsh(matrix)[..., 0]
    negative = lowest < -(torch.finfo(hessian.dtype).eps ** 0.5) * matrix.abs().amax((-2, -1))
    return marked(found.stats["result"], good & negative, Result.NEGATIVE_CURVATURE)
