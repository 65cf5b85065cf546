"""How an objective calls modules: with the params that it is given, or, by mistake, with the module's own."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from ._torch import get_unwrapped, is_functorch_wrapped_tensor, pytree, saved_tensors_hooks
from .tree import Tree, leaves

_CALL = nn.Module._call_impl.__code__
_REENTRANT = CheckpointFunction.forward.__code__
MODEL_OPERATIONS = frozenset(
    name
    for names in (
        ("linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "baddbmm"),
        ("einsum", "tensordot", "conv1d", "conv2d", "conv3d", "embedding", "embedding_bag"),
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "multi_head_attention_forward"),
        ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "scaled_dot_product_attention"),
    )
    for name in names
)
"""Where params meet data: an objective that does these with its params has not forgotten them."""


class ModuleReads:
    """What modules read while an objective is recorded.

    Attributes:
        own: parameters that require grad, read by a module from itself; each with the outermost module of the call.
    """

    def __init__(self) -> None:
        self.own: dict[int, tuple[Tensor, nn.Module]] = {}
        self._given: set[int] = set()

    def know(self, params: Sequence[Tensor]) -> None:
        """The params that the objective is given."""
        self._given.update(id(tensor) for tensor in params)

    def look(self, operands: Sequence[Tensor]) -> None:
        """Note the operands of one operation.

        Raises:
            ValueError: the operation is inside `torch.utils.checkpoint`, in a module that was given other parameters.
        """
        for tensor in operands:
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad and id(tensor) not in self.own:
                calls = list(_module_calls())
                if calls:
                    self.own[id(tensor)] = tensor, calls[-1]
        if _is_checkpointed() and any(_is_swapped(module) for module in _module_calls()):
            raise ValueError(CHECKPOINT)

    def warn_forgotten(self, init: Tree, evaluate: Callable[[], Any]) -> None:
        """Warn where modules read the very parameters that ``init`` holds, and the given ones are in no model.

        A proximal term reads them too, but not by a call of a module; a teacher is called, but so is the student: the
        objective is evaluated once more to see that, where there is a suspicion at all.
        """
        if not any(_is_in(init, tensor, module) for tensor, module in self.own.values()):
            return
        uses = _Uses(self._given)
        with torch.no_grad(), uses:
            evaluate()
        if not uses.found:
            warnings.warn(FORGOTTEN, UserWarning, stacklevel=2)


CHECKPOINT = (
    "The inner problem calls torch.utils.checkpoint inside of functional_call. It computes again in the backward pass, "
    "when the module has its own parameters back, so that the gradient would be that of other params. Call the block "
    "without checkpoint in the inner problem: Implicit keeps the graph of one gradient only, and the memory of "
    "unrolled steps is what hypergrad=Unroll(checkpoint=True) saves."
)
FORGOTTEN = (
    "The objective calls a module with the module's own parameters, which are those of init, and uses the params that "
    "it is given beside that call only: they are minimised without ever entering the model. Write "
    "torch.func.functional_call(module, params, (x,)) in place of module(x)."
)


class _Uses(TorchFunctionMode):
    """Whether the given params enter a model: by a module that holds others than its own, or by hand."""

    def __init__(self, given: set[int]):
        super().__init__()
        self.given, self.found = given, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.found:
            operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            by_hand = getattr(func, "__name__", "") in MODEL_OPERATIONS
            self.found = (by_hand and any(id(_plain(tensor)) in self.given for tensor in operands)) or any(
                _is_swapped(module) for module in _module_calls()
            )
        return func(*args, **(kwargs or {}))


def _module_calls() -> Iterator[nn.Module]:
    """The modules that are being called, from inside out, up to the solve that evaluates."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in (__name__, "bilevel.closure"):
        frame = frame.f_back
    while frame is not None:
        if frame.f_code is _CALL:
            yield frame.f_locals["self"]
        name = frame.f_globals.get("__name__", "")
        if name.startswith("bilevel.") and not name.startswith("bilevel.nn"):
            return
        frame = frame.f_back


def _is_swapped(module: nn.Module) -> bool:
    """Whether a functional call has put other tensors into its slots, or into those of a part of it."""
    return any(
        parameter is not None and not isinstance(parameter, nn.Parameter)
        for part in module.modules()
        for parameter in part._parameters.values()
    )


def _is_checkpointed() -> bool:
    """Whether the operation is inside `torch.utils.checkpoint`, of either form."""
    hooks = saved_tensors_hooks()
    if hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint":
        return True
    if torch.is_grad_enabled():
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _REENTRANT:
        frame = frame.f_back
    return frame is not None


def _is_in(init: Tree, tensor: Tensor, module: nn.Module) -> bool:
    """Whether a parameter of ``module`` is a leaf of ``init``, or stands there under its name."""
    here = tensor.untyped_storage().data_ptr()
    if any(leaf.untyped_storage().data_ptr() == here for leaf in leaves(init)):
        return True
    if not isinstance(init, dict):
        return False
    named = [init.get(name) for name, parameter in module.named_parameters() if parameter is tensor]
    return any(isinstance(leaf, Tensor) and leaf.shape[leaf.dim() - tensor.dim() :] == tensor.shape for leaf in named)


def _plain(tensor: Tensor) -> Tensor:
    """What all transforms wrapped."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor
