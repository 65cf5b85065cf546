"""How an objective calls modules: with the params that it is given, or, by mistake, with the module's own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from ._torch import (
    FUNCTIONAL_CALL,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    pytree,
    reparametrized,
    saved_tensors_hooks,
)
from .notices import tell
from .tree import Tree

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


@dataclass(frozen=True)
class Given:
    """What a functional call has given a module for its time: a solve inside of it is differentiated after it."""

    module: nn.Module
    tensors: dict[str, Tensor]
    tie_weights: bool

    @property
    def in_place(self) -> bool:
        """Whether the module has them now."""
        return all(_at(self.module, name) is tensor for name, tensor in self.tensors.items())

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within, the module has them."""
        if self.in_place:
            yield
            return
        with reparametrized(self.module, self.tensors, self.tie_weights):
            yield

    @staticmethod
    def around() -> tuple[Given, ...]:
        """Of the functional calls that this thread is in, from outside in."""
        found, frame = [], cast("FrameType | None", sys._getframe(1))
        while frame is not None:
            if frame.f_code is FUNCTIONAL_CALL:
                own = frame.f_locals
                found.append(Given(own["module"], dict(own["parameters_and_buffers"]), own["tie_weights"]))
            frame = frame.f_back
        return tuple(reversed(found))


def _at(module: nn.Module, name: str) -> Tensor | None:
    """What stands in a slot; None where there is none of this name."""
    *path, last = name.split(".")
    for part in path:
        child = module._modules.get(part)
        if child is None:
            return None
        module = child
    return module._parameters.get(last, module._buffers.get(last))


class ModuleReads:
    """What modules read while an objective is traced.

    Attributes:
        own: parameters read by a module from itself; each with the outermost module of the call.
    """

    def __init__(self) -> None:
        self.own: dict[int, tuple[Tensor, nn.Module]] = {}
        self._given: dict[int, int] = {}

    def know(self, params: Sequence[Tensor]) -> None:
        """The params that the objective is given, leaf by leaf."""
        self._given = {id(tensor): index for index, tensor in enumerate(params)}

    def look(self, operands: Sequence[Tensor]) -> None:
        """Note the operands of one operation.

        Raises:
            ValueError: the operation is inside `torch.utils.checkpoint`, in a module that was given other parameters.
        """
        for tensor in operands:
            if isinstance(tensor, nn.Parameter) and id(tensor) not in self.own:
                calls = list(_module_calls())
                if calls:
                    self.own[id(tensor)] = tensor, calls[-1]
        if _is_checkpointed() and any(True for module in _module_calls() for _ in _swapped(module)):
            raise ValueError(CHECKPOINT)

    def warn_forgotten(self, init: Tree, evaluate: Callable[[], object]) -> None:
        """Warn where a module reads the very parameters that ``init`` holds, and the given ones are in no model.

        A proximal term reads them too, but not by a call of a module; a teacher is called, but so is the student: the
        objective is evaluated once more to see that, where there is a suspicion at all.
        """
        read: dict[nn.Module, set[int]] = {}
        for tensor, module in self.own.values():
            read.setdefault(module, set()).update(_places(init, tensor, module))
        if not any(read.values()):
            return
        uses = _Uses(self._given)
        with torch.no_grad(), uses:
            evaluate()
        if any(places and places.isdisjoint(uses.found) for places in read.values()):
            tell(FORGOTTEN, UserWarning)


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
    """Which of the given params enter a model: by a module that holds others than its own, or by hand, with data.

    Args:
        given: the number of each param, by its id.
    """

    def __init__(self, given: dict[int, int]):
        super().__init__()
        self.found: set[int] = set()
        self._all = frozenset(given.values())
        self._made_of = {ident: frozenset({index}) for ident, index in given.items()}
        self._kept: list[Tensor] = []  # so that no id is that of another tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made_of = [self._params_in(tensor) for tensor in operands]
        by_hand = getattr(func, "__name__", "") in MODEL_OPERATIONS
        if by_hand and not all(made_of):  # params with params are a penalty
            self.found.update(*made_of)
        for module in _module_calls():
            for parameter in _swapped(module):
                self.found |= self._params_in(parameter) or self._all
        out = func(*args, **(kwargs or {}))
        if not by_hand and any(made_of):
            for tensor in pytree.tree_leaves(out):
                if isinstance(tensor, Tensor) and not self._params_in(tensor):
                    self._made_of[id(tensor)] = frozenset().union(*made_of)
                    self._kept.append(tensor)
        return out

    def _params_in(self, tensor: Tensor) -> frozenset[int]:
        """The params that it was made of."""
        return self._made_of.get(id(tensor)) or self._made_of.get(id(_plain(tensor)), frozenset())


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


def _swapped(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that a functional call has put into its slots, or into those of a part of it."""
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None and not isinstance(parameter, nn.Parameter):
                yield parameter


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


def _places(init: Tree, tensor: Tensor, module: nn.Module) -> set[int]:
    """The leaves of ``init`` that are a parameter of ``module``, or stand for it by name or by the shapes of all."""
    placed = list(enumerate(pytree.tree_flatten_with_path(init)[0]))
    here = tensor.untyped_storage().data_ptr()
    itself = {index for index, (_, leaf) in placed if leaf.untyped_storage().data_ptr() == here}
    names = {name for name, parameter in module.named_parameters() if parameter is tensor}
    named = {index for index, (path, leaf) in placed if _key(path) in names and _fits(leaf, tensor)}
    return itself or named or _in_order([leaf for _, (_, leaf) in placed], tensor, list(module.parameters()))


def _in_order(leaves: Sequence[Tensor], tensor: Tensor, parameters: Sequence[Tensor]) -> set[int]:
    """The place of a parameter among leaves that have the shapes of all, or are all in one vector."""
    if len(parameters) < 2:
        return set()
    if len(leaves) == 1 and leaves[0].shape[-1:] == (sum(parameter.numel() for parameter in parameters),):
        return {0}
    if len(leaves) == len(parameters) and all(map(_fits, leaves, parameters)):
        return {index for index, parameter in enumerate(parameters) if parameter is tensor}
    return set()


def _fits(leaf: Tensor, parameter: Tensor) -> bool:
    """Whether it has the shape of the parameter, for one problem or many."""
    return leaf.shape[leaf.dim() - parameter.dim() :] == parameter.shape


def _key(path: tuple[Any, ...]) -> Any:
    """The last name on the way to a leaf."""
    return getattr(path[-1], "key", None) if path else None


def _plain(tensor: Tensor) -> Tensor:
    """What all transforms wrapped."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor
