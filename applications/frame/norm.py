"""A norm that sees one image at a time, of one network or of T in one program."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ImageNorm(nn.Module):
    """Normalise every image by its own statistics over groups of channels: inductive, no image sees another."""

    def __init__(self, channels: int, groups: int = 8):
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, pool: int | None = None) -> Tensor:
        """Normalise, then max-pool where asked for."""
        normal = F.group_norm(x.flatten(0, -4), self.groups).unflatten(0, x.shape[:-3])
        return pooled(affine(normal, self.weight, self.bias), pool)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x [*T, n, channels, h, w]`` with a factor and a shift for each channel, ``[*T, channels]``."""
    return x * weight[..., None, :, None, None] + bias[..., None, :, None, None]


def pooled(x: Tensor, size: int | None) -> Tensor:
    """Max-pool of x over squares of this size; None: x."""
    return x if size is None else F.max_pool2d(x.flatten(0, -4), size).unflatten(0, x.shape[:-3])
