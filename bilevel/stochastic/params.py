"""The tensors that a method updates in place: checked, copied, written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..checks import refuse_mps
from ..tree import Tree, leaves


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of their values now."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def copy_into(params: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Write the values into the params."""
    for leaf, value in zip(params, values, strict=True):
        leaf.copy_(value)


def check_params(name: str, tree: Tree) -> list[Tensor]:
    """The leaves: floating-point leaf tensors that require grad, on one device."""
    flat = leaves(tree)
    if not flat:
        raise ValueError(f"{name} is empty: pass a tensor or a tree of tensors.")
    for leaf in flat:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name} contains a {type(leaf).__name__}: every leaf must be a tensor.")
        if not leaf.is_floating_point():
            raise TypeError(f"{name} contains a tensor of {leaf.dtype}: floating point is needed.")
        if not (leaf.is_leaf and leaf.requires_grad):
            raise ValueError(
                f"{name} contains a tensor of shape {tuple(leaf.shape)} that is no leaf that requires grad: it is "
                "updated in place. Pass module parameters, or tensor.detach().clone().requires_grad_()."
            )
        if leaf.device != flat[0].device:
            raise ValueError(f"{name} is spread over {flat[0].device} and {leaf.device}: put it on one device.")
        refuse_mps(name, leaf.device)
        if not bool(torch.isfinite(leaf).all()):
            raise ValueError(f"{name} contains NaN or infinite values.")
    if len({id(leaf) for leaf in flat}) < len(flat):
        raise ValueError(f"{name} contains the same tensor twice.")
    if sum(leaf.numel() for leaf in flat) == 0:
        raise ValueError(f"{name} holds no numbers.")
    return flat
