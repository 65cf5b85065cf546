"""Proximal operators of parts of the params: of each row of a matrix, of each leaf of a tree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._torch import pytree
from ..checks import check_fields
from ..tree import Tree, leaves, on_host
from .base import Box, Prox, Setting


@dataclass(frozen=True, eq=False)
class Rows(Prox):
    """One prox for each row: every ``length`` numbers in a row are held to it by themselves.

    Such as `Simplex` for matrices whose rows are distributions, or `L2Ball` for weights of bounded rows.

    Args:
        each: what acts on ``[*batch, rows, length]``; its settings may have one entry for each row, ``[rows, 1]``.
        length: entries of a row, the last dimension of the matrix.
    """

    each: Prox
    length: int

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.each, Prox):
            raise TypeError(f"each is {self.each!r}: it is one of bilevel.prox, such as prox.Simplex().")
        if self.length < 1:
            raise ValueError(f"length is {self.length}: a row has one entry at least.")

    @property
    def separable(self) -> bool:  # type: ignore[override]
        return self.each.separable

    @property
    def tensors(self) -> list[Tensor]:
        return self.each.tensors

    def prox(self, y: Tensor, step: Setting) -> Tensor:
        rows = self._rows(y)
        if isinstance(step, Tensor) and step.dim() and step.dim() == y.dim() - 1:
            step = step.unsqueeze(-1).expand(rows.shape[:-1])
        return self.each.prox(rows, step).reshape(y.shape)

    def value(self, y: Tensor) -> Tensor:
        return self.each.value(self._rows(y)).sum(-1)

    def _rows(self, y: Tensor) -> Tensor:
        if y.shape[-1] % self.length:
            raise ValueError(f"length is {self.length}, which does not divide the {y.shape[-1]} params into rows.")
        return y.reshape(*y.shape[:-1], -1, self.length)


@dataclass(frozen=True, eq=False)
class Leaves(Prox):
    """A prox for each leaf of the params; None leaves one alone. ``ProximalGradient(prox=tree)`` makes it.

    Args:
        parts: in the order of the leaves.
        sizes: how many numbers each leaf has, in all problems together.
    """

    parts: tuple[Prox | None, ...]
    sizes: tuple[int, ...]

    @property
    def separable(self) -> bool:  # type: ignore[override]
        return all(part is None or part.separable for part in self.parts)

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for part in self.parts if part is not None for tensor in part.tensors]

    def prox(self, y: Tensor, step: Setting) -> Tensor:
        pieces = zip(self.parts, self._split(y), strict=True)
        return torch.cat([piece if part is None else part.prox(piece, step) for part, piece in pieces], -1)

    def value(self, y: Tensor) -> Tensor:
        pieces = zip(self.parts, self._split(y), strict=True)
        values = [part.value(piece) for part, piece in pieces if part is not None]
        return torch.stack(values).sum(0) if values else torch.zeros_like(y[..., 0])

    def _split(self, y: Tensor) -> tuple[Tensor, ...]:
        # Every leaf counts the same problems, so that the shares of one problem are those of all.
        total = sum(self.sizes)
        pieces: tuple[Tensor, ...] = y.split([size * y.shape[-1] // total for size in self.sizes], -1)
        return pieces


@dataclass(frozen=True, eq=False)
class LeafBox(Box):
    """A `Box` whose bounds have the shape of their leaf."""

    def prox(self, y: Tensor, step: Setting) -> Tensor:
        return self._flat(y).prox(y, step)

    def value(self, y: Tensor) -> Tensor:
        return self._flat(y).value(y)

    def _flat(self, y: Tensor) -> Box:
        flat = Box.__new__(Box)  # checked when this one was made
        for name in ("lower", "upper"):
            bound = getattr(self, name)
            object.__setattr__(flat, name, bound.reshape(y.shape) if isinstance(bound, Tensor) else bound)
        return flat


def on_leaves(tree: Tree, init: Tree) -> Prox:
    """A prox, or a tree of them, as one prox of the flat params.

    Args:
        tree: a prox of all params together; or a tree like ``init`` with a prox or None for each leaf, or for a part of
            the tree, whose leaves then have it each.

    Raises:
        TypeError, ValueError: something else, or a tree of another structure.
    """
    if isinstance(tree, Prox):
        return tree
    spec = pytree.tree_structure(init)
    parts = _broadcast(tree, spec, "the parts of prox", lambda part: part is None or isinstance(part, Prox))
    for part in parts:
        if part is not None and not isinstance(part, Prox):
            raise TypeError(f"prox holds {part!r}: each leaf has one of bilevel.prox, such as prox.L1(0.1), or None.")
    return Leaves(tuple(parts), tuple(leaf.numel() for leaf in leaves(init)))


def within(bounds: tuple[Tree, Tree], init: Tree) -> Prox:
    """The box of ``(lower, upper)``, each None, a number, a tensor or array, or a tree like ``init`` of these.

    Raises:
        TypeError: what is no bound. ValueError: bounds of another structure or shape, or an empty box.
    """
    spec, flat = pytree.tree_structure(init), leaves(init)
    sides = []
    for name, side, none in (("lower", bounds[0], -torch.inf), ("upper", bounds[1], torch.inf)):
        parts = _broadcast(
            side, spec, f"the {name} bounds", lambda part: part is None or isinstance(part, Tensor | np.ndarray | Real)
        )
        sides.append(
            [_shaped(none if part is None else part, leaf, name) for part, leaf in zip(parts, flat, strict=True)]
        )
    boxes = tuple(LeafBox(low, high) for low, high in zip(*sides, strict=True))
    return boxes[0] if len(boxes) == 1 else Leaves(boxes, tuple(leaf.numel() for leaf in flat))


def _broadcast(tree: Tree, spec: pytree.TreeSpec, what: str, is_part: Callable[[object], bool]) -> list[Any]:
    """The parts of a tree, one for each leaf of another; a part stands for all leaves below it."""
    parts: list[Any] = [None] * spec.num_leaves

    def put(part: Tree, below: Tree) -> None:
        for index in pytree.tree_leaves(below):  # by number: a dict may name its parts in another order
            parts[index] = part

    try:
        pytree.tree_map_(put, tree, pytree.tree_unflatten(list(range(spec.num_leaves)), spec), is_leaf=is_part)
    except ValueError as error:
        raise ValueError(
            f"{what} have not the structure of init (a list is a tree; write a vector as a tensor): {error}"
        ) from error
    return parts


def _shaped(bound: Any, leaf: Tensor, name: str) -> Setting:
    if isinstance(bound, np.ndarray) and bound.dtype.kind in "biuf":
        bound = on_host(bound)
    if isinstance(bound, Real):
        return float(bound)
    if not isinstance(bound, Tensor) or bound.is_complex():
        kind = f"of {bound.dtype}" if isinstance(bound, Tensor | np.ndarray) else repr(bound)
        raise TypeError(
            f"the {name} bound is {kind}: each is None, a real number, a tensor or an array that broadcasts to its "
            "leaf of init, or a tree like init of these."
        )
    try:
        return bound.to(leaf.device, leaf.dtype).expand(leaf.shape)
    except RuntimeError:
        raise ValueError(
            f"the {name} bound has shape {tuple(bound.shape)}, which does not broadcast to that of its leaf, "
            f"{tuple(leaf.shape)}."
        ) from None
