"""The curvature that a Krylov solver saw for free: the eigenvalues of its Lanczos matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import scipy
import torch
from torch import Tensor


@dataclass
class Lanczos:
    """The tridiagonal matrix of a Lanczos process, one for each problem, column by column as the solver makes it.

    Its eigenvalues (Ritz values) lie between the smallest and the largest eigenvalue of the operator and approach the
    outer ones first; a negative one proves negative curvature. With a preconditioner they are those of the
    preconditioned operator. Nothing is computed, and nothing leaves the device, before `ritz_values` is called.

    Attributes:
        like: a float64 tensor of the batch shape.
        diagonal, off_diagonal: one ``[*batch]`` float64 tensor for each step. valid: the steps that each problem made.
    """

    like: Tensor = field(repr=False)
    diagonal: list[Tensor] = field(default_factory=list, repr=False)
    off_diagonal: list[Tensor] = field(default_factory=list, repr=False)
    valid: list[Tensor] = field(default_factory=list, repr=False)

    def append(self, diagonal: Tensor, off_diagonal: Tensor, valid: Tensor) -> None:
        """One step: ``off_diagonal`` couples this one to the next."""
        self.diagonal.append(diagonal)
        self.off_diagonal.append(off_diagonal)
        self.valid.append(valid)

    def ritz_values(self) -> list[np.ndarray]:
        """All Ritz values of each problem (flattened over the batch), ascending."""
        count = self.like.numel()
        if not self.diagonal:
            return [np.empty(0)] * count
        diagonal, off, valid = (
            torch.stack(kept).reshape(-1, count).T.cpu().numpy()
            for kept in (self.diagonal, self.off_diagonal, self.valid)
        )
        return [_eigenvalues(d, o, v) for d, o, v in zip(diagonal, off, valid, strict=True)]

    def extremes(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest Ritz value of each problem, ``[*batch]`` float64; NaN where no step was made."""
        ends = [(v[0], v[-1]) if len(v) else (np.nan, np.nan) for v in self.ritz_values()]
        low, high = torch.tensor(ends, dtype=torch.float64, device=self.like.device).T
        return low.reshape(self.like.shape), high.reshape(self.like.shape)


def _eigenvalues(diagonal: np.ndarray, off_diagonal: np.ndarray, valid: np.ndarray) -> np.ndarray:
    diagonal, off_diagonal = diagonal[valid], off_diagonal[valid][:-1]
    usable = np.isfinite(diagonal)
    if not usable.all():
        first = int(np.argmin(usable))
        diagonal, off_diagonal = diagonal[:first], off_diagonal[: max(first - 1, 0)]
    if not len(diagonal):
        return np.empty(0)
    eigenvalues: np.ndarray = scipy.linalg.eigh_tridiagonal(diagonal, np.nan_to_num(off_diagonal), eigvals_only=True)
    return eigenvalues
