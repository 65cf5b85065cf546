"""Systems whose unknowns have units of their own: solved with a diagonal of ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..solution import Solution
from ..tree import norm
from .operator import Dense, Operator
from .solve import LinearSolver, LinearState, report, require_symmetric

SMALL = 512
"""Unknowns of one problem up to which a matrix is formed without asking."""


@dataclass(frozen=True)
class Equilibrated:
    """Solve ``D A D z = D b`` and return ``D z``, with ``D = |diag A|^{-1/2}``: dense, for symmetric matrices.

    The condition of a matrix of parameters in units of their own is mostly that of the units, which the scaling takes
    away (van der Sluis 1969: within a factor n of the best diagonal scaling). Residuals are those of ``D A D``. The
    inner solver still measures its steps by the norm of all params, and may end early in the small ones: where units
    are a million apart, scale the params themselves.

    Args:
        solver: of the scaled system: `Cholesky`, `LU`, `LeastNorm`.
    """

    solver: LinearSolver

    def solve(self, operator: Operator, b: Tensor, state: LinearState | None = None) -> Solution[Tensor]:
        """Solve ``A x = b``; see `LinearSolver`."""
        require_symmetric(operator, "Equilibrated")
        matrix = operator.to_dense()
        scaled, d = self.scaled((matrix + matrix.mT) / 2)
        right = d * b
        found = self.solver.solve(Dense(scaled), right)
        stats = found.stats
        x = d * found.value
        told = report(x, stats["result"], stats["num_steps"], stats["residual_norm"], norm(right), LinearState(x))
        return told.with_stats(**({"condition": stats["condition"]} if "condition" in stats else {}))

    @staticmethod
    def scaled(matrix: Tensor) -> tuple[Tensor, Tensor]:
        """``D A D`` and ``D``, ``[*batch, n, n]`` and ``[*batch, n]``."""
        size = torch.diagonal(matrix, dim1=-2, dim2=-1).abs()
        d = torch.where(size > 0, size, torch.ones_like(size)).rsqrt()
        return d.unsqueeze(-1) * matrix * d.unsqueeze(-2), d
