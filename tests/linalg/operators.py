"""Matrices and operators that tests of several solvers use."""

from __future__ import annotations

import math

import torch

from bilevel.linalg.operator import Dense
from tests.conformance import randn


class Counted(Dense):
    """Counts its products."""

    products = 0

    def matvec(self, v):
        self.products += 1
        return super().matvec(v)


class Rowwise(Dense):
    """A product that rounds in the same way alone and in a batch."""

    def matvec(self, v):
        return (self.matrix * v.unsqueeze(-2)).sum(-1)


class Broken(Counted):
    """Its products are not numbers."""

    def matvec(self, v):
        return super().matvec(v) * torch.nan


def symmetric(eigenvalues, seed=0):
    """A matrix with these eigenvalues."""
    basis = torch.linalg.qr(randn(len(eigenvalues), len(eigenvalues), seed=seed))[0]
    return basis @ torch.diag(eigenvalues) @ basis.mT


def indefinite(size=20, condition=100.0, seed=0):
    """A matrix with eigenvalues of both signs, of sizes 1/condition ... 1."""
    sizes = torch.logspace(-math.log10(condition), 0, size, dtype=torch.float64)
    return symmetric(torch.where(torch.arange(size) % 2 == 0, sizes, -sizes), seed)
