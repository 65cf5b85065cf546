"""Every private name of PyTorch that the library uses. What breaks without each stands in ``tests/test_torch.py``."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
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
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.nn.utils import stateless
from torch.overrides import has_torch_function
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

FunctionContext = Any
"""The ``ctx`` of a `torch.autograd.Function`: it takes any attribute, which PyTorch's own class for it does not say."""

__all__ = [
    "FUNCTIONAL_CALL",
    "FunctionContext",
    "NoSecondDerivativeError",
    "TorchDispatchMode",
    "TransformType",
    "_add_batch_dim",
    "_wrap_for_grad",
    "after_backward",
    "break_graph",
    "compiler_is_loaded",
    "forward_grad_enabled",
    "get_interpreter_stack",
    "get_unwrapped",
    "in_dual_level",
    "innermost",
    "is_batchedtensor",
    "is_dead_tensor_wrapper",
    "is_functorch_wrapped_tensor",
    "is_gradtrackingtensor",
    "is_legacy_batchedtensor",
    "maybe_current_level",
    "maybe_get_bdim",
    "maybe_get_level",
    "num_function_modes",
    "outside_transforms",
    "packed_product",
    "profiled_events",
    "pull",
    "pytree",
    "refuses_hooks",
    "reparametrized",
    "saved_tensors_hooks",
    "sequence_number",
    "shown",
    "swapped_last_in_first_out",
    "without_saved_tensors_hooks",
]


def num_function_modes() -> int:
    """How many `TorchFunctionMode` are entered in this thread."""
    return torch._C._len_torch_function_stack()


def in_dual_level() -> bool:
    """Whether a forward-mode pass is open."""
    return forward_ad._current_level >= 0


def innermost(tensor: Tensor) -> Tensor:
    """The numbers below all transforms of `torch.func`, detached; those that are mapped over stand in front."""
    tensor = tensor.detach()
    while is_functorch_wrapped_tensor(tensor):
        place = maybe_get_bdim(tensor)
        tensor = get_unwrapped(tensor)
        tensor = tensor if place < 0 else tensor.movedim(place, 0)
    return tensor


def shown(value: object) -> object:
    """What a message says of a setting, which a transform would not let be printed."""
    return innermost(value) if isinstance(value, Tensor) else value


def outside_transforms() -> AbstractContextManager[object]:
    """A block in which operations are those outside of all transforms of `torch.func`, on tensors that none wraps."""
    return temporarily_clear_interpreter_stack()


def forward_grad_enabled() -> AbstractContextManager[object]:
    """Forward mode inside of a ``jvp``, where it is off: for a tangent that is differentiated itself."""
    return forward_ad._set_fwd_grad_enabled(True)


def sequence_number(node: Node) -> int:
    """Nodes of autograd graphs are numbered in the order in which they were made, in each thread."""
    return node._sequence_nr()


def packed_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` by oneDNN, on a CPU."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return product


class NoSecondDerivativeError(NotImplementedError):
    """An operation's backward pass has no derivative in PyTorch."""


def pull(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` of cotangents whose shapes are right, None where an input has no influence.

    Its checks take a sixth of the time of a small pass, and load SymPy at the first cotangent of a process, which
    takes a third as long as ``import torch``. On a GPU, whose passes are other threads', it is `torch.autograd.grad`.

    Raises:
        NoSecondDerivativeError: an operation's backward pass has no derivative in PyTorch.
    """
    outputs, inputs, kept = tuple(outputs), tuple(inputs), retain_graph or create_graph
    try:
        if outputs[0].device.type != "cpu" or has_torch_function((*outputs, *inputs)):
            return torch.autograd.grad(
                outputs, inputs, cotangents, retain_graph=kept, create_graph=create_graph, allow_unused=True
            )
        engine = torch.autograd.Variable._execution_engine
        found: tuple[Tensor | None, ...] = engine.run_backward(
            outputs, tuple(cotangents), kept, create_graph, inputs, allow_unreachable=True, accumulate_grad=False
        )
        return found
    except RuntimeError as error:
        if not (missing := re.search(r"derivative for '?([\w:]+)'? is not implemented", str(error))):
            raise
        raise NoSecondDerivativeError(
            f"Second derivatives of the problem are needed, and PyTorch has none of {missing[1]}: {error}. Write the "
            "layer with operations that have them (nn.Embedding and a mean in place of nn.EmbeddingBag), or do without "
            "them: solver=LBFGS() in place of NewtonCG(), hypergrad=FiniteDifference(lr=...) or OneStep(), which are "
            "biased, or None."
        ) from error


def profiled_events(profile: torch.profiler.profile) -> Any:
    """The raw events of a profile, allocations among them."""
    return profile.profiler.kineto_results.events()  # type: ignore[union-attr]


def after_backward(callback: Callable[[], None]) -> None:
    """Call it when the backward pass that is running has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def saved_tensors_hooks() -> Any:
    """The innermost pair of hooks on tensors that autograd saves, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def refuses_hooks(error: RuntimeError) -> bool:
    """Whether `torch.func` refused to work beside hooks on saved tensors."""
    return "saved tensor hooks" in str(error)


@contextlib.contextmanager
def without_saved_tensors_hooks() -> Iterator[None]:
    """A block whose graphs keep their tensors as they are, whatever hooks the caller has entered."""
    removed = []
    while (pair := saved_tensors_hooks()) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        removed.append(pair)
    try:
        yield
    finally:
        for pack, unpack in reversed(removed):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


@contextlib.contextmanager
def swapped_last_in_first_out() -> Iterator[None]:
    """`torch.func.functional_call` puts back last what it swapped first.

    By itself it puts back in the order of the names: a module that stands at two places is swapped twice, and is left
    with the tensors of the call.
    """
    swapped = stateless._reparametrize_module
    stateless._reparametrize_module = functools.partial(swapped, stack_weights=True)
    try:
        yield
    finally:
        stateless._reparametrize_module = swapped


FUNCTIONAL_CALL = stateless._functional_call.__code__
"""What every functional call runs: its frame has ``module``, ``parameters_and_buffers`` and ``tie_weights``."""


def reparametrized(
    module: torch.nn.Module, given: dict[str, Tensor], tie_weights: bool
) -> AbstractContextManager[None]:
    """Within, the module has these parameters and buffers, as it has within a functional call."""
    return stateless._reparametrize_module(module, dict(given), tie_weights=tie_weights, stack_weights=True)


def compiler_is_loaded() -> bool:
    """Whether anything was compiled: `torch.compiler` loads the compiler to ask."""
    return "torch._dynamo" in sys.modules


def break_graph(fn: Callable[..., Any]) -> None:
    """Let a compiled function that calls this one break its graph there, as `torch.compiler.disable` does."""
    fn._torchdynamo_disable = True  # type: ignore[attr-defined]
