"""Every private name of PyTorch that the library uses. What breaks without each stands in ``tests/test_torch.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (  # type: ignore[attr-defined]
    TransformType,
    _add_batch_dim,
    _wrap_for_grad,
    get_interpreter_stack,
    get_unwrapped,
    is_batchedtensor,
    is_dead_tensor_wrapper,
    is_functorch_wrapped_tensor,
    is_gradtrackingtensor,
    is_legacy_batchedtensor,
    maybe_current_level,
    maybe_get_bdim,
    maybe_get_level,
)
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

FunctionContext = Any
"""The ``ctx`` of a `torch.autograd.Function`: it takes any attribute, which PyTorch's own class for it does not say."""

__all__ = [
    "FunctionContext",
    "TorchDispatchMode",
    "TransformType",
    "_add_batch_dim",
    "_wrap_for_grad",
    "after_backward",
    "get_interpreter_stack",
    "get_unwrapped",
    "in_dual_level",
    "is_batchedtensor",
    "is_dead_tensor_wrapper",
    "is_functorch_wrapped_tensor",
    "is_gradtrackingtensor",
    "is_legacy_batchedtensor",
    "maybe_current_level",
    "maybe_get_bdim",
    "maybe_get_level",
    "num_function_modes",
    "packed_product",
    "profiled_events",
    "pytree",
    "saved_tensors_hooks",
    "sequence_number",
]


def num_function_modes() -> int:
    """How many `TorchFunctionMode` are entered in this thread."""
    return torch._C._len_torch_function_stack()


def in_dual_level() -> bool:
    """Whether a forward-mode pass is open."""
    return forward_ad._current_level >= 0


def sequence_number(node: Node) -> int:
    """Nodes of autograd graphs are numbered in the order in which they were made, in each thread."""
    return node._sequence_nr()


def packed_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` by oneDNN, on a CPU."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return product


def profiled_events(profile: torch.profiler.profile) -> Any:
    """The raw events of a profile, allocations among them."""
    return profile.profiler.kineto_results.events()  # type: ignore[union-attr]


def after_backward(callback: Callable[[], None]) -> None:
    """Call it when the backward pass that is running has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def saved_tensors_hooks() -> Any:
    """The innermost pair of hooks on tensors that autograd saves, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)
