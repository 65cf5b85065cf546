"""Custom functions of one network, or of T networks at once: `torch.vmap` over weights calls the latter."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import Tensor
from torch.autograd import Function


class BatchedFunction(Function):
    """Operands are those of one network, of as many dimensions as ``ranks`` says, or all have a first dimension T.

    Arguments that are no tensors come last; they are kept as ``ctx.settings``.
    """

    ranks: ClassVar[tuple[int, ...]]

    def __init_subclass__(cls) -> None:
        if "forward" in cls.__dict__:  # PyTorch asks for it in every call
            cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
        cls.vmap = staticmethod(lambda *args: _vmap(cls, *args))  # type: ignore[method-assign]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.settings = inputs[len(tensors) :]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)


class BilinearFunction(BatchedFunction):
    """Linear in each of its two operands."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.jvp = staticmethod(lambda *args: _bilinear_jvp(cls, *args))  # type: ignore[assignment]


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


def _bilinear_jvp(cls: type[Function], ctx: Any, ta: Tensor | None, tb: Tensor | None, *_: None) -> Tensor:
    a, b = ctx.saved_tensors
    terms = []
    if ta is not None:
        terms.append(cls.apply(ta, b, *ctx.settings))
    if tb is not None:
        terms.append(cls.apply(a, tb, *ctx.settings))
    return sum(terms[1:], terms[0])
