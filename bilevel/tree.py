"""Pytrees of tensors: flatten to one vector per problem and back, reductions over trailing dimensions.

Solvers work on one flat tensor of shape ``[*batch, n]``: their vector updates are single kernels and their
code mirrors the algorithm boxes. `Raveler` is the only place that knows the tree.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ._torch import pytree

Tree = Any
"""A tensor, or any nesting of dicts, lists and tuples of tensors."""


def leaves(tree: Tree) -> list[Tensor]:
    """The tensors of ``tree`` in a fixed order."""
    return pytree.tree_leaves(tree)


def named_leaves(tree: Tree) -> dict[str, Tensor]:
    """The tensors of ``tree`` in the same order, by where they stand: ``['layer'][0]``."""
    try:
        return {pytree.keystr(path): leaf for path, leaf in pytree.tree_leaves_with_path(tree)}
    except ValueError:  # a container that was registered without names of its parts
        return {f"[{number}]": leaf for number, leaf in enumerate(leaves(tree))}


def on_host(value: object) -> Tensor:
    """A number or an array as a tensor of the CPU, whatever the default device is; a tensor is itself."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def is_continuous(tensor: Tensor) -> bool:
    """Whether a derivative towards it exists: real or complex floating point."""
    return tensor.is_floating_point() or tensor.is_complex()


def tree_map(fn: Any, tree: Tree, *rest: Tree) -> Tree:
    """Apply ``fn`` leaf by leaf to trees of the same structure."""
    return pytree.tree_map(fn, tree, *rest)


def map_tensors(fn: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """``fn`` on the tensors of a tree and nothing on its other leaves.

    For operands of single operations: what they mostly are is walked here, in a tenth of the time of a general walk.
    """
    if isinstance(tree, Tensor):
        return fn(tree)
    kind = type(tree)
    if kind in _PLAIN:
        return tree
    if kind is tuple or kind is list:
        return kind([map_tensors(fn, part) for part in tree])
    if kind is dict:
        return {key: map_tensors(fn, part) for key, part in tree.items()}
    return pytree.tree_map_only(Tensor, fn, tree)


_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size})


def tensors(tree: Tree) -> list[Tensor]:
    """The tensors among the leaves of ``tree``, in order; for operands, as `map_tensors`."""
    if isinstance(tree, Tensor):
        return [tree]
    kind = type(tree)
    if kind in _PLAIN:
        return []
    if kind is dict:
        tree, kind = list(tree.values()), list
    if kind is tuple or kind is list:
        return [tensor for part in tree for tensor in tensors(part)]
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def filled(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Gradients by autograd, zero where there is None."""
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, like, strict=True)]


def stack(tree: Tree, num_tasks: int) -> Tree:
    """Repeat every leaf for ``num_tasks`` independent problems: ``[...] -> [T, ...]``.

    The leaves are expanded views: no memory is copied, and gradients sum over the tasks.
    """
    if isinstance(num_tasks, bool) or not isinstance(num_tasks, Integral):
        raise TypeError(f"num_tasks is {num_tasks!r}: a whole number is needed.")
    if num_tasks < 1:
        raise ValueError(f"num_tasks is {num_tasks}: at least one task is needed to stack parameters for.")
    return tree_map(lambda leaf: leaf.expand(num_tasks, *leaf.shape), tree)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in double precision, real or complex as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over the last dimension, accumulated in float64: ``[*batch, n] -> [*batch]``."""
    return _by_few(lambda a, b: (a * b).sum(-1, dtype=torch.float64), a, b)


def norm(a: Tensor) -> Tensor:
    """2-norm over the last dimension in float64, safe against overflow and underflow of the squares."""
    return _by_few(lambda a: torch.linalg.vector_norm(a, dim=-1, dtype=torch.float64), a)


CACHED = 2**17
"""Numbers of which a copy in float64 stays in the cache of a core."""


def _by_few(reduce: Callable[..., Tensor], *vectors: Tensor) -> Tensor:
    """A reduction of vectors ``[T, n]`` that PyTorch copies to float64 first; on a CPU of a few problems at a time."""
    shape, rows = vectors[0].shape, CACHED // max(1, vectors[0].shape[-1]) or 1
    copied = vectors[0].dtype is not torch.float64 and vectors[0].device.type == "cpu"
    if not copied or len(shape) != 2 or shape[0] <= rows or any(vector.shape != shape for vector in vectors):
        return reduce(*vectors)
    return torch.cat([reduce(*parts) for parts in zip(*(vector.split(rows) for vector in vectors), strict=True)])


def scale(factor: Tensor, vector: Tensor) -> Tensor:
    """One factor for each problem: ``[*batch] x [*batch, n] -> [*batch, n]`` in the vector's dtype."""
    return factor.to(vector.dtype).unsqueeze(-1) * vector


def axpy(factor: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``y + factor x`` in one pass over the memory, a factor for each problem."""
    return torch.addcmul(y, factor.to(x.dtype).unsqueeze(-1), x)


class Raveler:
    """Maps a tree to one flat vector for each problem, ``[*batch, n]``, and back.

    Args:
        tree: tensors whose leading dimensions are ``batch_shape``.
        batch_shape: ``()`` for one problem, ``(T,)`` for T problems.
    """

    def __init__(self, tree: Tree, batch_shape: Sequence[int] = ()):
        flat, self.spec = pytree.tree_flatten(tree)
        self.batch_shape = torch.Size(batch_shape)
        self.shapes = [leaf.shape for leaf in flat]
        self.dtypes = [leaf.dtype for leaf in flat]
        self.sizes = [math.prod(shape[len(self.batch_shape) :]) for shape in self.shapes]
        by_bits = sorted(self.dtypes, key=lambda dtype: torch.finfo(dtype).bits)
        self.coarsest, self.dtype = by_bits[0], by_bits[-1]
        self.device = flat[0].device

    @property
    def size(self) -> int:
        """Unknowns of one problem."""
        return sum(self.sizes)

    def ravel(self, tensors: Sequence[Tensor]) -> Tensor:
        """Leaves to ``[*batch, n]``."""
        parts = [
            leaf.reshape(*self.batch_shape, size).to(self.dtype) for leaf, size in zip(tensors, self.sizes, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def unravel(self, flat: Tensor) -> list[Tensor]:
        """``[*batch, n]`` to leaves of the original shapes and dtypes (views where the dtype allows)."""
        if len(self.sizes) == 1 and flat.shape == self.shapes[0]:
            return [flat.to(self.dtypes[0])]
        parts = flat.split(self.sizes, -1)
        return [
            part.reshape(shape).to(dtype) for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]

    def unflatten(self, tensors: Sequence[Tensor]) -> Tree:
        """Leaves to the tree."""
        return pytree.tree_unflatten(list(tensors), self.spec)


def broadcasts_to(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether tensors of this shape broadcast to the other one, and do not enlarge it."""
    pairs = zip(reversed(shape), reversed(other), strict=False)
    return len(shape) <= len(other) and all(one in (1, size) for one, size in pairs)


def digest(tensors: Iterable[Tensor]) -> int:
    """A number that tells apart tensors of other shapes or other bits; the same in every process."""
    found = 0
    for tensor in tensors:
        flat = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
        flat = flat.to_dense().reshape(-1)
        flat = flat + 0.0 if flat.is_floating_point() else flat  # both zeros are one
        bits = flat.contiguous().view(INTEGERS[flat.element_size()]).long()
        places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
        found = zlib.crc32(repr((found, tuple(tensor.shape), int((bits * places).sum()))).encode())
    return found


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the size of their elements."""
