"""Composite problems: the solution of ``min g + h`` as the root of ``y - prox_h(y - grad g(y))``.

Its Jacobian is ``J = I - D (I - H)``, with D the Jacobian of the prox and H the Hessian of g. Where D is diagonal
(lasso, elastic net, box), J is not symmetric, but the systems reduce exactly to the active set ``S = {D_ii > 0}``:

    J^T u = b   with s = D u:  (H_SS + D_SS^{-1} - I) s_S = b_S,  s = 0 off S,  u = b + s - H s
    J w = c                 :  w = c off S,  (H_SS + D_SS^{-1} - I) w_S = (D^{-1} c)_S - H_{S, not S} c

a symmetric system, positive definite where g is strongly convex on S, as large as the support is (Bertrand et al. 2020
for the lasso). It is the derivative of the solution where the support does not change under small changes of the
hyperparameters (strict complementarity: no coordinate sits on the edge of its threshold); on an edge, one of the
one-sided derivatives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..closure import Closure, VmappedClosure
from ..linalg.curvature import GraphHessian
from ..linalg.operator import Operator
from ..problem import Problem, linearize_objective
from ..prox import Prox
from ..solution import Solution
from ..tree import Raveler, Tree, leaves
from .base import Point
from .statement import ResidualStatement

AnyClosure = Closure | VmappedClosure


@dataclass(frozen=True)
class CompositeStatement(ResidualStatement):
    """``y = prox(y - grad g(y))``.

    Attributes:
        objective: g as a closure. shrink: ``(z, step) -> prox(z, step)`` on flat vectors, as a closure.
        separable: D is diagonal.
    """

    objective: AnyClosure
    shrink: AnyClosure
    separable: bool

    def problem(self, start: list[Tensor], hparams: Sequence[Tensor], batch_dims: int) -> Problem:  # type: ignore[override]
        problem = Problem(lambda point: self.objective(point, hparams), start, max_batch_dims=batch_dims)
        problem.shrink = lambda z, step: self.shrink([z, step], hparams)
        return problem

    def vmapped(self, in_dims: tuple[int | None, ...]) -> CompositeStatement:
        return dataclasses.replace(
            self,
            closure=VmappedClosure(self.closure, in_dims),
            objective=VmappedClosure(self.objective, in_dims),
            shrink=VmappedClosure(self.shrink, in_dims),
        )

    def active_set(self, point: Point) -> ActiveSet:
        """The reduced operator at a solution, with the diagonal of D."""
        raveler = point.raveler
        at = linearize_objective(lambda params: self.objective(params, point.hparams), point.params)
        g = raveler.ravel([r.detach() for r in at.residual])
        z = (raveler.ravel(point.params) - g).requires_grad_()
        with torch.enable_grad():
            one = torch.ones(raveler.batch_shape, dtype=z.dtype, device=z.device)
            (diagonal,) = torch.autograd.grad(self.shrink([z, one], point.hparams).sum(), z)
        return ActiveSet(GraphHessian(raveler, at), diagonal)

    def solve(
        self, point: Point, b: Tensor, transpose: bool, solve: Callable[[Operator, Tensor], Solution]
    ) -> Solution:
        """``J^T u = b`` or ``J w = b`` by one symmetric solve on the active set."""
        reduced = self.active_set(point)
        hessian, support, diagonal = reduced.hessian, reduced.support, reduced.diagonal
        on, off = (torch.where(where, b, torch.zeros_like(b)) for where in (support, ~support))
        if transpose:
            found = solve(reduced, on)
            s = torch.where(support, found.value, torch.zeros_like(b))
            value = b + s - hessian.matvec(s)
        else:
            right = torch.where(support, on / diagonal - hessian.matvec(off), torch.zeros_like(b))
            found = solve(reduced, right)
            value = torch.where(support, found.value, off)
        return dataclasses.replace(found, value=value)


class ActiveSet(Operator):
    """``H_SS + D_SS^{-1} - I`` on the support S, the identity elsewhere; symmetric."""

    def __init__(self, hessian: Operator, diagonal: Tensor):
        super().__init__(hessian.batch_shape, hessian.size, hessian.dtype, hessian.device)
        self.hessian, self.support = hessian, diagonal > 0
        self.diagonal = torch.where(self.support, diagonal, torch.ones_like(diagonal))

    def matvec(self, v: Tensor) -> Tensor:
        inside = torch.where(self.support, v, torch.zeros_like(v))
        product = self.hessian.matvec(inside) + (1 / self.diagonal - 1) * inside
        return torch.where(self.support, product, v)


def prox_residual(objective: Callable[..., Tensor], prox: Prox) -> Callable[..., Tree]:
    """``y - prox(y - grad g(y))`` as a function of the tree y and of what g takes."""

    def residual(params: Tree, *args: Any) -> Tree:
        flat = leaves(params)

        def loss(point: list[Tensor]) -> tuple[Tensor, Tensor]:
            value = objective(torch.utils._pytree.tree_unflatten(point, spec), *args)
            return value.sum(), value

        spec = torch.utils._pytree.tree_structure(params)
        grads, value = torch.func.grad(loss, has_aux=True)(flat)
        raveler = Raveler(params, value.shape)
        y = raveler.ravel(flat)
        return raveler.unflatten(raveler.unravel(y - prox.prox(y - raveler.ravel(grads), 1.0)))

    return residual
