"""Closure conversion: the tensors that a function reaches, found by running it, and swapped for others.

`torch.func` differentiates towards arguments only, autograd towards everything that a function captured. `Tracer`
finds the captured tensors and `Closure` makes them arguments, so that both see the same hyperparameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from ._torch import (
    _add_batch_dim,
    _wrap_for_grad,
    get_unwrapped,
    in_dual_level,
    is_batchedtensor,
    is_dead_tensor_wrapper,
    is_functorch_wrapped_tensor,
    maybe_current_level,
    maybe_get_bdim,
    maybe_get_level,
    num_function_modes,
    outside_transforms,
    pytree,
    sequence_number,
)
from .context import EVALUATING, UNCOMPILED
from .modules import Given, ModuleReads
from .solution import ObjectiveChangedError
from .spared import Copies, Spared, overlap, refuse_params, refuse_view, targets
from .tree import Tree, map_tensors, tensors


def in_transform() -> bool:
    """Whether a `torch.func` transform is being traced around the caller."""
    return maybe_current_level() is not None


Mode = TypeVar("Mode", bound="_UncompiledMode")


class _UncompiledMode(TorchFunctionMode):
    """Sees every operation, since compiled code runs as it was written meanwhile."""

    def __enter__(self: Mode) -> Mode:
        UNCOMPILED.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        UNCOMPILED.__exit__()


STAND_IN = "_bilevel_stand_in"
"""Marks the leaves that are nobody's hyperparameter: a problem made them, in the place of a point that needs no
gradient of its own, or the function itself did, for derivatives that it takes."""


class OwnLeaves(_UncompiledMode):
    """Marks the leaves that a function makes and differentiates towards, such as the inputs of a network.

    Attributes:
        differentiates: whether it made any, or took gradients of another kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.differentiates = False
        self._level = maybe_current_level() or 0
        self._made: set[int] = set()  # what was there before lives on, so that its ids are others

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.look(func, tensors((args, kwargs)), out)
        return out

    def look(self, func: Any, operands: Sequence[Tensor], out: Tree) -> None:
        """What an operation was given, and what it returned."""
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return
        if func is torch.autograd.grad or func is torch.autograd.backward:
            self.differentiates |= (maybe_current_level() or 0) == self._level  # torch.func calls them inside
        given = {id(tensor) for tensor in operands}
        found = [tensor for tensor in tensors(out) if id(tensor) not in given]
        self._made.update(id(tensor) for tensor in found)
        if name in ("requires_grad_", "__set__"):
            found += [tensor for tensor in operands[:1] if id(tensor) in self._made]
        for tensor in found:
            if tensor.requires_grad and tensor.is_leaf:
                setattr(tensor, STAND_IN, True)
                self.differentiates = True


class Tracer(_UncompiledMode):
    """Finds the tensors that the operations under it read and none of them made, where a derivative may ask for them.

    Those are: tensors that require grad, tensors of a transform that is already open, and dual numbers. Operands of
    a custom `torch.autograd.Function` and of compiled code are not seen; `problem.refuse_hidden` finds those.

    Args:
        differentiable: derivatives will be asked for.

    Attributes:
        spared: what later evaluations have to be kept from. reads: what modules read.
    """

    def __init__(self, differentiable: bool = True) -> None:
        super().__init__()
        self.differentiable = differentiable
        self.spared, self.reads = Spared(), ModuleReads()
        self._copies = Copies(self.spared)
        self._outside: dict[int, Tensor] = {}
        self._params: list[Tensor] = []
        self._own = OwnLeaves()
        self.level = maybe_current_level() or 0
        # A captured tensor outlives the trace, so the id of one that was made meanwhile is never its id.
        self.made: set[int] = set()
        self.found: dict[int, Tensor] = {}
        self.kept: list[Tensor] = []
        self.born = _sequence_number()

    def know(self, params: Sequence[Tensor]) -> None:
        """These are arguments, not captured."""
        self.made.update(id(tensor) for tensor in params)
        self._params += [tensor for tensor in params if not is_functorch_wrapped_tensor(tensor)]
        self.reads.know(params)

    def note(self, tree: Tree) -> None:
        """Arguments of the function."""
        self._note(tensors(tree))

    def _note(self, operands: Sequence[Tensor]) -> None:
        for tensor in operands:
            if id(tensor) in self.made:
                continue
            if id(tensor) not in self._outside:
                self._outside[id(tensor)] = tensor
                if not is_functorch_wrapped_tensor(tensor) and tensor.is_inference():
                    self._copies.read(tensor)
            if id(tensor) in self.found:
                continue
            if self._is_inner(tensor) and not self._is_stood_in_for(tensor):
                # Of a transform inside the function: what counts is the tensor that it wraps.
                tensor = _peeled(tensor, self.level)
            if id(tensor) not in self.made and id(tensor) not in self.found and self._matters(tensor):
                self.found[id(tensor)] = tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = tensors((args, kwargs))
        self._note(operands)
        self.reads.look(operands)
        for target in targets(func, args, kwargs):
            self._spare(target)
        args, kwargs = self._copies.swap((args, self._copies.dense(func, kwargs)))
        out = self._copies.returned(func(*args, **kwargs))
        self._own.look(func, operands, out)
        for tensor in tensors(out):
            if id(tensor) not in self.found and id(tensor) not in self._outside:
                self.made.add(id(tensor))
                if self.level and self._is_inner(tensor):
                    self.kept.append(_peeled(tensor, self.level))
                    self.made.add(id(self.kept[-1]))
        return out

    @property
    def captured(self) -> list[Tensor]:
        return list(self.found.values())

    @property
    def differentiates(self) -> bool:
        """Whether the function takes gradients itself, for which gradients have to be on."""
        return self._own.differentiates

    @property
    def read(self) -> frozenset[int]:
        """The ids of all tensors that operations read and none of them made."""
        return frozenset(self._outside)

    def has_read(self, tensor: Tensor) -> bool:
        """Whether an operation read this very tensor, which none of them made."""
        return id(tensor) in self._outside

    @property
    def resolved(self) -> list[Tensor]:
        """What stands for the captured tensors here: other tensors where an outer `Substitute` put them."""
        return [_resolve(tensor) for tensor in self.captured]

    def _spare(self, target: Tensor) -> None:
        """Let what is about to be written be a copy, where it was not made here.

        Raises:
            ValueError: it lies in the params, or is a part of a tensor from outside.
        """
        if any(overlap(target, params) for params in self._params):
            refuse_params(target)
        base = target._base if target._is_view() else None
        if target.requires_grad:
            return  # autograd has its own rules for these
        if id(target) in self._outside:
            self._copies.write(target)
        elif base is not None and id(base) in self._outside:
            refuse_view(base)

    def _is_inner(self, tensor: Tensor) -> bool:
        return is_functorch_wrapped_tensor(tensor) and maybe_get_level(tensor) > self.level

    def _is_stood_in_for(self, tensor: Tensor) -> bool:
        """Whether an outer `Substitute` stands in for it, as it does for tensors of a transform that is left."""
        return num_function_modes() > 0 and not self._is_inner(_resolve(tensor))

    def _matters(self, tensor: Tensor) -> bool:
        if self._is_inner(tensor):
            tensor = _resolve(tensor)
        if is_functorch_wrapped_tensor(tensor):
            return maybe_get_level(tensor) <= self.level
        # What an operation out of sight made (of a custom Function, of compiled code) is younger than the trace.
        older = tensor.grad_fn is None or sequence_number(tensor.grad_fn) < self.born
        return (tensor.requires_grad and older) or is_dual(tensor)


class Substitute(_UncompiledMode):
    """Lets operations that are given ``old[i]``, or a transform's wrapper of it, work on ``new[i]``.

    Args:
        spared: what else operations get copies of.

    Attributes:
        met: the ids of those among ``old`` that operations were given. parameters: others that they were given.
    """

    def __init__(self, old: Sequence[Tensor] = (), new: Sequence[Tensor] = (), spared: Spared | None = None):
        super().__init__()
        self.copies = Copies(spared or Spared())
        # A new one may wrap the old one: it stays as it is.
        self.new = {id(tensor): tensor for tensor in new} | self.copies.new
        self.new |= {id(before): after for before, after in zip(old, new, strict=True)}
        self.met: set[int] = set()
        self.parameters: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.copies.spared.written and in_transform():
            for target in targets(func, args, kwargs):
                if id(target) in self.copies.spared.written:
                    self.copies.write(target)
                    self.new[id(target)] = self.copies.new[id(target)]
        args, kwargs = self.swap((args, kwargs))
        if not self.copies.spared:
            return func(*args, **kwargs)
        return self.copies.returned(func(*args, **self.copies.dense(func, kwargs)))

    def swap(self, tree: Tree) -> Tree:
        return map_tensors(self._swapped, tree)

    def _swapped(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self.new:
            self.met.add(id(tensor))
            return self.new[id(tensor)]
        if type(tensor) is nn.Parameter:
            self.parameters.append(tensor)
            return tensor
        if not is_functorch_wrapped_tensor(tensor) or is_dead_tensor_wrapper(tensor):
            return tensor
        inside = get_unwrapped(tensor)
        new = self._swapped(inside)
        if new is inside:
            return tensor
        level = maybe_get_level(tensor)
        if is_batchedtensor(tensor):
            return _add_batch_dim(new, maybe_get_bdim(tensor), level)
        if tensor.requires_grad:
            raise NotImplementedError(
                f"The inner problem differentiates with torch.func towards a tensor of shape {tuple(tensor.shape)} "
                "that it captured: such a hyperparameter cannot be followed. Pass it to the solve as one of args."
            )
        return _wrap_for_grad(new, level)


def substituting(old: Sequence[Tensor], new: Sequence[Tensor]) -> contextlib.AbstractContextManager[object]:
    """A `Substitute`, or where every tensor stays as it is nothing: the mode costs time in every operation."""
    return _NOTHING if _unchanged(old, new) else Substitute(old, new)


def _unchanged(old: Sequence[Tensor], new: Sequence[Tensor]) -> bool:
    return all(before is after for before, after in zip(old, new, strict=True))


def sparing(spared: Spared) -> contextlib.AbstractContextManager[object]:
    """Around an evaluation that is kept from what was found in the first one."""
    return Substitute(spared=spared) if spared else _NOTHING


_NOTHING = contextlib.nullcontext()


@dataclass(frozen=True)
class Autocast:
    """The autocast state of a device, to be entered again where a function is evaluated later."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def current(cls, device: torch.device) -> Autocast:
        kind = device.type
        if not torch.amp.is_autocast_available(kind):
            return cls(kind, False, torch.float32)
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        if not self._is_needed():
            yield
            return
        # No cache: it would keep the casts of the parameters of every step.
        with torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False):
            yield

    def evaluating(self) -> contextlib.AbstractContextManager[object]:
        """Around an evaluation of what the user wrote."""
        return self._evaluating() if self._is_needed() else EVALUATING

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        with EVALUATING, self.entered():
            yield

    def _is_needed(self) -> bool:
        """Whether it is on, or on here where it shall be off."""
        return self.enabled or (torch.amp.is_autocast_available(self.device) and torch.is_autocast_enabled(self.device))


OTHER_PARAMETERS = (
    "The problem has changed since it was solved: evaluated again, it reads a parameter of a module in the place of a "
    "tensor of shape {shape} that it read first, so that the derivative towards that one would be missing. Something "
    "had put tensors into the module for the time of the solve, such as torch.nn.utils.parametrize.cached() or a "
    "context manager of your own: keep it open until the derivatives are taken, or pass the tensors to the solve as "
    "args."
)


@dataclass(frozen=True)
class Closure:
    """``fn(params, *args)`` as a pure function of the leaves of ``params`` and of the tensors that it reaches.

    Attributes:
        spec: the tree of ``params``.
        captured: the tensors that are swapped, those in ``args`` among them.
        spared: what evaluations are kept from.
        read: the ids of all tensors that the first evaluation read and did not make.
        differentiates: the function takes gradients itself.
        given: what functional calls around the solve have given to modules.
    """

    fn: Callable[..., Any]
    spec: pytree.TreeSpec
    args: tuple[Tree, ...]
    captured: list[Tensor]
    autocast: Autocast = field(repr=False)
    spared: Spared = field(default_factory=Spared, repr=False)
    read: frozenset[int] = field(default=frozenset(), repr=False)
    differentiates: bool = field(default=False, repr=False)
    given: tuple[Given, ...] = field(default_factory=Given.around, repr=False)

    @classmethod
    def traced(
        cls, fn: Callable[..., Any], spec: pytree.TreeSpec, args: tuple[Tree, ...], tracer: Tracer, device: torch.device
    ) -> Closure:
        """What a `Tracer` saw the first evaluation of."""
        autocast = Autocast.current(device)
        return cls(fn, spec, args, tracer.captured, autocast, tracer.spared, tracer.read, tracer.differentiates)

    def __call__(self, params: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tree:
        if self.differentiates and not torch.is_grad_enabled() and not in_transform():
            return without_graph(lambda point: self(point, tensors), params)
        substitute = None
        if _unchanged(self.captured, tensors):
            mode, args = sparing(self.spared), self.args
        else:
            mode = substitute = Substitute(self.captured, tensors, self.spared)
            # Swapped by hand as well: a custom autograd Function is not seen by the mode.
            args = substitute.swap(self.args)
        own = OwnLeaves() if self.differentiates else _NOTHING
        with UNCOMPILED, self.as_given(), mode, own, self.autocast.evaluating():
            found = self.fn(pytree.tree_unflatten(list(params), self.spec), *args)
        if substitute is not None:
            self._refuse_strangers(substitute)
        return found

    def as_given(self) -> contextlib.AbstractContextManager[object]:
        """Within, modules have what the functional calls around the solve have given them."""
        return self._as_given() if self.given else _NOTHING

    @contextlib.contextmanager
    def _as_given(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for given in self.given:
                stack.enter_context(given.again())
            yield

    def _refuse_strangers(self, substitute: Substitute) -> None:
        """Raise where a parameter was read in the place of a tensor that the first evaluation read."""
        strangers = {parameter.shape for parameter in substitute.parameters if id(parameter) not in self.read}
        if not strangers:
            return
        lost = [tensor for tensor in self.captured if id(tensor) not in substitute.met and tensor.shape in strangers]
        if lost:
            raise ObjectiveChangedError(OTHER_PARAMETERS.format(shape=tuple(lost[0].shape)))


def without_graph(fn: Callable[[list[Tensor]], Tree], params: Sequence[Tensor]) -> Tree:
    """The values of a function that takes gradients itself, perhaps by its params, where gradients are off."""
    with torch.enable_grad():
        found = fn([leaf.detach().requires_grad_() for leaf in params])
    return pytree.tree_map(torch.Tensor.detach, found)


@dataclass(frozen=True)
class VmappedClosure:
    """A closure for B problems: every leaf of ``params`` has B first, tensors as ``in_dims`` says."""

    inner: Closure | VmappedClosure
    in_dims: tuple[int | None, ...]

    @property
    def spec(self) -> pytree.TreeSpec:
        """The tree of ``params``."""
        return self.inner.spec

    def __call__(self, params: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tree:
        swapped = torch.vmap(lambda p, t: self.inner(p, t), in_dims=(0, list(self.in_dims)))
        return swapped(list(params), list(tensors))


def _sequence_number() -> int:
    """Nodes of autograd graphs that are made from now on have at least this number."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True, device="cpu").view(1).grad_fn
    assert node is not None
    return sequence_number(node)


def _resolve(tensor: Tensor) -> Tensor:
    """The tensor itself, through an operation that an outer mode sees."""
    return tensor.to(tensor.dtype)


def _peeled(tensor: Tensor, level: int) -> Tensor:
    """What transforms above ``level`` wrapped."""
    while is_functorch_wrapped_tensor(tensor) and maybe_get_level(tensor) > level:
        if is_dead_tensor_wrapper(tensor):
            return tensor
        tensor = get_unwrapped(tensor)
    return tensor


def is_dual(tensor: Tensor) -> bool:
    """Whether it is a dual number of the forward mode at hand."""
    if not in_dual_level():
        return False
    # Inside of a transform PyTorch shows no tangent of a tensor from outside.
    hidden = in_transform() and not is_functorch_wrapped_tensor(tensor)
    with outside_transforms() if hidden else _NOTHING:
        return forward_ad.unpack_dual(tensor).tangent is not None
