"""What to try after an adjoint solve that failed: from the solver in use, and what it saw."""

from __future__ import annotations

import torch

from ..inner.outcome import GAUSS_NEWTON_ADVICE, now
from ..linalg.cg import CG
from ..linalg.gmres import GMRES
from ..linalg.minres import MINRES
from ..linalg.neumann import Neumann
from ..linalg.solve import LinearSolver
from ..solution import Result, Solution
from .statement import Statement

NONFINITE_ADVICE = (
    "In the linear solve, or in the derivative by the hyperparameters: look for functions whose slope is infinite "
    "there (sqrt or norm at zero, also behind torch.where), and for an outer loss that is not finite"
)
INACCURATE_ADVICE = (
    "The inner solution is farther from the minimum than its solver could see, or the matrix too ill-conditioned for "
    "this precision: scale the params or the data, take float64, NewtonCG(), or a tolerance of your own (gtol, rtol) "
    "if this accuracy is enough. Where the loss has a kink there (abs, relu, max), its slopes do not tell how the "
    "minimum moves: ProximalGradient(prox) serves such a penalty"
)
FLAT_ADVICE = (
    "As far as rounding tells, the loss has no curvature along some directions: its minimum is no single point"
)
SINGULAR_ADVICE = (
    "The factorised matrix is singular, where the minimum is no single point, or indefinite, where the params are none"
)
FLAT_WAYS = (
    "An outer loss that depends on where it lies along them has no hypergradient: add a penalty on the params, start "
    "where the loss is not constant, or take Implicit(damping=...); of an outer loss that does not, MINRES() or "
    "LeastNorm() give it. If the minimum is a single point all the same, the problem is too ill-conditioned for this "
    "precision: scale the params or the columns of the data, or take a higher one"
)
RESOLVED = 1e3
"""Rounding errors of the largest curvature within which another one counts as none."""

REACHED = 0.6
"""Along an orbit of minima the curvature where a solve ended is of the size of the gradient that it left: this power of
rounding, of the largest, counts as none too."""

FEW_STEPS = 5
"""Those of the default where the default inner solver gave up: there is no minimum near whose derivative an accurate
solve would give, and the first steps keep to the directions of large curvature, which is positive."""


def solver_in_use(hypergrad: object, statement: Statement, symmetric: bool, found: Solution | None) -> LinearSolver:
    """The linear solver of a hypergradient, which is a default where none was named.

    Args:
        found: the inner solve.
    """
    named: LinearSolver | None = getattr(hypergrad, "linear_solver", None)
    if named is not None:
        return named
    if not (symmetric and statement.definite):
        return MINRES() if symmetric else GMRES()
    return MINRES(max_steps=FEW_STEPS) if found is not None and "given_up" in found.stats else CG()


def adjoint_advice(hypergrad: object, statement: Statement, found: Solution | None, solved: Solution) -> str:
    """What to try.

    Args:
        found: the inner solve. solved: the adjoint solve that failed.
    """
    symmetric = statement.symmetric or solved.curvature is not None
    result, solver = solved.result, solver_in_use(hypergrad, statement, symmetric, found)
    if result is Result.NONFINITE:
        return NONFINITE_ADVICE
    if result is Result.INACCURATE:
        return INACCURATE_ADVICE
    if result is Result.DAMPED:
        return "The hypergradient is biased by the damping: a stronger regularizer would make the system regular"
    if result is Result.NEGATIVE_CURVATURE:
        return _negative_curvature(statement, found, solved)
    indefinite = "" if isinstance(solver, MINRES) or not symmetric else "MINRES(), whose residual never grows"
    if result is Result.DIVERGED:
        other = indefinite or "another linear solver, or Implicit(damping=...)"
        worse = "Its residual is larger than that of zero: the hypergradient is worse than none"
        return f"{worse}. Raise max_steps{now(solver, 'max_steps')}, or take {other}"
    if isinstance(solver, Neumann):
        more = "take CG(), which needs about the root of as many steps" if symmetric else "take GMRES()"
    elif isinstance(solver, CG):
        more = "give CG a preconditioner" if solver.preconditioner is None else "give CG another preconditioner"
    else:
        more = "add a penalty on the params that makes the system better conditioned"
    loosen = f", loosen rtol{now(solver, 'rtol')}" if getattr(solver, "rtol", None) else ""
    return f"The hypergradient is inexact: raise max_steps{now(solver, 'max_steps')}{loosen}, or {more}"


def _negative_curvature(statement: Statement, found: Solution | None, solved: Solution) -> str:
    seen = ""
    if solved.curvature is not None:
        low, high = solved.curvature
        seen = f" (curvatures from {float(low.min()):.2g} to {float(high.max()):.2g} were seen)"
        eps = torch.finfo(low.dtype).eps
        flat = max(RESOLVED * eps, eps**REACHED) * high.abs().max()
        if found is not None and found.result.ok and statement.has_objective and float(low.min()) >= -float(flat):
            return f"{FLAT_ADVICE}{seen}. {FLAT_WAYS}"
    elif found is not None and found.result.ok and statement.has_objective:
        return f"{SINGULAR_ADVICE}. {FLAT_WAYS}"
    short = found is not None and not found.result.ok
    where = (
        "The params are no minimum, since the inner solve failed" if short else "The params are no minimum, or not yet"
    )
    network = f"For a network take hypergrad={GAUSS_NEWTON_ADVICE}" if statement.has_objective else ""
    others = (
        "Else solve further, start elsewhere, or take MINRES(), a stronger regularizer or Implicit(damping=...) "
        "(throw='fallback' tries MINRES and damping)"
    )
    return ". ".join(part for part in (f"{where}{seen}", network, others) if part)
