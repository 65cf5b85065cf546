"""Weight decay inside an inner optimizer: part of what is minimised, so part of what is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..notices import tell
from ..problem import Objective, check_loss
from ..solution import SolveWarning
from ..tree import Raveler, Tree, leaves
from .minimize import InnerSolver

Coefficient = float | Tensor | tuple[float, ...]
"""``lam`` of ``lam / 2 ||y||^2``: a number, one for each leaf, or a tensor that fits flat params ``[*batch, n]``."""

DECOUPLED = (
    "{solver} decays the params beside the gradient, so that it does not minimise the objective: the weight decay is "
    "missing in the residual that is differentiated, and the hypergradient is biased. Pass weight_decay=0 and add "
    "decay / 2 * |params|^2 to the objective, take SGD or Adam, whose decay is that term (it is then added by itself), "
    "or differentiate the steps: solver=Steps(AdamW(...)), hypergrad=Unroll()."
)


@runtime_checkable
class Decaying(Protocol):
    """An inner solver that may shrink the params by itself."""

    def without_decay(self, init: Tree) -> tuple[InnerSolver, Coefficient | None]:
        """The same solver without its decay, and the coefficient that stands for it in the objective.

        None: the decay is not the gradient of a penalty.
        """
        ...


@dataclass(frozen=True, eq=False)
class Decayed:
    """``objective + coefficient / 2 ||y||^2``: what SGD or Adam with weight decay minimise."""

    objective: Objective
    coefficient: Coefficient

    def __call__(self, params: Tree, *args: Any) -> Tensor:
        losses = self.objective(params, *args)
        check_loss(losses, params)
        raveler, flat = Raveler(params, losses.shape), leaves(params)
        y = raveler.ravel(flat)
        return losses + ((self.diagonal(raveler, flat) * y).to(y.dtype) * y).sum(-1).to(losses.dtype) / 2

    def diagonal(self, raveler: Raveler, params: Sequence[Tensor]) -> float | Tensor:
        """The curvature that the decay adds, to be multiplied with flat vectors."""
        if not isinstance(self.coefficient, tuple):
            return self.coefficient
        if len(set(self.coefficient)) == 1:
            return self.coefficient[0]
        pairs = zip(params, self.coefficient, strict=True)
        return raveler.ravel([torch.full_like(leaf, decay) for leaf, decay in pairs])


def with_decay(
    solver: InnerSolver, objective: Objective, init: Tree, warn: bool
) -> tuple[InnerSolver, Callable[..., Tensor]]:
    """A solver and an objective such that the first minimises the second; the iterates are the same.

    Args:
        warn: let it be heard where no objective is known.
    """
    if not isinstance(solver, Decaying):
        return solver, objective
    plain, coefficient = solver.without_decay(init)
    if coefficient is None:
        if warn:
            tell(DECOUPLED.format(solver=solver), SolveWarning, kind=DECOUPLED)
        return solver, objective
    if not isinstance(coefficient, Tensor) and coefficient == 0:
        return solver, objective
    return plain, Decayed(objective, coefficient)
