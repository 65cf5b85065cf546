"""Three ways to convolve T networks, each with its own images and weights; which is fastest depends on the device.

Each has ``output``, ``input`` and ``weight``: the three partial maps of the trilinear form of a convolution.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Sequence
from numbers import Integral
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..recording import recording

Pair = tuple[int, int]
Geometry = tuple[Pair, Pair]
"""Stride and padding."""

KernelName = Literal["loop", "grouped", "unfold"]


class Kernels(Protocol):
    """``x [T, n, c, h, w]``, ``weight [T, o, c, k, k]``, ``g [T, n, o, h', w']``."""

    def output(self, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor: ...

    def input(self, g: Tensor, weight: Tensor, geometry: Geometry, size: Pair) -> Tensor: ...

    def weight(self, x: Tensor, g: Tensor, geometry: Geometry, size: Pair) -> Tensor: ...


class Loop:
    """Network by network in the channels-last layout: what oneDNN does best, at more than the rate of a matmul."""

    def output(self, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return _stacked([output(a, w, geometry) for a, w in zip(x, weight, strict=True)])

    def input(self, g: Tensor, weight: Tensor, geometry: Geometry, size: Pair) -> Tensor:
        return _stacked([input(a, w, geometry, size) for a, w in zip(g, weight, strict=True)])

    def weight(self, x: Tensor, g: Tensor, geometry: Geometry, size: Pair) -> Tensor:
        return torch.stack([weight(a, b, geometry, size) for a, b in zip(x, g, strict=True)])


class Grouped:
    """One convolution with T groups, the networks side by side in the channels: no copies where they lie so already."""

    def output(self, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        y = F.conv2d(_layout(side_by_side(x)), weight.flatten(0, 1), None, *geometry, 1, len(x))
        return apart(y, len(x))

    def input(self, g: Tensor, weight: Tensor, geometry: Geometry, size: Pair) -> Tensor:
        tasks, filters = len(g), weight.flatten(0, 1)
        like = empty_images(g.shape[1], tasks * weight.shape[2], size, g)
        return apart(_backward(_layout(side_by_side(g)), like, filters, geometry, 0, tasks), tasks)

    def weight(self, x: Tensor, g: Tensor, geometry: Geometry, size: Pair) -> Tensor:
        tasks, filters = len(x), g.shape[2]
        like = empty_images(tasks * filters, x.shape[2], size, g)
        sides = _layout(side_by_side(g)), _layout(side_by_side(x))
        grad: Tensor = _backward(*sides, like, geometry, 1, tasks).unflatten(0, (tasks, filters))
        return grad


class Unfold:
    """Patches as a matrix, and one batched matrix product."""

    def output(self, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        columns = self._columns(x, weight.shape[-2:], geometry)
        y = weight.flatten(2).unsqueeze(1) @ columns
        stride, padding = geometry
        height = (x.shape[-2] + 2 * padding[0] - weight.shape[-2]) // stride[0] + 1
        images: Tensor = y.unflatten(-1, (height, -1))
        return images

    def input(self, g: Tensor, weight: Tensor, geometry: Geometry, size: Pair) -> Tensor:
        columns = weight.flatten(2).mT.unsqueeze(1) @ g.flatten(3)
        stride, padding = geometry
        x = F.fold(columns.flatten(0, 1), size, weight.shape[-2:], stride=stride, padding=padding)
        images: Tensor = x.unflatten(0, g.shape[:2])
        return images

    def weight(self, x: Tensor, g: Tensor, geometry: Geometry, size: Pair) -> Tensor:
        columns = self._columns(x, size, geometry)
        grad = g.flatten(3).transpose(1, 2).flatten(2) @ columns.transpose(1, 2).flatten(2).mT
        return grad.reshape(len(x), g.shape[2], x.shape[2], *size)

    def _columns(self, x: Tensor, kernel: Sequence[int], geometry: Geometry) -> Tensor:
        stride, padding = geometry
        columns = F.unfold(x.flatten(0, 1), tuple(kernel), stride=stride, padding=padding)
        patches: Tensor = columns.unflatten(0, x.shape[:2])
        return patches


KERNELS: dict[KernelName, Kernels] = {"loop": Loop(), "grouped": Grouped(), "unfold": Unfold()}

MapName = Literal["output", "input", "weight"]

MEASURED = {"cuda"}
"""Types of devices where the first call with operands of some shapes measures all kernels."""

DEFAULT: KernelName = "grouped"
"""What is taken where nothing has been measured."""

_fastest: dict[Hashable, KernelName] = {}
"""By map, device, dtype, shapes and strides."""


def output(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """``x * weight`` of one network, or of T by the fastest kernel."""
    if x.dim() == 5:
        return _of_tasks("output", x, weight, geometry)
    return F.conv2d(_layout(x), weight, None, *geometry)


def input(g: Tensor, weight: Tensor, geometry: Geometry, size: Pair) -> Tensor:
    """The gradient of x, images of ``size``."""
    if g.dim() == 5:
        return _of_tasks("input", g, weight, geometry, size)
    like = empty_images(len(g), weight.shape[1], size, g)
    return _backward(_layout(g), like, weight, geometry, 0)


def weight(x: Tensor, g: Tensor, geometry: Geometry, size: Pair) -> Tensor:
    """The gradient of the weight, kernels of ``size``."""
    if x.dim() == 5:
        return _of_tasks("weight", x, g, geometry, size)
    like = empty_images(g.shape[1], x.shape[1], size, g)
    return _backward(_layout(g), _layout(x), like, geometry, 1)


def checked_geometry(stride: int | Pair, padding: int | Pair) -> Geometry:
    """Stride and padding as pairs."""
    pairs = []
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0)):
        pair = (value, value) if isinstance(value, Integral) else value
        if (
            not isinstance(pair, tuple | list)
            or len(pair) != 2
            or not all(isinstance(v, Integral) and v >= least for v in pair)
        ):
            raise ValueError(f"{name} is {value!r}: a whole number of at least {least} is needed, or a pair of them.")
        pairs.append((int(pair[0]), int(pair[1])))
    return pairs[0], pairs[1]


def choose_kernels(
    x: Tensor, weight: Tensor, geometry: tuple[int | Pair, int | Pair], repeats: int = 5
) -> dict[MapName, dict[KernelName, float]]:
    """Measure all kernels on such operands; for operands of these shapes the fastest are taken from now on.

    On a GPU every map does this by itself the first time, so that it is for CPUs.

    Args:
        x: ``[T, n, c, h, w]``. weight: ``[T, o, c, k, k]``. geometry: stride and padding. repeats: runs of each.

    Returns:
        For ``"output"``, and for the gradients of ``"input"`` and ``"weight"``, the seconds of each kernel.

    Raises:
        ValueError: shapes without T, which have no choice of kernels; a bad geometry; no repeats.
    """
    geometry = checked_geometry(*geometry)
    if x.dim() != 5 or weight.dim() != 5:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}: [T, n, c, h, w] and [T, o, c, k, k] are needed. "
            "Without T there is nothing to choose: PyTorch's own kernels are taken."
        )
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: at least one run is needed.")
    y = output(x, weight, geometry)
    image, filters = (x.shape[-2], x.shape[-1]), (weight.shape[-2], weight.shape[-1])
    return {
        "output": _measure("output", x, weight, geometry, repeats=repeats),
        "input": _measure("input", y, weight, geometry, image, repeats=repeats),
        "weight": _measure("weight", x, y, geometry, filters, repeats=repeats),
    }


def _of_tasks(name: MapName, a: Tensor, b: Tensor, *settings: Any) -> Tensor:
    key = _key(name, a, b, settings)
    measures = a.device.type in MEASURED and not recording() and not torch.are_deterministic_algorithms_enabled()
    if key not in _fastest and measures:
        _measure(name, a, b, *settings)
    # A choice by the clock is another one tomorrow.
    kernel = DEFAULT if torch.are_deterministic_algorithms_enabled() else _fastest.get(key, DEFAULT)
    result: Tensor = getattr(KERNELS[kernel], name)(a, b, *settings)
    return result


def _measure(name: MapName, a: Tensor, b: Tensor, *settings: Any, repeats: int = 5) -> dict[KernelName, float]:
    """Seconds of each kernel, the least of a few; the fastest is kept. One that runs out of memory takes for ever."""

    def clock(kernels: Kernels) -> float:
        begin = time.perf_counter()
        getattr(kernels, name)(a, b, *settings)
        if a.is_cuda:
            # Of this stream: another thread may be recording, when the device must not be waited for.
            torch.cuda.current_stream(a.device).synchronize()
        return time.perf_counter() - begin

    def best(kernels: Kernels) -> float:
        try:
            return min([clock(kernels) for _ in range(repeats + 1)][1:])
        except torch.OutOfMemoryError:  # patches are k^2 times the images
            return math.inf

    seconds = {kernel: best(kernels) for kernel, kernels in KERNELS.items()}
    if min(seconds.values()) == math.inf:
        return seconds
    _fastest[_key(name, a, b, settings)] = min(seconds, key=lambda kernel: seconds[kernel])
    return seconds


def _key(name: MapName, a: Tensor, b: Tensor, settings: tuple[Any, ...]) -> Hashable:
    return name, a.device, a.dtype, a.shape, a.stride(), b.shape, b.stride(), settings


def _layout(x: Tensor) -> Tensor:
    """Images ``[n, c, h, w]``, on a CPU channels last, by their strides too where one channel makes both the same."""
    if x.device.type != "cpu":
        return x
    n, c, h, w = x.shape
    strides = (h * w * c, 1, w * c, c)
    if x.stride() == strides:
        return x
    return x.contiguous(memory_format=torch.channels_last).as_strided((n, c, h, w), strides)


def _backward(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, index: int, groups: int = 1) -> Tensor:
    """PyTorch's gradient of x (index 0) or weight (1); of the other only the shape and the layout count."""
    stride, padding = geometry
    mask = [index == 0, index == 1, False]
    grad: Tensor = torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, (1, 1), False, (0, 0), groups, mask
    )[index]
    return grad


def empty_images(n: int, c: int, size: Pair, like: Tensor) -> Tensor:
    """Images or filters in the layout of the device."""
    if like.device.type != "cpu":
        return like.new_empty(n, c, *size)
    return like.new_empty(n, *size, c).permute(0, 3, 1, 2)


def _stacked(images: list[Tensor]) -> Tensor:
    """``[T, n, c, h, w]``, channels last in memory."""
    n, c, h, w = images[0].shape
    out = images[0].new_empty(len(images), n, h, w, c).permute(0, 1, 4, 2, 3)
    for slot, image in zip(out, images, strict=True):
        slot.copy_(image)
    return out


def side_by_side(x: Tensor) -> Tensor:
    """``[T, n, c, h, w] -> [n, T c, h, w]``, a view where the networks lie side by side in memory."""
    return x.transpose(0, 1).flatten(1, 2)


def apart(x: Tensor, tasks: int) -> Tensor:
    """``[n, T c, h, w] -> [T, n, c, h, w]``, a view."""
    images: Tensor = x.unflatten(1, (tasks, -1)).transpose(0, 1)
    return images
