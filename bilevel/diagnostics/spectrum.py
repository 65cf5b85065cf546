"""What is seen of the eigenvalues of a Hessian or Jacobian: all of them where it is small, Ritz values where not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.minres import MINRES
from ..linalg.operator import Operator
from .checked import LARGEST_FACTORISED

RESOLVED = 100.0
"""Eigenvalues below so many roundings of the largest one are not told from zero, nor is their sign."""


@dataclass(frozen=True)
class Spectrum:
    """What was seen of the eigenvalues of a symmetric matrix, the worst over all problems of a batch.

    Attributes:
        smallest, largest: the ends.
        condition: the largest magnitude over the smallest, of one problem; at most ``1 / eps``, as products cannot
            tell more.
        steps: products spent. complete: all eigenvalues were computed; else these are Ritz values of a few Lanczos
            steps, which lie inside of the spectrum, so that ``condition`` is a lower bound.
        eps: rounding of the products, relative to the largest eigenvalue.
    """

    smallest: float
    largest: float
    condition: float
    steps: int
    complete: bool
    eps: float

    @property
    def indefinite(self) -> bool:
        """Whether negative curvature was seen, beyond rounding."""
        return self.smallest < -RESOLVED * self.eps * max(abs(self.smallest), abs(self.largest))

    @property
    def singular(self) -> bool:
        """Whether an eigenvalue was seen that rounding does not tell from zero."""
        return self.condition * RESOLVED * self.eps >= 1


def look(operator: Operator, b: Tensor, num_steps: int) -> tuple[Spectrum | None, float | None]:
    """The spectrum of a symmetric operator, and the condition number; of a large one that is not, neither.

    Args:
        b: where the Lanczos process starts, ``[*batch, n]``. num_steps: its steps.
    """
    eps = torch.finfo(operator.dtype).eps
    if operator.size <= LARGEST_FACTORISED:
        matrix = operator.to_dense().double()
        values = torch.linalg.svdvals(matrix)
        condition = float(_ratio(values[..., 0], values[..., -1], eps).max())
        if not operator.symmetric:
            return None, condition
        values = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
        return Spectrum(float(values.min()), float(values.max()), condition, operator.size, True, eps), condition
    if not operator.symmetric:
        return None, None
    found = MINRES(max_steps=num_steps).solve(operator, b)
    assert found.curvature is not None
    low, high = (end.nan_to_num(0.0) for end in found.curvature)
    ends = torch.stack([low.abs(), high.abs()])
    condition = float(_ratio(ends.amax(0), ends.amin(0), eps).max())
    steps = int(found.stats["num_steps"].max())
    return Spectrum(float(low.min()), float(high.max()), condition, steps, False, eps), condition


def _ratio(largest: Tensor, smallest: Tensor, eps: float) -> Tensor:
    """The condition numbers; infinite where there is no curvature at all."""
    return torch.where(largest > 0, largest / torch.maximum(smallest, eps * largest), math.inf)
