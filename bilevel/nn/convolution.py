"""A 2-d convolution whose derivatives of every order are convolutions again, for one network or a batch of networks.

PyTorch differentiates the backward pass of a convolution through transposed convolutions with kernels as large as the
image, so a Hessian product costs many gradients. With ``<g, x * w>`` the trilinear form of a convolution, its three
partial maps (the output, the gradient of the input, the gradient of the weight) are each other's derivatives: three
kernels serve every order, and a Hessian product costs two gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from .._torch import FunctionContext
from . import kernels
from .batched import BilinearFunction, check_operands, check_real, check_tensors, per_channel
from .kernels import Geometry, Pair, checked_geometry


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int | Pair = 1, padding: int | Pair = 0
) -> Tensor:
    """`torch.nn.functional.conv2d` made for Hessian products: the same values, derivatives of any order.

    T networks at once, all operands with a first dimension T or under `torch.vmap` over weights, are convolved by the
    kernel that is fastest for their shapes: on a GPU as measured at the first call, on a CPU grouped convolution or
    what `choose_kernels` has measured. On a CPU the output is in the channels-last layout.

    Args:
        x: images ``[n, channels, height, width]``. weight: ``[filters, channels, kernel, kernel]``.
        bias: ``[filters]``. stride, padding: one number, or one for each direction.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or stride and padding are no whole numbers.
        TypeError: operands are complex, or integers.
    """
    if has_torch_function((x, weight)):  # closure conversion has to see the operands
        return handle_torch_function(conv2d, (x, weight), x, weight, bias, stride, padding)
    check_convolution("conv2d", x, weight, bias)
    geometry = checked_geometry(stride, padding)
    if torch.is_autocast_enabled(x.device.type):
        low = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(low), weight.to(low), None if bias is None else bias.to(low)
    if x.device.type == "cpu":  # once for all kernels that read it
        weight = weight.movedim(-3, -1).contiguous().movedim(-1, -3)
    y: Tensor = _Output.apply(x, weight, geometry)
    return y if bias is None else y + per_channel(bias)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` by `conv2d`: the same parameters and values; no groups, dilation or other padding."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        bias: bool = True,
    ):
        stride, padding = checked_geometry(stride, padding)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]


class _Output(BilinearFunction):
    """``x [n, c, h, w], weight [o, c, k, k] -> [n, o, h', w']``, all with T in front or none."""

    ranks = (4, 4)

    @staticmethod
    def forward(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return kernels.output(x, weight, geometry)

    @staticmethod
    def backward(ctx: FunctionContext, g: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (geometry,) = ctx.saved_tensors, ctx.settings
        gx = _Input.apply(g, weight, geometry, x.shape[-2:]) if ctx.needs_input_grad[0] else None
        gw = _Weight.apply(x, g, geometry, weight.shape[-2:]) if ctx.needs_input_grad[1] else None
        return gx, gw, None


class _Input(BilinearFunction):
    """``g [n, o, h', w'], weight [o, c, k, k] -> [n, c, h, w]``"""

    ranks = (4, 4)

    @staticmethod
    def forward(g: Tensor, weight: Tensor, geometry: Geometry, size: Pair) -> Tensor:
        return kernels.input(g, weight, geometry, size)

    @staticmethod
    def backward(ctx: FunctionContext, x: Tensor) -> tuple[Tensor | None, ...]:
        (g, weight), (geometry, _) = ctx.saved_tensors, ctx.settings
        gg = _Output.apply(x, weight, geometry) if ctx.needs_input_grad[0] else None
        gw = _Weight.apply(x, g, geometry, weight.shape[-2:]) if ctx.needs_input_grad[1] else None
        return gg, gw, None, None


class _Weight(BilinearFunction):
    """``x [n, c, h, w], g [n, o, h', w'] -> [o, c, k, k]``"""

    ranks = (4, 4)

    @staticmethod
    def forward(x: Tensor, g: Tensor, geometry: Geometry, size: Pair) -> Tensor:
        return kernels.weight(x, g, geometry, size)

    @staticmethod
    def backward(ctx: FunctionContext, weight: Tensor) -> tuple[Tensor | None, ...]:
        (x, g), (geometry, _) = ctx.saved_tensors, ctx.settings
        gx = _Input.apply(g, weight, geometry, x.shape[-2:]) if ctx.needs_input_grad[0] else None
        gg = _Output.apply(x, weight, geometry) if ctx.needs_input_grad[1] else None
        return gx, gg, None, None


def check_convolution(name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Raise where images ``[*T, n, channels, height, width]`` and filters do not belong together."""
    check_tensors(name, x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    tasks = tuple(x.shape[:1]) if x.dim() == 5 else ()
    images = (*tasks, *[None] * 4)
    filters = weight.shape[-4] if weight.dim() >= 4 else None
    channels = x.shape[-3] if x.dim() >= 4 else None
    shapes = {"x": (x, images), "weight": (weight, (*tasks, None, channels, None, None))}
    if bias is not None:
        shapes["bias"] = bias, (*tasks, filters)
    check_operands(name, shapes)
    check_real(name, shapes)
