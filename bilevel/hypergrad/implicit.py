"""The implicit hypergradient: one linear solve with the Hessian at the solution."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..linalg.cg import CG
from ..linalg.curvature import HessianMode
from ..linalg.operator import Damped, Operator
from ..linalg.scipy import MINRES
from ..linalg.solve import LinearSolver
from ..solution import Result, Solution


@dataclass(frozen=True)
class Implicit:
    """Differentiate the stationarity ``grad_y g(y, x) = 0``, not the solver (implicit function theorem).

    With ``f`` the outer loss: solve ``H u = grad_y f``, then ``df/dx = grad_x f - (d_x grad_y g)^T u``.
    Memory does not depend on the number of inner steps. The error is at most that of the inner solution and
    of the linear solve: both are in the `Solution`.

    Args:
        linear_solver: how ``H u = grad_y f`` is solved.
        hessian: how products are made. ``"graph"``: one reverse pass over the retained graph of the gradient;
            ``"func"``: `torch.func.jvp` of `torch.func.grad`, recomputed each time.
        damping: solve with ``H + damping I``. Biased; for Hessians that are singular or slightly indefinite.
    """

    linear_solver: LinearSolver = field(default_factory=CG)
    hessian: HessianMode = "graph"
    damping: float = 0.0

    def __post_init__(self) -> None:
        if self.hessian not in ("graph", "func"):
            raise ValueError(f"hessian is {self.hessian!r}: it is 'graph' or 'func'.")
        if not self.damping >= 0:
            raise ValueError(f"damping is {self.damping}: it cannot be negative.")

    def solve(self, operator: Operator, b: Tensor) -> Solution:
        """Solve the (damped) adjoint system."""
        return self.linear_solver.solve(Damped(operator, self.damping) if self.damping else operator, b)

    def recover(self, operator: Operator, b: Tensor, failed: Solution) -> Solution:
        """Try, in the problems that failed, MINRES, then CG on a Hessian that is damped ever more."""
        attempts: list[tuple[str, LinearSolver, float]] = [("MINRES", MINRES(rtol=FALLBACK_RTOL), self.damping)]
        for damping in (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0):
            attempts.append((f"CG with damping {damping:g}", CG(rtol=FALLBACK_RTOL), self.damping + damping))
        best = failed
        for name, solver, damping in attempts:
            if best.result.ok or best.result is Result.NONFINITE:
                break
            tried = solver.solve(Damped(operator, damping), b)
            best = _merge(best, tried, (*best.recovered, name))
        return best


FALLBACK_RTOL = 1e-4


def _merge(old: Solution, new: Solution, recovered: tuple[str, ...]) -> Solution:
    """Keep the problems that were solved, take ``new`` in the others."""
    keep = old.stats["result"] <= int(Result.STEPS_DONE)
    stats = {name: torch.where(keep, stat, new.stats[name]) for name, stat in old.stats.items()}
    return Solution(torch.where(keep.unsqueeze(-1), old.value, new.value), stats, recovered)
