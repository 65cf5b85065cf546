"""The generalized Gauss-Newton matrix in place of the Hessian: positive semi-definite where the loss is convex."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..closure import Tracer
from ..problem import Linearization, Objective, Problem, linearize_objective
from ..tree import Tree
from .cut import Cut
from .jacobian import GraphJacobian, pull_back, transposed
from .operator import Operator

Middle = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""The symmetric matrix between the two Jacobians: a product on tensors of the shapes of the outputs."""


class OfOutputs(ABC):
    """Base of the matrices that stand in the place of the Hessian by way of some outputs, and leave ``rest`` exact."""

    rest: Objective | None

    def __call__(self, problem: Problem, at: Linearization) -> Operator:
        """The matrix at a solution."""
        free = free_leaves(at)
        with torch.enable_grad(), problem.autocast.evaluating(), Tracer(differentiable=False):
            outputs, middle, slope = self.through(problem, problem.raveler.unflatten(free))
        beside = None if self.rest is None else linearized(problem, free, self.rest)
        rest = None
        if beside is not None and any(residual.requires_grad for residual in beside.residual):
            rest = GraphJacobian(problem.raveler, beside, symmetric=True)

        def gradient() -> Tensor:
            own = problem.raveler.ravel(pull_back([outputs], free, [slope]))
            return own if beside is None else own + problem.raveler.ravel([part.detach() for part in beside.residual])

        return Sandwich(problem, free, [outputs], middle, rest, gradient)

    @abstractmethod
    def through(self, problem: Problem, params: Tree) -> tuple[Tensor, Middle, Tensor]:
        """The outputs, the matrix between their two Jacobians, and the slope of the losses by them."""


@dataclass(frozen=True)
class GaussNewton(OfOutputs):
    """``J^T H_loss J + H_rest`` (Schraudolph 2002): for networks, whose Hessians are often too indefinite for `CG`.

    ``J`` is the Jacobian of ``outputs`` and ``H_loss`` the Hessian of ``loss`` with respect to them. What is left out,
    the curvature of the outputs weighted by the slope of the loss, vanishes where the model fits its data or is linear
    in its parameters; elsewhere the hypergradient is biased. The objective must be ``loss(outputs) + rest``. A product
    runs over retained graphs and costs about as much as one with the Hessian; no matrix is formed. Where the objective
    calls a module, `GaussNewton.of` finds outputs, loss and rest in it.

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

    def through(self, problem: Problem, params: Tree) -> tuple[Tensor, Middle, Tensor]:
        """The outputs, and the Hessian and the slope of the loss there."""
        outputs = self.outputs(params, *problem.args)
        check_outputs("outputs", outputs, problem)
        point = outputs.detach().requires_grad_()
        loss = self.loss(point, *problem.args)
        if loss.shape != problem.raveler.batch_shape:
            raise ValueError(
                f"loss returned a tensor of shape {tuple(loss.shape)} for an objective of shape "
                f"{tuple(problem.raveler.batch_shape)}: one loss for each problem is needed."
            )
        slope = torch.autograd.grad(loss.sum(), point, create_graph=True)[0]
        return outputs, curvature([slope], [point]), slope.detach()

    @staticmethod
    def of(module: nn.Module, loss: Callable[..., Any] | None = None) -> OfModule:
        """The Gauss-Newton matrix of an objective that calls ``module``; nothing else of it has to be told.

        The objective may weigh examples and add a penalty, whose Hessian is kept exactly::

            hypergrad=Implicit(CG(max_steps=20), operator=GaussNewton.of(model, cross_entropy), damping=1e-2)

        Args:
            loss: a function of `torch.nn.functional`, or a module, that the objective calls on the outputs: the matrix
                is positive semi-definite where it is convex in its first argument. None, or a function of your own:
                the outputs are what ``module`` returns, and what follows should be convex in them.
        """
        return OfModule(module, loss)


@dataclass(frozen=True)
class OfModule:
    """See `GaussNewton.of`. The objective is evaluated once, cut where the outputs enter the loss.

    Raises, at the call:
        ValueError: the objective calls neither ``loss`` nor ``module``, or not with the params that it is given.
        NotImplementedError: it calls them under `torch.vmap`.
    """

    module: nn.Module
    loss: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            raise TypeError(f"module is a {type(self.module).__name__}: the module that the objective calls is needed.")

    def __repr__(self) -> str:
        loss = "" if self.loss is None else f", {getattr(self.loss, '__name__', self.loss)}"
        return f"GaussNewton.of({type(self.module).__name__}(...){loss})"

    def __call__(self, problem: Problem, at: Linearization) -> Operator:
        free = free_leaves(at)
        named = f"{type(self.module).__name__}(...)"
        cuts = [Cut.before(self.loss), Cut.after(getattr(self.module, "_orig_mod", self.module))]
        for cut in cuts:
            with torch.enable_grad(), problem.autocast.evaluating(), Tracer(differentiable=False), cut:
                losses = problem.objective(problem.raveler.unflatten(free), *problem.args)
            if cut.outputs:
                break
        else:
            raise ValueError(
                f"GaussNewton.of({named}): the objective calls neither this module nor this loss on anything that "
                "depends on the params that it is given. Pass the module that it calls by functional_call(module, "
                "params, ...), or write GaussNewton(outputs, loss, rest)."
            )
        with torch.enable_grad():
            slopes = torch.autograd.grad(losses.sum(), cut.points, create_graph=True, materialize_grads=True)
            grads = torch.autograd.grad(losses.sum(), free, create_graph=True, materialize_grads=True)
        linear = not any(grad.requires_grad for grad in grads)
        rest = Linearization(free, losses, list(grads))
        hessian = None if linear else GraphJacobian(problem.raveler, rest, symmetric=True)
        return Sandwich(problem, free, cut.outputs, curvature(slopes, cut.points), hessian)


def curvature(slopes: Sequence[Tensor], points: Sequence[Tensor]) -> Middle:
    """The Hessian of a loss by ``points``, from its gradient there with the graph."""
    return lambda tangents: pull_back(slopes, points, tangents)


class Sandwich(Operator):
    """``J^T M J + H_rest``, with the Jacobian J of ``outputs`` over their retained graph and a symmetric ``M``.

    Args:
        free: the leaves that ``outputs`` were computed from.
        middle: ``M``. rest: ``H_rest``.

    Attributes:
        gradient: computes that of the objective which the matrix belongs to, flat; None: it is the problem's own.
    """

    def __init__(
        self,
        problem: Problem,
        free: list[Tensor],
        outputs: Sequence[Tensor],
        middle: Middle,
        rest: Operator | None = None,
        gradient: Callable[[], Tensor] | None = None,
    ):
        raveler = problem.raveler
        super().__init__(raveler.batch_shape, raveler.size, raveler.dtype, raveler.device)
        self.raveler, self.free, self.outputs, self.middle, self.rest = raveler, free, outputs, middle, rest
        self.gradient = gradient
        self.weights, self.pulled = transposed(outputs, free)

    def matvec(self, v: Tensor) -> Tensor:
        tangents = pull_back(self.pulled, self.weights, self.raveler.unravel(v))
        product = self.raveler.ravel(pull_back(self.outputs, self.free, self.middle(tangents)))
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


def linearized(problem: Problem, free: Sequence[Tensor], rest: Objective) -> Linearization:
    """A part of the objective; without a graph where it has no curvature at all."""

    def loss_at(point: Sequence[Tensor]) -> Tree:
        with problem.autocast.evaluating(), Tracer(differentiable=False):
            return rest(problem.raveler.unflatten(list(point)), *problem.args)

    return linearize_objective(loss_at, free)
