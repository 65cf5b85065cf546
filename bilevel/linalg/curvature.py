"""Hessian products of an objective at a point: over the retained gradient graph, or by `torch.func`.

Both are exact. Measured on batched Conv4 adaptations (``docs/few_shot.md``), a product over the retained graph costs
1.6 gradients and a recomputed one 2.3; the graph of one gradient stays in memory, which the hypergradient needs anyway.
So ``"graph"`` is the default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .._torch import refuses_hooks
from ..problem import Linearization, Problem, graph_nodes
from ..tree import Raveler
from .jacobian import GraphJacobian
from .operator import Operator

HessianMode = Literal["graph", "func"]

FUSED_NORMS = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")


def _twice(loss: Tensor) -> tuple[Tensor, Tensor]:
    """To differentiate, and to look at."""
    return loss, loss.detach()


class FuncHessian(Operator):
    """``H v`` as `torch.func.vjp` of `torch.func.grad`: recomputed, so it holds no graph between products.

    Raises:
        NotImplementedError: the objective uses a fused batch norm in training mode, whose product would be
            wrong by several percent under these transforms (PyTorch issue 196699).
    """

    def __init__(self, raveler: Raveler, linearization: Linearization, sum_loss: Callable[[list[Tensor]], Tensor]):
        super().__init__(raveler.batch_shape, raveler.size, raveler.dtype, raveler.device)
        assert linearization.loss is not None
        fused = fused_norm(graph_nodes([linearization.loss]))
        if fused:
            raise NotImplementedError(
                f"operator='func' cannot be used: the objective contains the fused {fused}, whose Hessian product "
                "under torch.func is silently wrong by several percent. Use operator='graph', "
                "bilevel.nn.batch_norm, or a norm written with torch.var_mean and rsqrt."
            )
        self.raveler = raveler
        self.gradient = torch.func.grad(lambda point: _twice(sum_loss(point)), has_aux=True)
        self.leaves = [leaf.detach() for leaf in linearization.leaves]
        self.loss = linearization.loss.detach().double().sum()
        self.apart = torch.zeros_like(self.loss)

    def matvec(self, v: Tensor) -> Tensor:
        direction = self.raveler.unravel(v)
        with torch.no_grad():
            # H is symmetric, so reverse mode gives H v. Forward mode is no faster, does not nest, and its levels are
            # global to the process: in two threads it raises, or is silently wrong.
            try:
                _, pull, loss = torch.func.vjp(self.gradient, self.leaves, has_aux=True)  # type: ignore[misc]
            except RuntimeError as error:
                if not refuses_hooks(error):
                    raise
                raise NotImplementedError(
                    "operator='func' cannot be used: the objective calls torch.utils.checkpoint, or has other hooks on "
                    "saved tensors, which torch.func does not support. Use operator='graph', or call the block without "
                    "checkpoint: the memory of unrolled steps is what hypergrad=Unroll(checkpoint=True) saves."
                ) from error
            self.apart = torch.fmax(self.apart, (loss.double() - self.loss).abs())
        return self.raveler.ravel(pull(direction)[0])


def hessian(problem: Problem, linearization: Linearization, mode: HessianMode) -> Operator:
    """The Hessian of ``problem`` at the point of ``linearization``."""
    if mode == "graph":
        return GraphJacobian(problem.raveler, linearization, symmetric=True)
    return FuncHessian(problem.raveler, linearization, lambda point: problem.sum_loss(*point))


def fused_norm(nodes: Iterable[Node]) -> str | None:
    """The first fused norm in a graph, under which `torch.func` gives wrong products."""
    names = (node.name() for node in nodes)
    return next((name.removesuffix("Backward0") for name in names if name.startswith(FUSED_NORMS)), None)


def has_layer_norm(nodes: Iterable[Node]) -> bool:
    """Whether a graph has a fused layer norm, whose third derivative is wrong."""
    return any(node.name().startswith("NativeLayerNorm") for node in nodes)
