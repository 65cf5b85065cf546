"""Products with the Jacobian of a residual at a point, over its retained graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch import pull
from ..problem import Linearization
from ..tree import Raveler, filled
from .operator import Operator


class GraphJacobian(Operator):
    """``J = d_y r``: ``J^T u`` is one reverse pass, ``J v`` one reverse pass over the graph of such a pass.

    One problem's residual must not depend on another's unknowns. Where J is declared symmetric, both are one pass: of
    a gradient this is the Hessian product of Pearlmutter (1994).
    """

    def __init__(self, raveler: Raveler, at: Linearization, symmetric: bool = False):
        super().__init__(raveler.batch_shape, raveler.size, raveler.dtype, raveler.device, symmetric)
        self.raveler, self.at = raveler, at
        self._transposed: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None

    def rmatvec(self, v: Tensor) -> Tensor:
        return self.raveler.ravel(pull_back(self.at.residual, self.at.leaves, self.raveler.unravel(v)))

    def matvec(self, v: Tensor) -> Tensor:
        if self.symmetric:
            return self.rmatvec(v)
        if self._transposed is None:
            self._transposed = transposed(self.at.residual, self.at.leaves)
        weights, pulled = self._transposed
        return self.raveler.ravel(pull_back(pulled, weights, self.raveler.unravel(v)))


def pull_back(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
    """Vector-Jacobian products over a graph that is kept; zero where an input has no influence."""
    pairs = [(out, v) for out, v in zip(outputs, cotangents, strict=True) if out.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in inputs]
    outs, vs = zip(*pairs, strict=True)
    return filled(pull(outs, inputs, vs, retain_graph=True), inputs)


def transposed(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """``w`` and ``J^T w``, which is linear in w: differentiated with respect to w, along v, it gives ``J v``."""
    weights = [torch.zeros_like(out, requires_grad=True) for out in outputs]
    pairs = [(out, w) for out, w in zip(outputs, weights, strict=True) if out.requires_grad]
    if not pairs:
        return weights, [torch.zeros_like(leaf) for leaf in inputs]
    outs, given = zip(*pairs, strict=True)
    with torch.enable_grad():
        return weights, torch.autograd.grad(outs, inputs, given, create_graph=True, materialize_grads=True)
