"""Calls of layers and modules: for T networks at once, and for several threads at once."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from ..context import LAST_IN_FIRST_OUT
from .batched import check_operands
from .product import matmul


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: ``x [n, in], weight [out, in], bias [out]``, or all with a first dimension T.

    T networks may share x. On a CPU in float32 products with few classes are up to twice as fast as PyTorch's own (by
    oneDNN, see `matmul`).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    tasks = tuple(weight.shape[:1]) if weight.dim() == 3 else ()
    shared = not tasks or x.dim() == 2
    shapes = {
        "x": (x, (*[None] * (x.dim() - 1), weight.shape[-1]) if shared else (*tasks, None, weight.shape[-1])),
        "weight": (weight, (*tasks, None, None)),
    }
    check_operands("linear", shapes if bias is None else {**shapes, "bias": (bias, weight.shape[:-1])})
    product = matmul(x, weight.mT)
    return product if bias is None else product + (bias.unsqueeze(-2) if tasks else bias)


def functional_call(
    module: nn.Module, params: dict[str, Tensor], args: Any, kwargs: dict[str, Any] | None = None
) -> Any:
    """`torch.func.functional_call`, also where several threads call the same module.

    PyTorch's own puts the parameters into the module for the time of the call, so that two threads see each other's.
    Here a thread other than the main one calls a replica that shares everything with the module but the slots. A module
    that holds a part of itself under two names is left as it was, which PyTorch's own does not do.
    """
    if threading.current_thread() is not threading.main_thread():
        module = _replica(module, {})
    with LAST_IN_FIRST_OUT:
        return torch.func.functional_call(module, params, args, kwargs)


def _replica(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """A copy of the module and its parts, of which one that stands at two places is one again."""
    if id(module) in made:
        return made[id(module)]
    copy = made[id(module)] = module.__new__(type(module))
    copy.__dict__ = module.__dict__.copy()
    copy.__dict__["_parameters"] = module._parameters.copy()
    copy.__dict__["_buffers"] = module._buffers.copy()
    copy.__dict__["_modules"] = {
        name: None if child is None else _replica(child, made) for name, child in module._modules.items()
    }
    return copy
