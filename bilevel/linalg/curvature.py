"""Hessian products of an objective at a point: over the retained gradient graph, or by `torch.func`.

Both are exact. Measured on batched Conv4 adaptations (``docs/few_shot.md``), a product over the retained graph costs
1.6 gradients and a recomputed one 2.3; the graph of one gradient stays in memory, which the hypergradient needs anyway.
So ``"graph"`` is the default.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..problem import Linearization, Problem, graph_nodes
from .operator import Operator

HessianMode = Literal["graph", "func"]

FUSED_NORMS = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")


class GraphHessian(Operator):
    """``H v`` as one reverse pass over the retained graph of the gradient (Pearlmutter 1994)."""

    def __init__(self, problem: Problem, linearization: Linearization):
        raveler = problem.raveler
        super().__init__(raveler.batch_shape, raveler.size, raveler.dtype, raveler.device)
        self.raveler, self.leaves = raveler, linearization.leaves
        self.residual = linearization.residual

    def matvec(self, v: Tensor) -> Tensor:
        outputs, cotangents = [], []
        for residual, cotangent in zip(self.residual, self.raveler.unravel(v), strict=True):
            if residual.requires_grad:
                outputs.append(residual)
                cotangents.append(cotangent)
        products = torch.autograd.grad(outputs, self.leaves, cotangents, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(leaf) if p is None else p for p, leaf in zip(products, self.leaves, strict=True)]
        return self.raveler.ravel(filled)


class FuncHessian(Operator):
    """``H v`` as `torch.func.jvp` of `torch.func.grad`: recomputed, so it holds no graph between products.

    Raises:
        NotImplementedError: the objective uses a fused batch norm in training mode, whose product would be
            wrong by several percent under these transforms (PyTorch issue 196699).
    """

    def __init__(self, problem: Problem, linearization: Linearization):
        raveler = problem.raveler
        super().__init__(raveler.batch_shape, raveler.size, raveler.dtype, raveler.device)
        fused = _fused_norm(linearization.loss)
        if fused:
            raise NotImplementedError(
                f"hessian='func' cannot be used: the objective contains the fused {fused}, whose Hessian product "
                "under torch.func is silently wrong by several percent. Use hessian='graph', or a norm written "
                "with torch.var_mean and rsqrt (as applications/few_shot/models.py does)."
            )
        self.raveler, self.problem = raveler, problem
        self.leaves = tuple(leaf.detach() for leaf in linearization.leaves)

    def matvec(self, v: Tensor) -> Tensor:
        gradient = torch.func.grad(self.problem.sum_loss, argnums=tuple(range(len(self.leaves))))
        with torch.no_grad():
            product = torch.func.jvp(gradient, self.leaves, tuple(self.raveler.unravel(v)))[1]
        return self.raveler.ravel(product)


def hessian(problem: Problem, linearization: Linearization, mode: HessianMode) -> Operator:
    """The Hessian of ``problem`` at the point of ``linearization``."""
    return {"graph": GraphHessian, "func": FuncHessian}[mode](problem, linearization)


def _fused_norm(loss: Tensor) -> str | None:
    """The first fused norm in the graph of ``loss``, under which `torch.func` gives wrong products."""
    names = (node.name() for node in graph_nodes([loss]))
    return next((name.removesuffix("Backward0") for name in names if name.startswith(FUSED_NORMS)), None)
