"""Matrices and vectors of known kinds, float64, from a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def randn(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")


def spd(size: int, condition: float = 100.0, batch: Sequence[int] = (), seed: int = 0) -> Tensor:
    """Random symmetric positive definite matrices ``[*batch, n, n]`` with eigenvalues in [1/condition, 1]."""
    basis, _ = torch.linalg.qr(randn(*batch, size, size, seed=seed))
    spectrum = torch.logspace(-math.log10(condition), 0, size, dtype=torch.float64, device="cpu")
    matrix: Tensor = basis @ torch.diag(spectrum) @ basis.mT
    return matrix


def nonsymmetric(size: int, batch: Sequence[int] = (), seed: int = 0) -> Tensor:
    """``I - J`` with a random J of spectral norm 1/2: condition 3 at most, and Picard iterations contract."""
    gauss = randn(*batch, size, size, seed=seed)
    largest: Tensor = torch.linalg.matrix_norm(gauss, 2)[..., None, None]
    return torch.eye(size, dtype=torch.float64, device="cpu") - 0.5 * gauss / largest


def relative_error(found: Tensor, truth: Tensor) -> float:
    """``||found - truth|| / ||truth||``."""
    return float((found.detach() - truth.detach()).norm() / truth.detach().norm())
