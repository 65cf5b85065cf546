"""Closure conversion: the tensors that a function reaches, found by running it, and swapped for others.

`torch.func` differentiates towards arguments only, autograd towards everything that a function captured. `record`
finds the captured tensors and `Closure` makes them arguments, so that both see the same hyperparameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, maybe_current_level, maybe_get_level
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .tree import Tree, leaves


def in_transform() -> bool:
    """Whether a `torch.func` transform is being traced around the caller."""
    return maybe_current_level() is not None


class Recorder(TorchFunctionMode):
    """Finds the tensors that the operations under it read and none of them made, where a derivative may ask for them.

    Those are: tensors that require grad, tensors of a transform that is already open, and dual numbers. Operands of
    a custom `torch.autograd.Function` and of compiled code are not seen; `problem.refuse_hidden` finds those.
    """

    def __init__(self) -> None:
        super().__init__()
        self.level = maybe_current_level() or 0
        # A captured tensor outlives the recording, so the id of one that was made meanwhile is never its id.
        self.made: set[int] = set()
        self.found: dict[int, Tensor] = {}
        self.born = _sequence_number()

    def know(self, params: Sequence[Tensor]) -> None:
        """These are arguments, not captured."""
        self.made.update(id(tensor) for tensor in params)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            if id(tensor) not in self.made and id(tensor) not in self.found and self._matters(tensor):
                self.found[id(tensor)] = tensor
        out = func(*args, **kwargs)
        self.made.update(id(tensor) for tensor in _tensors(out) if id(tensor) not in self.found)
        return out

    @property
    def captured(self) -> list[Tensor]:
        return list(self.found.values())

    @property
    def resolved(self) -> list[Tensor]:
        """What stands for the captured tensors here: other tensors where an outer `Substitute` put them."""
        return [_resolve(tensor) for tensor in self.captured]

    def _matters(self, tensor: Tensor) -> bool:
        if is_functorch_wrapped_tensor(tensor) and maybe_get_level(tensor) > self.level:
            # Of a transform inside the function; or of one that is left, for which an outer `Substitute` stands in.
            tensor = _resolve(tensor)
        if is_functorch_wrapped_tensor(tensor):
            return maybe_get_level(tensor) <= self.level
        # What an operation out of sight made (of a custom Function, of compiled code) is younger than the recording.
        older = tensor.grad_fn is None or tensor.grad_fn._sequence_nr() < self.born
        return (tensor.requires_grad and older) or _is_dual(tensor)


class Substitute(TorchFunctionMode):
    """Lets operations that are given ``old[i]`` work on ``new[i]``."""

    def __init__(self, old: Sequence[Tensor], new: Sequence[Tensor]):
        super().__init__()
        self.new = {id(before): after for before, after in zip(old, new, strict=True)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.swap((args, kwargs or {}))
        return func(*args, **kwargs)

    def swap(self, tree: Tree) -> Tree:
        return pytree.tree_map_only(Tensor, lambda tensor: self.new.get(id(tensor), tensor), tree)


@dataclass(frozen=True)
class Autocast:
    """The autocast state of a device, to be entered again where a function is evaluated later."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def current(cls, device: torch.device) -> Autocast:
        kind = device.type
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        if self.enabled == torch.is_autocast_enabled(self.device) and not self.enabled:
            yield
            return
        # No cache: it would keep the casts of the parameters of every step.
        with torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False):
            yield


@dataclass(frozen=True)
class Closure:
    """``fn(params, *args)`` as a pure function of the leaves of ``params`` and of the tensors that it reaches.

    Attributes:
        spec: the tree of ``params``.
        captured: the tensors that are swapped, those in ``args`` among them.
    """

    fn: Callable[..., Any]
    spec: pytree.TreeSpec
    args: tuple[Any, ...]
    captured: list[Tensor]
    autocast: Autocast = field(repr=False)

    def __call__(self, params: Sequence[Tensor], tensors: Sequence[Tensor]) -> Any:
        mode = Substitute(self.captured, tensors)
        # Swapped by hand as well: a custom autograd Function is not seen by the mode.
        args = mode.swap(self.args)
        with mode, self.autocast.entered():
            return self.fn(pytree.tree_unflatten(list(params), self.spec), *args)


@dataclass(frozen=True)
class VmappedClosure:
    """A closure for B problems: every leaf of ``params`` has B first, tensors as ``in_dims`` says."""

    inner: Closure | VmappedClosure
    in_dims: tuple[int | None, ...]

    def __call__(self, params: Sequence[Tensor], tensors: Sequence[Tensor]) -> Any:
        swapped = torch.vmap(lambda p, t: self.inner(p, t), in_dims=(0, list(self.in_dims)))
        return swapped(list(params), list(tensors))


def _sequence_number() -> int:
    """Nodes of autograd graphs that are made from now on have at least this number."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).view(1).grad_fn
    assert node is not None
    return node._sequence_nr()


def _resolve(tensor: Tensor) -> Tensor:
    """The tensor itself, through an operation that an outer mode sees."""
    return tensor.to(tensor.dtype)


def _tensors(tree: Tree) -> list[Tensor]:
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def _is_dual(tensor: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
