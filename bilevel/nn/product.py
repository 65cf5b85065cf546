"""Matrix products with few rows or columns, which PyTorch's BLAS is slow at on many CPUs: there by oneDNN."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._torch import (
    FunctionContext,
    in_dual_level,
    is_functorch_wrapped_tensor,
    maybe_current_level,
    packed_product,
)
from .batched import BilinearFunction

THIN, LARGE = (4, 128), 256
"""What a result's smaller side may be, and the least that its other side and the inner dimension are: where oneDNN was
faster on an AMD EPYC, by a factor of 1.5 to 2.5 for ten columns."""


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, and its derivatives of every order, by what is fastest: oneDNN for thin float32 products on a CPU."""
    if not _is_thin(a, b):
        return a @ b
    result: Tensor = _Product.apply(a, b) if _is_differentiated(a, b) else _Product.forward(a, b)
    return result


def _is_differentiated(a: Tensor, b: Tensor) -> bool:
    """Whether a derivative may be asked for. In the products of a solver none is, and a Function takes 0.1 ms there,
    where each product with the data has put all else out of the cache."""
    if torch.is_grad_enabled() or maybe_current_level() is not None or in_dual_level():
        return True
    return is_functorch_wrapped_tensor(a) or is_functorch_wrapped_tensor(b)


def _is_thin(a: Tensor, b: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu"):
        return False
    if not a.dim() == b.dim() == 2 or a.device.type != "cpu" or a.dtype != torch.float32 or b.dtype != torch.float32:
        return False
    (rows, inner), columns = a.shape, b.shape[1]
    thin, large = sorted((rows, columns))
    return THIN[0] <= thin <= THIN[1] and large >= LARGE and inner >= LARGE and _has_onednn()


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.mT``"""
    product: Tensor = packed_product(a, b)
    return product


class _Product(BilinearFunction):
    """``a [m, k], b [k, n] -> [m, n]``, all with T in front or none."""

    ranks = (2, 2)

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        if a.dim() == 3 or b.dim() == 3:  # under vmap
            return a @ b
        if a.shape[0] > b.shape[1] and a.stride(-1) != 1:  # oneDNN would copy a, which is large
            return _times_transposed(b.mT, a).mT
        return _times_transposed(a, b.mT)

    @staticmethod
    def backward(ctx: FunctionContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        ga = matmul(grad, b.mT) if ctx.needs_input_grad[0] else None
        gb = matmul(a.mT, grad) if ctx.needs_input_grad[1] else None
        return ga, gb
