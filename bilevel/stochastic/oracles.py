"""Gradients and second-order products of the two losses on one batch, as flat vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from ..context import EVALUATING, UNCOMPILED
from ..linalg.jacobian import pull_back
from ..problem import graph_nodes
from ..tree import Raveler, Tree

Batch = Any
"""What a loss takes as its data: a tensor, a tree of tensors, None; whatever the user's loss knows."""

Loss = Callable[[Tree, Tree, Batch], Tensor]
"""``loss(params, hparams, batch)``: a scalar, the mean over the batch."""


@dataclass(frozen=True)
class Draws:
    """Several independent batches for one step of a method that draws several.

    They are used in turn, and again from the first where they run out; a method's ``inner_draws`` and
    ``outer_draws`` say how many a step takes. A batch that is passed plainly serves for all of them: cheaper
    (one graph), but products of the same batch are correlated, which biases Neumann series.
    """

    batches: tuple[Batch, ...]

    def __init__(self, batches: Iterable[Batch]):
        object.__setattr__(self, "batches", tuple(batches))
        if not self.batches:
            raise ValueError("Draws holds no batches: at least one is needed.")


def batches_of(batch: Batch) -> list[Batch]:
    """All that a step was given."""
    return list(batch.batches) if isinstance(batch, Draws) else [batch]


def supply(batch: Batch) -> Iterator[Batch]:
    """The batches of a step, without end."""
    return cycle(batches_of(batch))


@dataclass(frozen=True)
class Gradients:
    """A loss and its gradients: towards the inner variables ``[n]`` and the outer ones ``[m]``."""

    loss: Tensor
    inner: Tensor
    outer: Tensor


@dataclass(frozen=True)
class Linearized:
    """The inner gradient at a point with its graph: any number of products for one forward pass."""

    loss: Tensor
    gradient: Tensor
    _residual: Tensor
    _y: Tensor
    _x: Tensor
    _count: Callable[[], None]

    def product(self, u: Tensor) -> Tensor:
        """``H u``, with H the Hessian of the inner loss: ``[n] -> [n]``."""
        return self._pull(u, [self._y])[0]

    def cross(self, u: Tensor) -> Tensor:
        """``(d_x grad_y g)^T u``: ``[n] -> [m]``."""
        return self._pull(u, [self._x])[0]

    def products(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Both for the price of one."""
        hessian, cross = self._pull(u, [self._y, self._x])
        return hessian, cross

    def _pull(self, u: Tensor, inputs: list[Tensor]) -> Sequence[Tensor]:
        self._count()
        return pull_back([self._residual], inputs, [u])


@dataclass
class Oracles:
    """Evaluates the losses for a method and counts what it cost.

    Attributes:
        gradients: gradient evaluations since the start, inner and outer, each of one batch.
        own: the tensors that a method updates, which its losses must not use but through their arguments.
        products: products with the Hessian or the cross derivative, likewise; a joint product counts once.
    """

    inner: Raveler
    outer: Raveler
    inner_loss: Loss
    outer_loss: Loss
    own: dict[str, list[Tensor]]
    gradients: int = 0
    products: int = 0
    _checked: set[str] = field(default_factory=set)

    def inner_gradient(self, y: Tensor, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The inner loss and its gradient towards ``y`` alone: a step of the inner loop."""
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            loss = self._evaluate("inner_loss", y, x.detach().requires_grad_(), batch)
        self.gradients += 1
        return loss.detach(), torch.autograd.grad(loss, y)[0]

    def inner_gradients(self, y: Tensor, x: Tensor, batch: Batch) -> Gradients:
        """The inner loss and its two gradients."""
        return self._gradients("inner_loss", y, x, batch)

    def outer_gradients(self, y: Tensor, x: Tensor, batch: Batch) -> Gradients:
        """The outer loss and its two gradients; the second is zero where the outer loss ignores ``x``."""
        return self._gradients("outer_loss", y, x, batch)

    def linearize(self, y: Tensor, x: Tensor, batch: Batch) -> Linearized:
        """The inner gradient, with products."""
        with torch.enable_grad():
            y, x = y.detach().requires_grad_(), x.detach().requires_grad_()
            loss = self._evaluate("inner_loss", y, x, batch)
            (residual,) = torch.autograd.grad(loss, y, create_graph=True)
        self.gradients += 1
        return Linearized(loss.detach(), residual.detach(), residual, y, x, self._count_product)

    def _count_product(self) -> None:
        self.products += 1

    def _gradients(self, what: str, y: Tensor, x: Tensor, batch: Batch) -> Gradients:
        with torch.enable_grad():
            y, x = y.detach().requires_grad_(), x.detach().requires_grad_()
            loss = self._evaluate(what, y, x, batch)
        self.gradients += 1
        inner, outer = torch.autograd.grad(loss, [y, x], materialize_grads=True)
        return Gradients(loss.detach(), inner, outer)

    def _evaluate(self, what: str, y: Tensor, x: Tensor, batch: Batch) -> Tensor:
        with EVALUATING, UNCOMPILED:
            loss: Tensor = getattr(self, what)(self._tree(self.inner, y), self._tree(self.outer, x), batch)
        if what not in self._checked:
            check_loss(what, loss, y, x, self.own)
            self._checked.add(what)
        return loss

    @staticmethod
    def _tree(raveler: Raveler, flat: Tensor) -> Tree:
        return raveler.unflatten(raveler.unravel(flat))


def check_loss(what: str, loss: Tensor, y: Tensor, x: Tensor, own: dict[str, list[Tensor]]) -> None:
    """Refuse a loss that is no scalar, ignores what it is given, or reaches tensors that it is not given.

    Args:
        own: the tensors of ``inner_params`` and ``outer_params``, by these names.

    Raises:
        ValueError: with the name of the loss.
    """
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        found = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{what} returned {found}: a floating-point scalar is needed, the mean over the batch.")
    reached = {id(node.variable): node.variable for node in graph_nodes([loss]) if hasattr(node, "variable")}
    names = {id(leaf): name for name, params in own.items() for leaf in params}
    for key, variable in reached.items():
        if key in names:
            raise ValueError(
                f"{what} uses a tensor of {names[key]} directly (shape {tuple(variable.shape)}), not the one that it "
                "is given, so its gradient would be missing. Compute the loss from its arguments: "
                "functional_call(module, params, ...)."
            )
        if variable is not y and variable is not x:
            raise ValueError(
                f"{what} depends on a tensor of shape {tuple(variable.shape)} that requires grad and is in neither "
                "inner_params nor outer_params: it would never be updated. Add it to one of them, or detach it."
            )
    if id(y) not in reached:
        raise ValueError(
            f"{what} does not depend on the params that it is given: compute it from its first argument, and neither "
            "detach it nor run under no_grad."
        )
    if what == "inner_loss" and id(x) not in reached:
        raise ValueError(
            "inner_loss does not depend on the hparams that it is given, so its solution cannot follow them. Use its "
            "second argument."
        )
