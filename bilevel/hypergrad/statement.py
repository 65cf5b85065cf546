"""What a differentiable solve is about, apart from how it is solved: pure functions of params and hyperparameters."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .._torch import pytree
from ..closure import Closure, VmappedClosure
from ..linalg.jacobian import GraphJacobian
from ..linalg.operator import Operator
from ..problem import Linearization, Problem, RootProblem, linearize_objective, linearize_residual
from ..solution import Solution
from ..tree import Raveler, Tree, is_continuous, leaves

if TYPE_CHECKING:
    from .base import Point

Solve = Callable[[Operator, Tensor], Solution[Tensor]]


@dataclass(frozen=True)
class Statement(ABC):
    """A problem whose solution is differentiated, as a function of flat lists of params and hparams."""

    closure: Closure | VmappedClosure
    symmetric: ClassVar[bool]
    definite: ClassVar[bool] = True
    """Whether a symmetric Jacobian is positive semi-definite at the solutions that are asked for."""
    has_objective: ClassVar[bool] = False
    """Whether the solution is the minimum of ``closure``, so that methods may look at its losses elsewhere."""

    @abstractmethod
    def residual(self, params: Sequence[Tensor], hparams: Sequence[Tensor]) -> list[Tensor]:
        """The residual, as `torch.func` differentiates it."""

    @abstractmethod
    def problem(self, start: list[Tensor], hparams: Sequence[Tensor], batch_dims: int) -> Problem | RootProblem:
        """What solvers see at these hyperparameters."""

    @abstractmethod
    def linearize(self, params: Sequence[Tensor], hparams: Sequence[Tensor]) -> Linearization:
        """The residual with its autograd graph, towards fresh leaves for params and hparams."""

    @abstractmethod
    def operator(self, raveler: Raveler, at: Linearization) -> Operator:
        """Products over the kept graph of a linearization, with the matrix that `solve` makes its systems of."""

    def smooth(self, point: Point) -> Point:
        """The point whose operator is asked for: the same, unless a part of the problem is not smooth."""
        return point

    def solve(self, point: Point, operator: Operator, b: Tensor, transpose: bool, solve: Solve) -> Solution[Tensor]:
        """``J^T u = b`` or ``J u = b`` by ``solve``, with ``J`` the Jacobian of the residual.

        A leaf without a residual stays at its start whatever the hyperparameters are: there ``b`` counts as zero.
        """
        used = [r.requires_grad for r in point.linearization().residual]
        if not all(used):
            pairs = zip(point.raveler.unravel(b), used, strict=True)
            b = point.raveler.ravel([part if use else torch.zeros_like(part) for part, use in pairs])
        return solve(operator.T if transpose else operator, b)

    def vmapped(self, in_dims: tuple[int | None, ...]) -> Statement:
        """The statement of B problems at once: params have B first, hparams where ``in_dims`` says."""
        return dataclasses.replace(self, closure=VmappedClosure(self.closure, in_dims))


class ObjectiveStatement(Statement):
    """``grad_y g(y, x) = 0``."""

    symmetric = True
    has_objective = True

    def residual(self, params: Sequence[Tensor], hparams: Sequence[Tensor]) -> list[Tensor]:
        grads: list[Tensor] = torch.func.grad(lambda point: self.closure(point, hparams).sum())(list(params))
        return grads

    def problem(self, start: list[Tensor], hparams: Sequence[Tensor], batch_dims: int) -> Problem:
        params = pytree.tree_unflatten(start, self.closure.spec)
        return Problem(lambda tree: self.closure(leaves(tree), hparams), params, max_batch_dims=batch_dims)

    def linearize(self, params: Sequence[Tensor], hparams: Sequence[Tensor]) -> Linearization:
        free = free_leaves(hparams)
        at = linearize_objective(lambda point: self.closure(point, free), params)
        return dataclasses.replace(at, hparams=free)

    def operator(self, raveler: Raveler, at: Linearization) -> Operator:
        return GraphJacobian(raveler, at, symmetric=True)


class ResidualStatement(Statement):
    """``r(y, x) = 0``."""

    symmetric = False

    def residual(self, params: Sequence[Tensor], hparams: Sequence[Tensor]) -> list[Tensor]:
        return leaves(self.closure(params, hparams))

    def problem(self, start: list[Tensor], hparams: Sequence[Tensor], batch_dims: int) -> RootProblem:
        def residual(params: Tree) -> Tree:
            return pytree.tree_unflatten(self.residual(leaves(params), hparams), self.closure.spec)

        return RootProblem(residual, pytree.tree_unflatten(start, self.closure.spec), batch_dims=batch_dims)

    def linearize(self, params: Sequence[Tensor], hparams: Sequence[Tensor]) -> Linearization:
        free = free_leaves(hparams)
        at = linearize_residual(lambda point: self.residual(point, free), params)
        return dataclasses.replace(at, hparams=free)

    def operator(self, raveler: Raveler, at: Linearization) -> Operator:
        return GraphJacobian(raveler, at, self.symmetric)


class SymmetricResidualStatement(ResidualStatement):
    """``r(y, x) = 0`` with a symmetric Jacobian, as its author says."""

    symmetric = True
    definite = False


def free_leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Detached stand-ins that require grad where they can."""
    return [t.detach().requires_grad_() if is_continuous(t) else t.detach() for t in tensors]


def raveler_of(params: Sequence[Tensor], batch_dims: int) -> Raveler:
    """The flat vectors of these leaves."""
    return Raveler(list(params), params[0].shape[:batch_dims])
