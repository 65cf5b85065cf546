"""Batch norm by batch statistics, and the max-pool after it: right in every mode of differentiation, and few passes.

PyTorch's fused batch norm gives silently wrong Hessian products under `torch.func` (issue 196699), and its
`torch.var_mean` takes many times longer than a pass over the memory on a CPU in the channels-last layout.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from .._torch import FunctionContext, in_dual_level, innermost, maybe_current_level
from ..recording import free_looks, recording
from .batched import BatchedFunction, check_operands, check_real, check_tensors, per_channel
from .convolution import check_convolution
from .kernels import Pair, apart, checked_geometry, empty_images, side_by_side


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    pool: int | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Normalise each channel by its mean and variance over the batch, scale and shift; then max-pool, where asked for.

    Derivatives of any order, in both modes. With ``pool``, three quarters of the map need no normalising: it rises
    with its input where the weight is positive, falls where it is negative, so the extremes are found before.

    Args:
        x: ``[n, c, h, w]``. weight, bias: ``[c]``; or all with a first dimension T. Of bfloat16 and float16, whose sums
            are too coarse, the result is float32.
        eps: added to the variance. pool: size of the windows of a max-pool, None for none.
        statistics: mean and variance of x, ``[c]`` each, where they are known: see `convolution_statistics`.

    On a GPU, where values are not looked at, gradients lose digits where a mean is thousands of deviations from zero.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``pool`` is no window.
        TypeError: operands are complex, or integers.
    """
    if has_torch_function((x, weight, bias)):  # closure conversion has to see the operands
        return handle_torch_function(batch_norm, (x, weight, bias), x, weight, bias, eps, pool, statistics)
    check_tensors("batch_norm", x=x, weight=weight, bias=bias)
    if isinstance(eps, bool) or not isinstance(eps, Real) or not 0 <= eps < math.inf:
        raise ValueError(f"eps is {eps!r}: a number is needed that is not negative.")
    x, weight, bias = (t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in (x, weight, bias))
    _check(x, weight, bias, pool, statistics)
    kept = x if pool is None else _extremes(x, weight, pool)
    if statistics is None:
        mean, rstd = _Statistics.apply(x, eps)
    else:
        mean, rstd = statistics[0], (statistics[1] + eps).rsqrt()
    out: Tensor = _Affine.apply(kept, mean, rstd, weight, bias)
    return out


def convolution_statistics(
    x: Tensor, weight: Tensor, stride: int | Pair = 1, padding: int | Pair = 0
) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of ``conv2d(x, weight, None, stride, padding)``, without a look at it.

    They are those of the patches, of which x has few channels' worth: ``w . mean`` and ``w . covariance w``. For the
    first layer of a network, whose output is its largest tensor, that saves most of the passes over it.

    Args:
        x: ``[n, channels, height, width]``. weight: ``[filters, channels, kernel, kernel]``; or both with T in front.

    Raises:
        ValueError: shapes, dtypes or devices do not fit. TypeError: operands are complex, or integers.
    """
    if has_torch_function((x, weight)):
        return handle_torch_function(convolution_statistics, (x, weight), x, weight, stride, padding)
    check_convolution("convolution_statistics", x, weight)
    stride, padding = checked_geometry(stride, padding)
    columns = F.unfold(x.flatten(0, -4), weight.shape[-2:], stride=stride, padding=padding)
    # In float64: the covariance of patches is nearly singular.
    columns = columns.unflatten(0, x.shape[:-3]).transpose(-3, -2).flatten(-2).double()
    middle = columns.mean(-1, keepdim=True)
    centred, filters = columns - middle, weight.flatten(-3).double()
    covariance = centred @ centred.mT / columns.shape[-1]
    mean, variance = (filters @ middle).squeeze(-1), (filters @ covariance * filters).sum(-1)
    return mean.to(x.dtype), variance.to(x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor, pool: int | None, statistics: tuple[Tensor, Tensor] | None) -> None:
    tasks = tuple(x.shape[:1]) if x.dim() == 5 else ()
    channels = (*tasks, x.shape[-3] if x.dim() >= 4 else None)
    shapes = {"x": (x, (*tasks, *[None] * 4)), "weight": (weight, channels), "bias": (bias, channels)}
    if statistics is not None:
        shapes |= {"mean": (statistics[0], channels), "variance": (statistics[1], channels)}
    check_operands("batch_norm", shapes)
    check_real("batch_norm", shapes)
    if pool is not None and not (
        isinstance(pool, Integral) and not isinstance(pool, bool) and 1 <= pool <= min(x.shape[-2:])
    ):
        raise ValueError(f"pool is {pool}: windows of 1 to {min(x.shape[-2:])} pixels fit into x {tuple(x.shape)}.")


class _Statistics(BatchedFunction):
    """``x -> mean, 1 / sqrt(variance + eps)``"""

    ranks = (4,)

    @staticmethod
    def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        mean = x.sum(PIXELS) / _count(x)
        centred = x - per_channel(mean)
        return mean, (centred.mul_(centred).sum(PIXELS) / _count(x) + eps).rsqrt_()

    @staticmethod
    def setup_context(ctx: FunctionContext, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], *output)
        ctx.save_for_forward(inputs[0], *output)

    @staticmethod
    def backward(ctx: FunctionContext, by_mean: Tensor, by_rstd: Tensor) -> tuple[Tensor, None]:
        x, mean, rstd = ctx.saved_tensors
        slope = by_rstd * rstd**3 / -_count(x)
        if _is_far(mean, rstd):
            return torch.addcmul(per_channel(by_mean / _count(x)), x - per_channel(mean), per_channel(slope)), None
        offset = per_channel(by_mean / _count(x) - slope * mean)
        by_x = x * per_channel(slope)
        return (by_x + offset if torch.is_grad_enabled() else by_x.add_(offset)), None

    @staticmethod
    def jvp(ctx: FunctionContext, tangent: Tensor, _: None) -> tuple[Tensor, Tensor]:
        x, mean, rstd = ctx.saved_tensors
        spread = ((x - per_channel(mean)) * tangent).sum(PIXELS)
        return tangent.sum(PIXELS) / _count(x), spread * rstd**3 / -_count(x)


class _Affine(BatchedFunction):
    """``(y - mean) * rstd * weight + bias``"""

    ranks = (4, 1, 1, 1, 1)

    @staticmethod
    def forward(y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        scale = rstd * weight
        return torch.addcmul(per_channel(bias - mean * scale), y, per_channel(scale))

    @staticmethod
    def backward(ctx: FunctionContext, g: Tensor) -> tuple[Tensor, ...]:
        y, mean, rstd, weight, _ = ctx.saved_tensors
        scale = rstd * weight
        by_bias = g.sum(PIXELS)
        if _is_far(mean, rstd):
            by_scale = (g * (y - per_channel(mean))).sum(PIXELS)
        else:  # a pass less
            by_scale = (g * y).sum(PIXELS) - mean * by_bias
        return g * per_channel(scale), -scale * by_bias, by_scale * weight, by_scale * rstd, by_bias

    @staticmethod
    def jvp(ctx: FunctionContext, *tangents: Tensor | None) -> Tensor:
        y, mean, rstd, weight, bias = ctx.saved_tensors
        ty, tm, tr, tw, tb = (
            torch.zeros_like(t) if tangent is None else tangent
            for t, tangent in zip((y, mean, rstd, weight, bias), tangents, strict=True)
        )
        scale = rstd * weight
        moved = (y - per_channel(mean)) * per_channel(tr * weight + rstd * tw)
        tangent: Tensor = ty * per_channel(scale) + moved + per_channel(tb - tm * scale)
        return tangent


def _is_far(mean: Tensor, rstd: Tensor) -> bool:
    """Whether a difference of two sums would have lost digits that the data have; never where a look is not free."""
    return free_looks(mean) and bool(innermost(mean.abs() * rstd > FAR).any())


FAR = 100.0
"""Standard deviations from zero."""

PIXELS = (-4, -2, -1)
"""Dimensions of images and pixels, which the statistics are over."""


def _count(x: Tensor) -> int:
    return x.shape[-4] * x.shape[-2] * x.shape[-1]


def _extremes(x: Tensor, weight: Tensor, size: int) -> Tensor:
    """In each window the largest entry, where the channel's weight is negative the smallest."""
    hidden = maybe_current_level() is not None or in_dual_level() or recording()
    if not hidden and x.device.type == "cpu" and not bool((weight < 0).any()):
        largest: Tensor = _Largest.apply(x, size)[0]
        return largest
    with torch.no_grad():
        signed = x * per_channel(torch.where(weight < 0, -1.0, 1.0).to(x.dtype))
        index = _pooled(signed, size)[1]
    taken: Tensor = _Take.apply(x, index, size)
    return taken


class _Largest(Function):
    """The largest entry of each window, and where it is."""

    @staticmethod
    def forward(ctx: FunctionContext, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        values, index = _pooled(x, size)
        ctx.shape, ctx.size = x.shape[-2:], size
        ctx.set_materialize_grads(False)  # zeros for the index
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(index)
        return values, index

    @staticmethod
    def backward(ctx: FunctionContext, g: Tensor | None, _: None) -> tuple[Tensor | None, None]:
        return (None if g is None else _Put.apply(g, *ctx.saved_tensors, ctx.shape, ctx.size)), None


class _Take(BatchedFunction):
    """The entries at an index."""

    ranks = (4, 4)

    @staticmethod
    def forward(x: Tensor, index: Tensor, size: int) -> Tensor:
        return _taken(x, index)

    @staticmethod
    def setup_context(ctx: FunctionContext, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, index, ctx.size = inputs
        ctx.shape = x.shape[-2:]
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)

    @staticmethod
    def backward(ctx: FunctionContext, g: Tensor) -> tuple[Tensor | None, ...]:
        return _Put.apply(g, *ctx.saved_tensors, ctx.shape, ctx.size), None, None

    @staticmethod
    def jvp(ctx: FunctionContext, tangent: Tensor, *_: None) -> Tensor:
        taken: Tensor = _Take.apply(tangent, *ctx.saved_tensors, ctx.size)
        return taken


class _Put(BatchedFunction):
    """Zeros, but for the entries at an index: the transpose of `_Take`."""

    ranks = (4, 4)

    @staticmethod
    def forward(g: Tensor, index: Tensor, shape: torch.Size, size: int) -> Tensor:
        images, places, window = _images(g), _images(index), [size, size]
        like = empty_images(images.shape[0], images.shape[1], (shape[0], shape[1]), g)  # only its shape counts
        out = torch.ops.aten.max_pool2d_with_indices_backward(
            images, like, window, window, [0, 0], [1, 1], False, places
        )
        return out if g.dim() == 4 else apart(out, len(g))

    @staticmethod
    def setup_context(ctx: FunctionContext, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, index, ctx.shape, ctx.size = inputs
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)

    @staticmethod
    def backward(ctx: FunctionContext, x: Tensor) -> tuple[Tensor | None, ...]:
        return _Take.apply(x, *ctx.saved_tensors, ctx.size), None, None, None

    @staticmethod
    def jvp(ctx: FunctionContext, tangent: Tensor, *_: None) -> Tensor:
        put: Tensor = _Put.apply(tangent, *ctx.saved_tensors, ctx.shape, ctx.size)
        return put


def _pooled(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    values, index = F.max_pool2d(_images(x), size, return_indices=True)
    return (values, index) if x.dim() == 4 else (apart(values, len(x)), apart(index, len(x)))


def _images(x: Tensor) -> Tensor:
    """Images of T networks, side by side in the channels."""
    return x if x.dim() == 4 else side_by_side(x)


def _taken(x: Tensor, index: Tensor) -> Tensor:
    taken: Tensor = x.flatten(-2).gather(-1, index.flatten(-2)).unflatten(-1, index.shape[-2:])
    return taken
