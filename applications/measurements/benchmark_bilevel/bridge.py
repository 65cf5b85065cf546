"""Losses of JAX, as the problems of benchmark_bilevel have them, as losses of PyTorch with two derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

JaxLoss = Callable[..., Any]
"""``loss(inner_var, outer_var, start=..., batch_size=...)``, the mean over a slice of the data; trees of arrays."""


def to_torch(tree: Any) -> Any:
    """Arrays as leaf tensors that require grad, of their own memory."""
    return jax.tree.map(lambda array: _tensor(array).requires_grad_(), tree)


def to_jax(tree: Any) -> Any:
    """The inverse, copied: what JAX holds must not change."""
    return jax.tree.map(lambda tensor: _array(tensor), tree)


class Loss:
    """``loss(params, hparams, start) -> 0-d tensor``, with first and second derivatives by JAX, compiled once.

    Args:
        loss: of JAX. batch_size: samples of a batch. num_samples: of all the data, which ``start=None`` stands for.
    """

    def __init__(self, loss: JaxLoss, batch_size: int, num_samples: int):
        self.whole, self.parts = self._compiled(loss, num_samples), self._compiled(loss, batch_size)

    def __call__(self, params: Any, hparams: Any, start: int | None) -> Tensor:
        leaves, spec = jax.tree.flatten((params, hparams))
        functions = self.whole if start is None else self.parts
        value: Tensor = _Value.apply(_At(functions, spec, start or 0), *leaves)
        return value

    @staticmethod
    def _compiled(loss: JaxLoss, size: int) -> tuple[Callable[..., Any], ...]:
        def value(trees: Any, start: int) -> Any:
            return loss(*trees, start=start, batch_size=size)

        gradient = jax.grad(value)

        def product(trees: Any, directions: Any, start: int) -> Any:
            return jax.jvp(lambda at: gradient(at, start), (trees,), (directions,))[1]

        return jax.jit(value), jax.jit(gradient), jax.jit(product)


class _At:
    """The functions of a loss on one batch, of lists of tensors."""

    def __init__(self, functions: Sequence[Callable[..., Any]], spec: Any, start: int):
        self.functions, self.spec, self.start = functions, spec, start

    def value(self, at: Sequence[Tensor]) -> Tensor:
        return _tensor(self.functions[0](self._tree(at), self.start))

    def gradient(self, at: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self._leaves(self.functions[1](self._tree(at), self.start))

    def product(self, at: Sequence[Tensor], directions: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self._leaves(self.functions[2](self._tree(at), self._tree(directions), self.start))

    def _tree(self, leaves: Sequence[Tensor]) -> Any:
        return jax.tree.unflatten(self.spec, [_array(leaf) for leaf in leaves])

    @staticmethod
    def _leaves(tree: Any) -> tuple[Tensor, ...]:
        return tuple(_tensor(leaf) for leaf in jax.tree.leaves(tree))


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, at: _At, *leaves: Tensor) -> Tensor:
        ctx.at = at
        ctx.save_for_backward(*leaves)
        return at.value(leaves)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(g * part for part in _Gradient.apply(ctx.at, *ctx.saved_tensors))


class _Gradient(torch.autograd.Function):
    """Its Jacobian is the Hessian, which is symmetric: a product from the left is one from the right."""

    @staticmethod
    def forward(ctx: Any, at: _At, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.at = at
        ctx.save_for_backward(*leaves)
        return at.gradient(leaves)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *directions: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.at.product(ctx.saved_tensors, directions)


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))  # copied: JAX's own memory is read-only


def _array(tensor: Tensor) -> Any:
    return jax.numpy.array(tensor.detach().numpy())
