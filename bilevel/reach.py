"""What the gradient of a solution reaches: each tensor with its shape, its dtype, and its name where one is known."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._torch import pytree

DEPTH = 6
"""How many functions, objects and containers deep a name is looked for."""


class Reached(NamedTuple):
    """A tensor that the problem used and its gradient flows to.

    Attributes:
        name: where the program has it: ``lam``, ``net.0.weight``, ``args[0]``, ``init['w']``; None where it is in no
            variable that the objective captured.
    """

    name: str | None
    shape: torch.Size
    dtype: torch.dtype


class Reach:
    """The tensors that a solve reached; named when asked, and not kept alive.

    Args:
        fn, args: what was evaluated. tensors: what it reached. named: more values, under their names, such as ``init``.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        tensors: Sequence[Tensor],
        named: dict[str, Any] | None = None,
    ):
        self._kinds = [(tensor.shape, tensor.dtype) for tensor in tensors]
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self._fn = _reference(fn)
        self._args = [
            (name, weakref.ref(leaf))
            for name, value in [*((f"args[{index}]", arg) for index, arg in enumerate(args)), *(named or {}).items()]
            for name, leaf in _named(name, value)
            if leaf.requires_grad
        ]
        self._listed: tuple[Reached, ...] | None = None

    @property
    def reaches(self) -> bool:
        """Whether there is any."""
        return bool(self._tensors)

    @classmethod
    def of(
        cls, fn: Callable[..., Any], init: Any, args: tuple[Any, ...], captured: Sequence[Tensor], to_init: bool
    ) -> Reach:
        """The reach of a solve from ``init``, which the gradient reaches by some methods."""
        start = [leaf for leaf in pytree.tree_leaves(init) if leaf.requires_grad] if to_init else []
        return cls(fn, args, [*captured, *start], {"init": init})

    def listed(self) -> tuple[Reached, ...]:
        """All of them, in the order in which they were met."""
        if self._listed is None:
            names = {id(leaf): name for name, ref in reversed(self._args) if (leaf := ref()) is not None}
            for name, tensor in _variables(self._fn(), DEPTH, set()):
                names.setdefault(id(tensor), name)
            found = [ref() for ref in self._tensors]
            self._listed = tuple(
                Reached(None if tensor is None else names.get(id(tensor)), *kind)
                for tensor, kind in zip(found, self._kinds, strict=True)
            )
        return self._listed

    def __getstate__(self) -> dict[str, Any]:
        return {"_listed": self.listed()}


def _reference(fn: Any) -> Callable[[], Any]:
    """A way to the function that does not keep it alive; a method is held by its object."""
    try:
        return weakref.WeakMethod(fn) if isinstance(fn, types.MethodType) else weakref.ref(fn)
    except TypeError:
        return lambda: None


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a tree, under their paths."""
    if isinstance(value, Tensor):
        yield name, value
        return
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        if isinstance(leaf, Tensor):
            yield name + pytree.keystr(path), leaf


def _variables(value: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in the variables of a function, and of the functions that it calls."""
    if depth == 0 or value is None or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, functools.partial):
        parts: dict[str, Any] = {
            "": value.func,
            **value.keywords,
            **{f"args[{i}]": a for i, a in enumerate(value.args)},
        }
    elif isinstance(value, types.MethodType):
        parts = {"": value.__func__, "self": value.__self__}
    elif isinstance(value, types.FunctionType):
        names = {name: value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__}
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        parts = names | {name: cell.cell_contents for name, cell in cells if _is_set(cell)}
    elif hasattr(value, "__dict__"):
        parts = dict(vars(value))
    else:
        return
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            yield from ((f"{name}.{inner}", parameter) for inner, parameter in part.named_parameters())
        elif isinstance(part, Tensor | dict | list | tuple):
            yield from _named(name, part)
        elif isinstance(part, functools.partial | types.MethodType | types.FunctionType):
            yield from _variables(part, depth - 1, seen)
        elif not isinstance(part, type | types.ModuleType) and hasattr(part, "__dict__"):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in _variables(part, depth - 1, seen))


def _names(code: types.CodeType) -> Iterator[str]:
    """The global names that a function reads, and those of the generators, comprehensions and lambdas in it."""
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _names(part)


def _is_set(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
