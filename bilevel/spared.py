"""What an evaluation is kept from: writing into tensors that are not its own, and reading those that autograd refuses.

A batch norm in training mode writes its running statistics, and every evaluation of an inner problem would. Operations
are given copies instead, so that the objective is the same function each time, also in several threads, and the module
is left as it was. Tensors that were made under `torch.inference_mode` cannot be saved for a derivative: copies can.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._torch import (
    is_dead_tensor_wrapper,
    is_functorch_wrapped_tensor,
    maybe_current_level,
    maybe_get_level,
    pytree,
)
from .tree import Tree, map_tensors

METADATA = frozenset({"requires_grad_", "retain_grad_", "detach_", "share_memory_", "rename_"})
_OPERATORS = (
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
)
IN_PLACE = frozenset(f"__i{name}__" for name in _OPERATORS) | {"__setitem__"}


class Spared:
    """The tensors from outside that operations get copies of, found in the first evaluation.

    Attributes:
        read: pairs of a tensor of inference mode and its copy, which serves all evaluations.
        written: tensors that are written into; each evaluation has copies of its own.
        sparse: gradients of embeddings would be sparse, which have no second derivative: they are made dense.
    """

    def __init__(self) -> None:
        self.read: dict[int, tuple[Tensor, Tensor]] = {}
        self.written: dict[int, Tensor] = {}
        self.sparse = False

    def __bool__(self) -> bool:
        return self.sparse or bool(self.read or self.written)


class Copies:
    """The copies of one evaluation.

    An operation that writes into a copy returns the original in its place, which stands for the copy until the
    evaluation ends: a module that keeps what is returned (``self.u = normalize(u, out=self.u)``) keeps its own tensor.
    """

    def __init__(self, spared: Spared):
        self.spared = spared
        self.new: dict[int, Tensor] = {id(old): copy for old, copy in spared.read.values()}
        self.old: dict[int, Tensor] = {}
        for tensor in spared.written.values():
            self._copy(tensor)

    def read(self, tensor: Tensor) -> None:
        """From now on, operations work on a copy of this tensor of inference mode."""
        self.new[id(tensor)] = tensor.clone()
        self.spared.read[id(tensor)] = tensor, self.new[id(tensor)]

    def write(self, tensor: Tensor) -> None:
        """From now on, operations work on a copy of this tensor, which one is about to write into."""
        self.spared.written[id(tensor)] = tensor
        copy = self.new.get(id(tensor))
        if copy is None or not _is_of_this_level(copy):
            self._copy(tensor, copy)

    def swap(self, tree: Tree) -> Tree:
        """Operands, with the copies in place of their originals."""
        if not self.new:
            return tree
        return map_tensors(lambda tensor: self.new.get(id(tensor), tensor), tree)

    def returned(self, out: Tree) -> Tree:
        """What an operation returns to the program."""
        return self.old.get(id(out), out) if self.old and isinstance(out, Tensor) else out

    def dense(self, func: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The settings of an embedding, for gradients that are not sparse."""
        if func in (F.embedding, F.embedding_bag) and kwargs.get("sparse"):
            self.spared.sparse = True
            return {**kwargs, "sparse": False}
        return kwargs

    def _copy(self, tensor: Tensor, last: Tensor | None = None) -> None:
        copy = (tensor if last is None else last).clone()
        self.old.pop(id(last), None)  # whose id may soon be that of another tensor
        self.new[id(tensor)], self.old[id(copy)] = copy, tensor


def _is_of_this_level(tensor: Tensor) -> bool:
    """Whether the innermost transform of `torch.func` lets its function write into it: it made it."""
    level = maybe_current_level()
    return level is None or (
        is_functorch_wrapped_tensor(tensor) and not is_dead_tensor_wrapper(tensor) and maybe_get_level(tensor) == level
    )


def targets(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes into."""
    name = getattr(func, "__name__", "")
    found: list[Any] = pytree.tree_leaves(kwargs["out"]) if "out" in kwargs else []
    if func is F.batch_norm or func is F.instance_norm:
        found += _statistics(args, kwargs, "training" if func is F.batch_norm else "use_input_stats")
    elif func is torch.batch_norm and len(args) > 5 and args[5]:
        found += args[3:5]
    elif func is F.embedding or func is F.embedding_bag:
        if kwargs.get("max_norm", args[3] if len(args) > 3 else None) is not None:  # rows that are read are shortened
            found.append(kwargs.get("weight", args[1] if len(args) > 1 else None))
    elif (name.endswith("_") and not name.startswith("__") and name not in METADATA) or (
        name in IN_PLACE or kwargs.get("inplace") is True
    ):
        found += args[:1]
    return [tensor for tensor in found if isinstance(tensor, Tensor) and not is_functorch_wrapped_tensor(tensor)]


def _statistics(args: tuple[Any, ...], kwargs: dict[str, Any], flag: str) -> list[Any]:
    """The running statistics of ``norm(input, mean, var, weight, bias, flag, ...)``, where it writes them."""
    default = flag == "use_input_stats"
    writes = kwargs.get(flag, args[5] if len(args) > 5 else default)
    given = [*args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")]
    return given if writes else []


def refuse_params(target: Tensor) -> None:
    """Raise: the params belong to the solver."""
    raise ValueError(
        f"The inner problem writes in place into its params, at a tensor of shape {tuple(target.shape)}: the solver "
        "would go on from values that it did not choose. Write a new tensor (y.clamp(min=0) in place of "
        "y.clamp_(min=0), relu(y) without inplace=True, an embedding without max_norm), or copy first (y.clone()). "
        "Bounds are a setting of the solver: ProximalGradient(bl.prox.Box(...))."
    )


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have memory in common."""
    if one.layout is not torch.strided or other.layout is not torch.strided or not (one.numel() and other.numel()):
        return False
    if one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return False
    (first, end), (start, last) = _span(one), _span(other)
    return first < last and start < end


def _span(tensor: Tensor) -> tuple[int, int]:
    """The bytes of the storage between which its numbers lie."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = int(tensor.storage_offset())
    return first * tensor.itemsize, (first + int(reach) + 1) * tensor.itemsize


def refuse_view(base: Tensor) -> None:
    """Raise: a write into a part of a tensor from outside cannot be given a copy any more."""
    raise ValueError(
        f"The inner problem writes in place into a part of a tensor of shape {tuple(base.shape)} that it captured, so "
        "that it is another function at every evaluation. Write into a copy of it (tensor.clone()) instead."
    )
