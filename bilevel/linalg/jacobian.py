"""The Jacobian of a residual at a point, over its retained graph."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Linearization
from ..tree import Raveler
from .operator import Operator


class GraphJacobian(Operator):
    """``J = d_y r``: ``J^T u`` is one reverse pass, ``J v`` one reverse pass over the graph of such a pass.

    One problem's residual must not depend on another's unknowns. Where J is declared symmetric, both are one pass.
    """

    def __init__(self, raveler: Raveler, at: Linearization, symmetric: bool = False):
        super().__init__(raveler.batch_shape, raveler.size, raveler.dtype, raveler.device, symmetric)
        self.raveler, self.at = raveler, at
        self._transposed: tuple[list[Tensor], list[Tensor]] | None = None

    def rmatvec(self, v: Tensor) -> Tensor:
        return self._reverse(self.at.residual, self.at.leaves, self.raveler.unravel(v))

    def matvec(self, v: Tensor) -> Tensor:
        if self.symmetric:
            return self.rmatvec(v)
        # J^T w is linear in w: differentiating it with respect to w, along v, gives J v.
        if self._transposed is None:
            with torch.enable_grad():
                dummies = [torch.zeros_like(r, requires_grad=True) for r in self.at.residual]
                outputs = [r for r in self.at.residual if r.requires_grad]
                given = [w for w, r in zip(dummies, self.at.residual, strict=True) if r.requires_grad]
                pulled = (
                    torch.autograd.grad(outputs, self.at.leaves, given, create_graph=True, allow_unused=True)
                    if outputs
                    else [None] * len(dummies)
                )
                filled = [torch.zeros_like(y) if p is None else p for p, y in zip(pulled, self.at.leaves, strict=True)]
            self._transposed = (dummies, filled)
        dummies, pulled_back = self._transposed
        return self._reverse(pulled_back, dummies, self.raveler.unravel(v))

    def _reverse(self, outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]) -> Tensor:
        pairs = [(out, v) for out, v in zip(outputs, cotangents, strict=True) if out.requires_grad]
        if not pairs:
            return self.raveler.ravel([torch.zeros_like(leaf) for leaf in inputs])
        outs, vs = zip(*pairs, strict=True)
        products = torch.autograd.grad(outs, inputs, vs, retain_graph=True, allow_unused=True)
        return self.raveler.ravel(
            [torch.zeros_like(leaf) if p is None else p for p, leaf in zip(products, inputs, strict=True)]
        )
