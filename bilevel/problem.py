"""The inner problem as its solvers see it: a flat vector in, losses and gradients of the batch shape out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from .tree import Raveler, Tree, leaves

Objective = Callable[..., Tensor]
"""``objective(params, *args)``: a scalar for one problem, a vector ``[T]`` for T independent problems."""


@dataclass(frozen=True)
class Evaluation:
    """Losses ``f`` of shape ``[*batch]`` and gradients ``g`` of shape ``[*batch, n]`` at the point ``y``."""

    y: Tensor
    f: Tensor
    g: Tensor

    def detach(self) -> Evaluation:
        return Evaluation(self.y.detach(), self.f.detach(), self.g.detach())


@dataclass(frozen=True)
class Linearization:
    """The gradient of the objective with its graph: what implicit differentiation sees of a problem."""

    leaves: list[Tensor]
    loss: Tensor
    residual: list[Tensor]


class Problem:
    """An objective, its start and its batch shape, checked once.

    Raises:
        TypeError: ``init`` holds something other than real floating-point tensors.
        ValueError: ``init`` is empty or not finite, the objective has a wrong shape, no gradient path to
            ``init``, or is not finite at ``init``.
    """

    def __init__(self, objective: Objective, init: Tree, args: tuple[Any, ...] = (), *, differentiable: bool = False):
        _check_init(init)
        self.objective, self.args, self.differentiable = objective, args, differentiable
        with torch.enable_grad():
            point = [
                leaf if differentiable and leaf.requires_grad else leaf.detach().requires_grad_()
                for leaf in leaves(init)
            ]
            loss = objective(pytree.tree_unflatten(point, pytree.tree_structure(init)), *args)
            _check_loss(loss, init)
            self.raveler = Raveler(init, loss.shape)
            grads = _gradient(loss, point, create_graph=differentiable)
            start = Evaluation(self.raveler.ravel(point).clone(), loss.double(), self.raveler.ravel(grads))
        self.start = start if differentiable else start.detach()
        if not bool(torch.isfinite(self.start.f).all()):
            raise ValueError(_blame_nonfinite(init, args))

    def evaluate(self, y: Tensor) -> Evaluation:
        """Losses and gradients at ``y``; with a graph only for a differentiable (unrolled) problem."""
        with torch.enable_grad():
            if not (self.differentiable and y.requires_grad):
                y = y.detach().requires_grad_()
            point = self.raveler.unravel(y)
            loss = self._loss(point)
            g = self.raveler.ravel(_gradient(loss, point, create_graph=self.differentiable))
        found = Evaluation(y, loss.double(), g)
        return found if self.differentiable else found.detach()

    def linearize(self, y: Tensor, create_graph: bool = True) -> Linearization:
        """The gradient at ``y`` with its graph towards ``y`` and everything that the objective captured."""
        with torch.enable_grad():
            point = [leaf.detach().requires_grad_() for leaf in self.raveler.unravel(y)]
            loss = self._loss(point)
            return Linearization(point, loss, _gradient(loss, point, create_graph=create_graph))

    def sum_loss(self, *point: Tensor) -> Tensor:
        """The summed loss as a function of the leaves, for `torch.func`."""
        return self._loss(list(point)).sum()

    def _loss(self, point: list[Tensor]) -> Tensor:
        return self.objective(self.raveler.unflatten(point), *self.args)


def graph_nodes(tensors: Iterable[Tensor]) -> Iterator[Node]:
    """Every node of the autograd graphs of these tensors, once."""
    stack = [tensor.grad_fn for tensor in tensors]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(parent for parent, _ in node.next_functions)


def _gradient(loss: Tensor, point: list[Tensor], create_graph: bool) -> list[Tensor]:
    if not loss.requires_grad:
        raise ValueError(
            "objective has no gradient path to init: its result does not depend on the params that it is given. "
            "Compute the loss from the argument (functional_call(module, params, ...)), and neither detach it nor "
            "run under no_grad."
        )
    grads = torch.autograd.grad(loss.sum(), point, create_graph=create_graph, allow_unused=True)
    if all(grad is None for grad in grads):
        raise ValueError(
            "objective has no gradient path to init: its result depends on other tensors only. Compute the loss "
            "from the params that the objective is given, not from the module's own."
        )
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, point, strict=True)]


def _check_init(init: Tree) -> None:
    flat = leaves(init)
    if not flat:
        raise ValueError("init is empty: there is nothing to minimise over. Pass a tensor or a tree of tensors.")
    for leaf in flat:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"init contains a {type(leaf).__name__}: every leaf must be a tensor.")
        if not leaf.is_floating_point():
            raise TypeError(
                f"init contains a tensor of {leaf.dtype}: only real floating-point params can be optimised. "
                "Convert it with .float(), or keep it out of init and let the objective capture it."
            )
        if leaf.device != flat[0].device:
            raise ValueError(f"init is spread over {flat[0].device} and {leaf.device}: put all leaves on one device.")
    if sum(leaf.numel() for leaf in flat) == 0:
        raise ValueError("init holds no numbers (every leaf has a dimension of size 0).")


def _check_loss(loss: Tensor, init: Tree) -> None:
    if not isinstance(loss, Tensor) or not loss.is_floating_point() or loss.dim() > 1 or loss.numel() == 0:
        found = f"a tensor of shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss)
        raise ValueError(
            f"objective returned {found}: a scalar (one problem) or a vector [T] (T independent problems) of "
            "floating point is needed. Reduce the loss over the examples, for T problems one by one."
        )
    for leaf in leaves(init):
        if loss.dim() and leaf.shape[:1] != loss.shape:
            raise ValueError(
                f"objective returned {loss.shape[0]} losses, one for each of T problems, but init has a leaf of "
                f"shape {tuple(leaf.shape)}: its first dimension must be T = {loss.shape[0]}. "
                "Use bilevel.stack(params, T), or return a scalar for one problem."
            )


def _blame_nonfinite(init: Tree, args: tuple[Any, ...]) -> str:
    culprits = [name for name, tree in _named_inputs(init, args) if _has_nonfinite(tree)]
    if culprits:
        return f"{' and '.join(culprits)} contains NaN or infinite values: mend the data before the solve."
    return (
        "objective is NaN or infinite at init although init and args are finite: look at the tensors that it "
        "captures, or start from another init."
    )


def _named_inputs(init: Tree, args: tuple[Any, ...]) -> Iterator[tuple[str, Tree]]:
    yield "init", init
    for index, arg in enumerate(args):
        yield f"args[{index}]", arg


def _has_nonfinite(tree: Tree) -> bool:
    tensors = [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return any(not bool(torch.isfinite(leaf).all()) for leaf in tensors)
