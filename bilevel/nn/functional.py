"""Calls of layers and modules: for T networks at once, and for several threads at once."""

from __future__ import annotations

import contextlib
import threading
import weakref
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..context import LAST_IN_FIRST_OUT
from ..tree import tensors
from .batched import check_operands, check_tensors
from .product import matmul


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: ``x [n, in], weight [out, in], bias [out]``, or all with a first dimension T.

    T networks may share x. On a CPU in float32 products with few classes are up to twice as fast as PyTorch's own (by
    oneDNN, see `matmul`).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_tensors("linear", x=x, weight=weight, **({} if bias is None else {"bias": bias}))
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

    Raises:
        NotImplementedError: in such a thread, the module reaches its own parameters by a way that no replica has, such
            as a hook that closes over it.
    """
    looks: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    called = module
    if threading.current_thread() is not threading.main_thread():
        called = _replica(module, {})
        if module not in _FOLLOWED:
            looks = _OwnParameters(module, params)
    with LAST_IN_FIRST_OUT, looks:
        found = torch.func.functional_call(called, params, args, kwargs)
    if called is not module:
        _FOLLOWED.add(module)
    return found


_FOLLOWED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules of which a replica was called, and did not use the module's own parameters."""


class _OwnParameters(TorchFunctionMode):
    """Refuses the use of a module's own parameters in a call that gives others in their place."""

    def __init__(self, module: nn.Module, params: dict[str, Tensor]):
        super().__init__()
        own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
        self._names = {id(own[name]): name for name in params if name in own and own[name] is not params[name]}
        self._module = type(module).__name__

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors((args, kwargs)):
            if id(tensor) in self._names:
                raise NotImplementedError(
                    f"{self._module} uses its own {self._names[id(tensor)]!r} in place of the given one, in a thread: "
                    "it reaches it by a hook or an object that refers to the module itself. Take num_threads=1, or "
                    "reach the parts by attributes, nn.ModuleList and methods."
                )
        return func(*args, **(kwargs or {}))


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
    for name, value in module.__dict__.items():
        if name not in ("_parameters", "_buffers", "_modules"):
            copy.__dict__[name] = _replicated(value, made)
    return copy


def _replicated(value: Any, made: dict[int, nn.Module]) -> Any:
    """An attribute of a replica: with replicas for the modules in its lists, and methods of replicas."""
    if isinstance(value, nn.Module):
        return _replica(value, made)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, _replica(value.__self__, made))
    if type(value) in (list, tuple, set):
        return type(value)(_replicated(part, made) for part in value)
    if isinstance(value, dict) and any(isinstance(part, nn.Module | MethodType) for part in value.values()):
        parts = value.copy()  # of its own kind
        parts.update((key, _replicated(part, made)) for key, part in value.items())
        return parts
    return value
