"""The implicit hypergradient: one linear solve with the Hessian at the solution."""

from __future__ import annotations

from dataclasses import dataclass, field

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
        """Try what copes with indefinite matrices: MINRES, then CG on a Hessian that is damped ever more."""
        if failed.result is Result.NONFINITE:
            return failed
        tried = MINRES(rtol=1e-4).solve(Damped(operator, self.damping), b)
        names: tuple[str, ...] = ("MINRES",)
        damping = max(self.damping, 1e-3)
        while not tried.result.ok and damping <= 1e3:
            tried = CG(rtol=1e-4).solve(Damped(operator, damping), b)
            names = (*names, f"CG with damping {damping:g}")
            damping *= 10
        return Solution(tried.value, tried.stats, recovered=names)
