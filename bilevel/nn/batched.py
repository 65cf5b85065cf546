"""Custom functions of one network, or of T networks at once: `torch.vmap` over weights calls the latter."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from .._torch import (
    FunctionContext,
    TransformType,
    forward_grad_enabled,
    get_interpreter_stack,
    get_unwrapped,
    is_gradtrackingtensor,
    maybe_current_level,
    maybe_get_level,
)


class BatchedFunction(Function):
    """Operands are those of one network, of as many dimensions as ``ranks`` says, or all have a first dimension T.

    Arguments that are no tensors come last; they are kept as ``ctx.settings``.
    """

    ranks: ClassVar[tuple[int, ...]]

    def __init_subclass__(cls) -> None:
        if "forward" in cls.__dict__:  # PyTorch asks for it in every call
            cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
        if "jvp" in cls.__dict__:
            cls.jvp = staticmethod(_nesting(cls.jvp))  # type: ignore[method-assign]
        cls.vmap = staticmethod(lambda *args: _vmap(cls, *args))  # type: ignore[method-assign]

    @staticmethod
    def setup_context(ctx: FunctionContext, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.settings = inputs[len(tensors) :]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)


class BilinearFunction(BatchedFunction):
    """Linear in each of its two operands."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.jvp = staticmethod(_nesting(lambda *args: _bilinear_jvp(cls, *args)))  # type: ignore[method-assign]


def check_tensors(name: str, **operands: object) -> None:
    """Raise a TypeError where an operand of a layer is no tensor, naming it."""
    for key, value in operands.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} was given {key} of type {type(value).__name__}: a tensor is needed.")


def check_operands(name: str, shapes: dict[str, tuple[Tensor, tuple[int | None, ...]]]) -> None:
    """Raise where the operands of a layer disagree.

    Args:
        name: of the layer. shapes: under each operand's name, itself and its shape; None: any number.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message names all of them.
    """
    first, _ = next(iter(shapes.values()))
    autocast = torch.is_autocast_enabled(first.device.type)
    for key, (tensor, wanted) in shapes.items():
        if tensor.dim() != len(wanted) or any(w not in (None, s) for s, w in zip(tensor.shape, wanted, strict=True)):
            needed = ", ".join("any" if size is None else str(size) for size in wanted)
            raise ValueError(
                f"{name} was given {_listed(shapes, 'shape')}: {key} of shape ({needed}) is needed to go with the "
                "others. All operands are those of one network, or all have the same first dimension T, the number of "
                "networks."
            )
        for what in ("device",) if autocast else ("device", "dtype"):
            if getattr(tensor, what) != getattr(first, what):
                raise ValueError(f"{name} was given {_listed(shapes, what)}: convert them to one {what}.")


def check_real(name: str, shapes: dict[str, tuple[Tensor, Any]]) -> None:
    """Raise where operands are complex, or integers.

    Raises:
        TypeError: the message names the dtypes of all.
    """
    if not all(tensor.is_floating_point() for tensor, _ in shapes.values()):
        raise TypeError(
            f"{name} was given {_listed(shapes, 'dtype')}: real operands of floating point are needed. Give real "
            "and imaginary parts as channels of their own."
        )


def _listed(shapes: dict[str, tuple[Tensor, Any]], what: str) -> str:
    found = {key: getattr(tensor, what) for key, (tensor, _) in shapes.items()}
    return ", ".join(f"{key} {tuple(value) if what == 'shape' else value}" for key, value in found.items())


def per_channel(values: Tensor) -> Tensor:
    """For images: ``[*T, c] -> [*T, 1, c, 1, 1]``"""
    return values.reshape(*values.shape[:-1], 1, -1, 1, 1)


def _vmap(cls: type[BatchedFunction], info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
    size, count = info.batch_size, len(cls.ranks)
    tensors = [
        tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(inputs[:count], in_dims[:count], strict=True)
    ]
    nested = any(tensor.dim() == rank + 2 for tensor, rank in zip(tensors, cls.ranks, strict=True))
    if nested:  # of two vmaps
        inner = next(t.shape[1] for t, rank in zip(tensors, cls.ranks, strict=True) if t.dim() == rank + 2)
        tensors = [
            (t if t.dim() == rank + 2 else t.unsqueeze(1).expand(size, inner, *t.shape[1:])).flatten(0, 1)
            for t, rank in zip(tensors, cls.ranks, strict=True)
        ]
    out = cls.apply(*tensors, *inputs[count:])
    single = isinstance(out, Tensor)
    parts = [part.unflatten(0, (size, -1)) if nested else part for part in ((out,) if single else out)]
    return (parts[0], 0) if single else (tuple(parts), (0,) * len(parts))


def _bilinear_jvp(cls: type[Function], ctx: FunctionContext, ta: Tensor | None, tb: Tensor | None, *_: None) -> Tensor:
    a, b = ctx.saved_tensors
    terms: list[Tensor] = []
    if ta is not None:
        terms.append(cls.apply(ta, b, *ctx.settings))
    if tb is not None:
        terms.append(cls.apply(a, tb, *ctx.settings))
    return sum(terms[1:], terms[0])


def _nesting(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """A ``jvp`` that is right in forward mode over forward mode as well (jacfwd of jacfwd, jvp of jvp).

    PyTorch turns forward mode off inside of a ``jvp``, at all levels, so that the derivative of an outer level is
    silently zero. Here it stays on, and what belongs to the level at hand is taken off its dual numbers instead.
    """

    @functools.wraps(jvp)
    def nesting(ctx: FunctionContext, *tangents: Any) -> Any:
        stack = get_interpreter_stack() or []
        if sum(interpreter.key() == TransformType.Jvp for interpreter in stack) < 2:
            return jvp(ctx, *tangents)
        with forward_grad_enabled():
            return jvp(_Below(ctx), *(_below(tangent) for tangent in tangents))

    return nesting


class _Below:
    """The context of a function, with what it saved as it is below the level at hand."""

    def __init__(self, ctx: FunctionContext):
        self._ctx = ctx
        self.saved_tensors = tuple(_below(tensor) for tensor in ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _below(tensor: Any) -> Any:
    """The primal of a dual number of the innermost transform."""
    dual = isinstance(tensor, Tensor) and is_gradtrackingtensor(tensor)
    return get_unwrapped(tensor) if dual and maybe_get_level(tensor) == maybe_current_level() else tensor
