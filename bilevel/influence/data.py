"""Examples as trees whose first dimension counts them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..tree import Tree, leaves, tree_map

Outputs = Callable[[Tree, Tree], Tensor]
"""``outputs(params, batch) -> [b, ...]``, one example by itself each (no batch norm in training mode)."""
Losses = Callable[[Tensor, Tree], Tensor]
"""``losses(outputs, batch) -> [b]``"""


def count_of(data: Tree) -> int:
    for leaf in leaves(data):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"the examples hold a {type(leaf).__name__}: tensors are needed, torch.as_tensor(array).")
        if leaf.layout != torch.strided:
            raise TypeError(
                f"the examples hold a sparse tensor {tuple(leaf.shape)}: take dense ones, tensor.to_dense()."
            )
    sizes = {leaf.shape[0] if leaf.dim() else -1 for leaf in leaves(data)}
    if len(sizes) != 1 or min(sizes) < 1:
        raise ValueError(
            f"the examples have leaves of shapes {[tuple(leaf.shape) for leaf in leaves(data)]}: the first dimension "
            "of each counts the examples."
        )
    return sizes.pop()


def part(data: Tree, first: int, last: int) -> Tree:
    return tree_map(lambda leaf: leaf[first:last], data)
