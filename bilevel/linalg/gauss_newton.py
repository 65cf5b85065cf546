"""The generalized Gauss-Newton matrix in place of the Hessian: positive semi-definite where the loss is convex."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..closure import Tracer
from ..problem import Linearization, Objective, Problem, linearize_objective
from ..tree import Tree
from .jacobian import GraphJacobian, pull_back, transposed
from .operator import Operator

Middle = Callable[[Tensor], Tensor]
"""The symmetric matrix between the two Jacobians: a product on tensors of the shape of the outputs."""


@dataclass(frozen=True)
class GaussNewton:
    """``J^T H_loss J + H_rest`` (Schraudolph 2002): for networks, whose Hessians are often too indefinite for `CG`.

    ``J`` is the Jacobian of ``outputs`` and ``H_loss`` the Hessian of ``loss`` with respect to them. What is left out,
    the curvature of the outputs weighted by the slope of the loss, vanishes where the model fits its data or is linear
    in its parameters; elsewhere the hypergradient is biased. The objective must be ``loss(outputs) + rest``. A product
    runs over retained graphs and costs about as much as one with the Hessian; no matrix is formed.

    Args:
        outputs: ``outputs(params, *args)``, a tensor such as logits; of T problems its first dimension is T.
        loss: ``loss(outputs, *args)``, a scalar, or ``[T]``. Convex: the product is positive semi-definite.
        rest: ``rest(params, *args)``, the part of the objective whose Hessian is kept exactly, such as the penalty.

    Raises, at the call:
        ValueError: ``outputs`` does not depend on params, or it or ``loss`` does not count the T problems.

    Example:
        ``Implicit(CG(), operator=GaussNewton(predict, cross_entropy_of_outputs, rest=penalty))``
    """

    outputs: Callable[..., Tensor]
    loss: Callable[..., Tensor]
    rest: Objective | None = None

    def __call__(self, problem: Problem, at: Linearization) -> Operator:
        free = free_leaves(at)
        with torch.enable_grad(), problem.autocast.evaluating(), Tracer(differentiable=False):
            outputs = self.outputs(problem.raveler.unflatten(free), *problem.args)
            check_outputs("outputs", outputs, problem)
            point = outputs.detach().requires_grad_()
            loss = self.loss(point, *problem.args)
            if loss.shape != problem.raveler.batch_shape:
                raise ValueError(
                    f"loss returned a tensor of shape {tuple(loss.shape)} for an objective of shape "
                    f"{tuple(problem.raveler.batch_shape)}: one loss for each problem is needed."
                )
            slope = torch.autograd.grad(loss.sum(), point, create_graph=True)[0]

        def middle(tangent: Tensor) -> Tensor:
            return pull_back([slope], [point], [tangent])[0]

        return Sandwich(problem, free, outputs, middle, self.rest)


class Sandwich(Operator):
    """``J^T M J + H_rest``, with the Jacobian J of ``outputs`` over their retained graph and a symmetric ``M``.

    Args:
        free: the leaves that ``outputs`` was computed from.
        middle: ``M``.
    """

    def __init__(
        self, problem: Problem, free: list[Tensor], outputs: Tensor, middle: Middle, rest: Objective | None = None
    ):
        raveler = problem.raveler
        super().__init__(raveler.batch_shape, raveler.size, raveler.dtype, raveler.device)
        self.raveler, self.free, self.outputs, self.middle = raveler, free, outputs, middle
        self.rest = None if rest is None else _hessian(problem, free, rest)
        self.weights, self.pulled = transposed([outputs], free)

    def matvec(self, v: Tensor) -> Tensor:
        tangent = pull_back(self.pulled, self.weights, self.raveler.unravel(v))[0]
        product = self.raveler.ravel(pull_back([self.outputs], self.free, [self.middle(tangent)]))
        return product if self.rest is None else product + self.rest.matvec(v)


def free_leaves(at: Linearization) -> list[Tensor]:
    """The point, apart from the graph of the objective."""
    return [leaf.detach().requires_grad_() for leaf in at.leaves]


def check_outputs(name: str, found: Tensor, problem: Problem) -> None:
    """Refuse what does not count the problems, or does not depend on the params."""
    batch = problem.raveler.batch_shape
    if found.shape[: len(batch)] != batch:
        raise ValueError(
            f"{name} returned a tensor of shape {tuple(found.shape)} for {batch.numel()} problems: its first dimension "
            "must count them, as that of the objective does. Wrap it in torch.vmap as the objective is."
        )
    if not found.requires_grad:
        raise ValueError(f"{name} does not depend on the params that it is given: compute it from its argument.")


def _hessian(problem: Problem, free: Sequence[Tensor], rest: Objective) -> Operator | None:
    def loss_at(point: Sequence[Tensor]) -> Tree:
        with problem.autocast.evaluating(), Tracer(differentiable=False):
            return rest(problem.raveler.unflatten(list(point)), *problem.args)

    at = linearize_objective(loss_at, free)
    linear = not any(residual.requires_grad for residual in at.residual)
    return None if linear else GraphJacobian(problem.raveler, at, symmetric=True)
