"""Random numbers made where they are needed: the same on every device, and nothing is copied from the host.

A generator of PyTorch gives other numbers on a GPU than on a CPU, and cannot be recorded by itself. These are the
hashes of a counter (splitmix64; Steele, Lea and Flood 2014), by integer arithmetic that all devices share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

GOLDEN, FIRST, SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""The odd constants of splitmix64, as signed numbers."""


def uniform(shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """In [0, 1), float64; other seeds give other numbers."""
    start = (seed * 0xD1342543DE82EF95 + 1) % 2**64
    counter = torch.arange(math.prod(shape), dtype=torch.int64, device=device)
    z = counter * GOLDEN + (start - 2**64 if start >= 2**63 else start)
    z = _mixed(_mixed(z, 30) * FIRST, 27) * SECOND
    return (_shifted(_mixed(z, 31), 11).double() * 2.0**-53).reshape(tuple(shape))


def normal(shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """Numbers of mean zero and variance one, float64 (Box and Muller 1958)."""
    first, second = uniform((2, *shape), seed, device)
    return (-2 * torch.log1p(-first)).sqrt() * torch.cos(2 * math.pi * second)


def signs(shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """1 or -1, float64."""
    return torch.where(uniform(shape, seed, device) < 0.5, 1.0, -1.0).double()


def _shifted(z: Tensor, by: int) -> Tensor:
    """To the right, without the sign."""
    moved: Tensor = (z >> by) & (2 ** (64 - by) - 1)
    return moved


def _mixed(z: Tensor, by: int) -> Tensor:
    return z ^ _shifted(z, by)
