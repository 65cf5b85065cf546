"""R networks at once: classifiers and the weight net, with parameters that have a first dimension R."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bilevel as bl
from applications.frame.norm import ImageNorm

Params = dict[str, Tensor]


class Mlp(nn.Module):
    """Fully connected, ReLU between the layers: ``[R, n, sizes[0]]`` to ``[R, n, sizes[-1]]``."""

    def __init__(self, *sizes: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = bl.nn.linear(x.relu() if index else x, layer.weight, layer.bias)  # type: ignore[arg-type]
        return x


class ResNet32(nn.Module):
    """ResNet-32 for 32 x 32 images (He et al. 2016), identity shortcuts without parameters.

    Group norm of each image by itself in the place of batch norm, so that an example's loss does not depend on the
    weights of its neighbours, nor the test on running averages.
    """

    def __init__(self, num_classes: int, channels: int = 3, width: int = 16):
        super().__init__()
        self.first, self.norm = _convolution(channels, width, 1), ImageNorm(width)
        sizes = [(width, width, 1)] * 5 + [(width, 2 * width, 2)] + [(2 * width, 2 * width, 1)] * 4
        sizes += [(2 * width, 4 * width, 2)] + [(4 * width, 4 * width, 1)] * 4
        self.blocks = nn.ModuleList(_Block(*size) for size in sizes)
        self.head = Mlp(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[R, n, channels * 32 * 32]`` to ``[R, n, classes]``."""
        x = x.unflatten(-1, (-1, 32, 32))
        x = self.norm(bl.nn.conv2d(x, self.first.weight, padding=1)).relu()
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((-2, -1)))


class _Block(nn.Module):
    def __init__(self, channels: int, filters: int, stride: int):
        super().__init__()
        self.stride, self.more = stride, filters - channels
        self.first, self.first_norm = _convolution(channels, filters, stride), ImageNorm(filters)
        self.second, self.second_norm = _convolution(filters, filters, 1), ImageNorm(filters)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first_norm(bl.nn.conv2d(x, self.first.weight, None, self.stride, padding=1)).relu()
        y = self.second_norm(bl.nn.conv2d(y, self.second.weight, padding=1))
        shortcut = F.pad(
            x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2)
        )
        return (y + shortcut).relu()


def _convolution(channels: int, filters: int, stride: int) -> bl.nn.Conv2d:
    layer = bl.nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return layer


def stacked(make: Callable[[], nn.Module], repeats: int, seed: int, device: torch.device) -> tuple[nn.Module, Params]:
    """A module to call by `bl.nn.functional_call`, and the parameters of R random ones of its kind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = [make() for _ in range(repeats)]
    names = dict(modules[0].named_parameters())
    params = {name: torch.stack([dict(m.named_parameters())[name].detach() for m in modules]) for name in names}
    return modules[0].to(device), {name: value.to(device).requires_grad_() for name, value in params.items()}
