"""Composite problems: the solution of ``min g + h`` as the root of ``(y - prox_h(y - eta grad g(y), eta)) / eta``.

Any ``eta > 0`` has the same roots and derivatives; with one over the curvature, y and ``eta grad g`` are of one scale,
whatever that of the loss is. With D the Jacobian of the prox and H the Hessian of g, that of the residual is
``J = (I - D (I - eta H)) / eta``: H where the prox does nothing, but not symmetric.

Where D is diagonal (lasso, elastic net, box), the systems reduce exactly to the active set ``S = {D_ii > 0}``, where
``E = (D_SS^{-1} - I) / eta`` is the curvature of the penalty:

    J^T u = b   with s = D u:  (H_SS + E) s_S = b_S,  s = 0 off S,  u = eta b + s - eta H s
    J w = c                 :  w = eta c off S,  (H_SS + E) w_S = (D^{-1} c)_S - H_{S, not S} w_{not S}

a symmetric system, positive definite where g is strongly convex on S, as large as the support is (Bertrand et al. 2020
for the lasso). It is the derivative of the solution where the support does not change under small changes of the
hyperparameters (strict complementarity: no coordinate sits on the edge of its threshold); on an edge, one of the
one-sided derivatives. A penalty or constraint that is not separable has no such form: J itself, by `GMRES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..closure import Closure, VmappedClosure
from ..inner.proximal import inverse_curvature
from ..linalg.operator import Operator
from ..problem import Linearization, Problem, linearize_objective
from ..solution import Solution
from ..tree import Raveler, scale
from .base import Point
from .statement import ObjectiveStatement, ResidualStatement, Solve, free_leaves


@dataclass(frozen=True)
class CompositeLinearization(Linearization):
    """The residual with its graph, and what it is made of.

    Attributes:
        smooth: the gradient of g with its graph, towards the same leaves.
        shrunk: ``prox(z, eta)`` with its graph towards ``z`` alone. step: eta, ``[*batch]``.
    """

    smooth: Linearization = field(kw_only=True)
    z: Tensor = field(kw_only=True)
    shrunk: Tensor = field(kw_only=True)
    step: Tensor = field(kw_only=True)


@dataclass(frozen=True)
class CompositeStatement(ResidualStatement):
    """``y = prox(y - eta grad g(y), eta)``.

    Attributes:
        closure: g. shrink: ``(z, step) -> prox(z, step)`` on flat vectors, as a closure.
        separable: D is diagonal.
    """

    shrink: Closure | VmappedClosure
    separable: bool

    def residual(self, params: Sequence[Tensor], hparams: Sequence[Tensor]) -> list[Tensor]:
        def gradient(point: list[Tensor]) -> tuple[list[Tensor], Tensor]:
            of_sum = torch.func.grad(lambda p: _summed(self.closure(p, hparams)), has_aux=True)
            found: tuple[list[Tensor], Tensor] = of_sum(point)
            return found

        g, losses = gradient(list(params))
        raveler = Raveler(list(params), losses.shape)
        y, flat = raveler.ravel(params), raveler.ravel(g)
        step = inverse_curvature(lambda y: raveler.ravel(gradient(raveler.unravel(y))[0]), y, flat)
        shrunk = self.shrink([y - scale(step, flat), step.to(y.dtype)], hparams)
        return raveler.unravel(scale(1 / step, y - shrunk))

    def problem(self, start: list[Tensor], hparams: Sequence[Tensor], batch_dims: int) -> Problem:  # type: ignore[override]
        problem = Problem(lambda point: self.closure(point, hparams), start, max_batch_dims=batch_dims)
        problem.shrink = lambda z, step: self.shrink([z, step.to(z.dtype)], hparams)
        return problem

    def linearize(self, params: Sequence[Tensor], hparams: Sequence[Tensor]) -> CompositeLinearization:
        free = free_leaves(hparams)

        def gradient(point: Sequence[Tensor], create_graph: bool) -> Linearization:
            return linearize_objective(lambda p: self.closure(p, free), point, create_graph=create_graph)

        at = gradient(params, True)
        assert at.loss is not None
        raveler = Raveler(at.leaves, at.loss.shape)
        with torch.enable_grad():
            y, g = raveler.ravel(at.leaves), raveler.ravel(at.residual)
            step = inverse_curvature(lambda y: raveler.ravel(gradient(raveler.unravel(y), False).residual), y, g)
            moved = y - scale(step, g)
            shrunk = self.shrink([moved, step.to(y.dtype)], free)
            residual = raveler.unravel(scale(1 / step, y - shrunk))
            z = moved.detach().requires_grad_()
            alone = self.shrink([z, step.to(y.dtype)], [tensor.detach() for tensor in hparams])
        smooth = dataclasses.replace(at, hparams=free)
        return CompositeLinearization(at.leaves, at.loss, residual, free, smooth=smooth, z=z, shrunk=alone, step=step)

    def vmapped(self, in_dims: tuple[int | None, ...]) -> CompositeStatement:
        return dataclasses.replace(
            self, closure=VmappedClosure(self.closure, in_dims), shrink=VmappedClosure(self.shrink, in_dims)
        )

    def smooth(self, point: Point) -> Point:
        """The same point, of the smooth part alone, whose operator is the Hessian of g."""
        at = self._at(point)
        statement = ObjectiveStatement(self.closure)
        return dataclasses.replace(point, statement=statement, state=None, _at=at.smooth)

    def solve(self, point: Point, operator: Operator, b: Tensor, transpose: bool, solve: Solve) -> Solution[Tensor]:
        """``J^T u = b`` or ``J w = b``, by one symmetric solve on the active set where D is diagonal."""
        at, hessian = self._at(point), operator
        if not self.separable:
            jacobian = ProxJacobian(hessian, at)
            return solve(jacobian.T if transpose else jacobian, b)
        reduced = ActiveSet(hessian, _shrinkage(at, torch.ones_like(b)), at.step)
        if transpose:
            found = solve(reduced, reduced.restrict(_without_flat(point, at, reduced, b)))
            s = reduced.restrict(found.value)
            value = scale(at.step, b) + s - scale(at.step, hessian.matvec(s))
        else:
            off = scale(at.step, b - reduced.restrict(b))
            found = solve(reduced, reduced.restrict(b / reduced.diagonal - hessian.matvec(off)))
            value = reduced.restrict(found.value) + off
        return found.with_value(value)

    def _at(self, point: Point) -> CompositeLinearization:
        at = point.linearization()
        assert isinstance(at, CompositeLinearization)
        return at


class ActiveSet(Operator):
    """``H_SS + E`` on the support S, and off it ``1 / eta``, which is of the same scale; symmetric."""

    def __init__(self, hessian: Operator, diagonal: Tensor, step: Tensor):
        super().__init__(hessian.batch_shape, hessian.size, hessian.dtype, hessian.device)
        self.hessian, self.support = hessian, diagonal > 0
        self.diagonal = torch.where(self.support, diagonal, torch.ones_like(diagonal))
        outside = scale(1 / step, torch.ones_like(diagonal))
        self.extra = torch.where(self.support, scale(1 / step, 1 / self.diagonal - 1), outside)

    def restrict(self, v: Tensor) -> Tensor:
        """Zero off the support."""
        return torch.where(self.support, v, torch.zeros_like(v))

    def matvec(self, v: Tensor) -> Tensor:
        return self.restrict(self.hessian.matvec(self.restrict(v))) + self.extra * v


class ProxJacobian(Operator):
    """``J = (I - D (I - eta H)) / eta``, one Hessian product each way; D is symmetric, J is not."""

    def __init__(self, hessian: Operator, at: CompositeLinearization):
        super().__init__(hessian.batch_shape, hessian.size, hessian.dtype, hessian.device, symmetric=False)
        self.hessian, self.at = hessian, at

    def matvec(self, v: Tensor) -> Tensor:
        step = self.at.step
        return scale(1 / step, v - _shrinkage(self.at, v - scale(step, self.hessian.matvec(v))))

    def rmatvec(self, v: Tensor) -> Tensor:
        step, shrunk = self.at.step, _shrinkage(self.at, v)
        return scale(1 / step, v - shrunk) + self.hessian.matvec(shrunk)


def _shrinkage(at: CompositeLinearization, v: Tensor) -> Tensor:
    """``D v``; the diagonal itself for a vector of ones, where there is one."""
    if not at.shrunk.requires_grad:
        return torch.zeros_like(v)
    return torch.autograd.grad(at.shrunk, at.z, v, retain_graph=True)[0]


def _without_flat(point: Point, at: CompositeLinearization, reduced: ActiveSet, b: Tensor) -> Tensor:
    """Zero where neither g nor the penalty curves: there the solution stays at its start, whatever x is."""
    pairs = zip(at.smooth.residual, at.leaves, strict=True)
    curved = point.raveler.ravel([torch.full_like(leaf, float(r.requires_grad)) for r, leaf in pairs])
    return torch.where((curved > 0) | (reduced.extra > 0), b, torch.zeros_like(b))


def _summed(losses: Tensor) -> tuple[Tensor, Tensor]:
    return losses.sum(), losses
