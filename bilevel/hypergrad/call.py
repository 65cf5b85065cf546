"""One differentiable solve: what its functions are given, and what they leave for the caller."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._torch import pytree
from ..linalg.curvature import fused_norm, has_layer_norm
from ..problem import Linearization, graph_nodes, refuse_hidden
from ..solution import AdjointCell, Result, Solution, Throw, make_codes, settle
from .base import Hypergrad, Point
from .statement import Statement

ADJOINT_ADVICE = (
    "The hypergradient is inexact: raise max_steps, loosen rtol, give CG a preconditioner; for negative "
    "curvature take MINRES, a stronger regularizer, or Implicit(damping=...) (throw='fallback' tries these)"
)


Solve = Callable[[Any, Callable[[Solution], Solution]], Solution]


@dataclass
class Record:
    """What the plain solves below all transforms leave for the caller."""

    found: Solution | None = None
    point: Point | None = None
    names: list[str] = field(default_factory=list)
    adjoint_cell: AdjointCell = field(default_factory=AdjointCell)
    fused: str | None = None
    layer_norm: bool = False


@dataclass(frozen=True)
class Call:
    """One differentiable solve.

    Attributes:
        solve: from the problem, and a function that measures what was found, to the found solution.
        problem: the problem, where it was built already (outside of transforms).
        linear_state: what the linear solve starts from.
    """

    statement: Statement
    spec: pytree.TreeSpec
    batch_dims: int
    hypergrad: Hypergrad
    solve: Solve
    throw: Throw
    problem: Any = None
    minimize: Callable[[Any], Solution] | None = None
    linear_state: Any = None
    record: Record = field(default_factory=Record)

    @property
    def num_leaves(self) -> int:
        return self.spec.num_leaves

    def split(self, tensors: Sequence[Any], num_groups: int = 1) -> list[list[Any]]:
        """Groups of as many tensors as there are leaves, and the rest."""
        cuts = [index * self.num_leaves for index in range(num_groups + 1)]
        groups = [list(tensors[a:b]) for a, b in itertools.pairwise(cuts)]
        return [*groups, list(tensors[cuts[-1] :])]

    def point(self, params: list[Tensor], hparams: list[Tensor]) -> Point:
        return Point(
            self.statement,
            params,
            hparams,
            self.batch_dims,
            self.throw,
            self.minimize,
            self.record.found,
            self.linear_state,
        )

    def keep(self, adjoint: Solution | None, point: Point) -> None:
        """Leave the adjoint solve where the caller finds it, and let it be heard."""
        if adjoint is not None:
            cell = self.record.adjoint_cell
            value = pytree.tree_unflatten(point.raveler.unravel(adjoint.value), self.spec)
            cell.solution = Solution(value, adjoint.stats, adjoint.recovered, state=adjoint.state)
            settle(adjoint, self.throw, "The adjoint solve of the hypergradient", ADJOINT_ADVICE)

    def vmapped(self, in_dims: Sequence[int | None]) -> Call:
        return dataclasses.replace(
            self, statement=self.statement.vmapped(tuple(in_dims)), batch_dims=self.batch_dims + 1, problem=None
        )


def measured(found: Solution, size: Tensor, finite: Tensor) -> Solution:
    """Put the residual norm into the stats; where it is not finite, neither is the result."""
    codes = found.stats["result"]
    bad = ~(torch.isfinite(size) & finite)
    found.stats["result"] = torch.where(bad, make_codes(Result.NONFINITE, codes), codes)
    found.stats["residual_norm"] = size
    return found


def inspect(record: Record, at: Linearization) -> None:
    """Look through the graph once: for hyperparameters that cannot be reached, and for norms whose higher derivatives
    are wrong in PyTorch."""
    nodes = list(graph_nodes(at.residual if at.loss is None else [at.loss]))
    refuse_hidden(nodes, [*at.leaves, *at.hparams])
    record.fused = fused_norm(nodes)
    record.layer_norm = has_layer_norm(nodes)
