"""Products with the curvature of a mean over examples, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..linalg.operator import Operator
from ..tree import Tree

if TYPE_CHECKING:
    from .attribution import Influence


class Curvature(Operator):
    """``A`` on many vectors at once, summed over chunks of examples whose graphs are not kept."""

    def __init__(self, of: Influence, count: int):
        super().__init__((count,), of.y.shape[-1], of.y.dtype, of.y.device)
        self.of = of

    def matvec(self, v: Tensor) -> Tensor:
        of = self.of
        product = of.damping * v
        for batch in of._batches(of.train, of.chunk):
            part = self._gauss_newton(batch, v) if of.curvature == "gauss_newton" else self._hessian(batch, v)
            product = product + part / of.num_examples
        if of.penalty is not None:
            penalty = of.penalty
            _, pull = torch.func.vjp(torch.func.grad(lambda y: penalty(of._at(y))), of.y)  # type: ignore[misc]
            product = product + torch.func.vmap(lambda row: pull(row)[0])(v)
        return product

    def _hessian(self, batch: Tree, v: Tensor) -> Tensor:
        of = self.of
        total = torch.func.grad(lambda y: of._each(y, batch, of.losses).sum())
        _, pull = torch.func.vjp(total, of.y)  # type: ignore[misc]
        found: Tensor = torch.func.vmap(lambda row: pull(row)[0])(v)
        return found

    def _gauss_newton(self, batch: Tree, v: Tensor) -> Tensor:
        of = self.of
        out, pull = torch.func.vjp(lambda y: of.outputs(of._at(y), batch), of.y)  # type: ignore[misc]
        tangents = push(pull, out.shape, v)
        slope = torch.func.grad(lambda o: of.losses(o, batch).sum())
        _, curve = torch.func.vjp(slope, out)  # type: ignore[misc]
        found: Tensor = torch.func.vmap(lambda t: pull(curve(t)[0])[0])(tangents)
        return found


def push(pull: Callable[..., Any], shape: tuple[int, ...], along: Tensor) -> Tensor:
    """Products with a Jacobian ``[k, p] -> [k, *shape]``, of its transposed products, which are linear."""
    zeros = torch.zeros(shape, dtype=along.dtype, device=along.device)
    _, push = torch.func.vjp(lambda cotangent: pull(cotangent)[0], zeros)  # type: ignore[misc]
    found: Tensor = torch.func.vmap(lambda row: push(row)[0])(along)
    return found
