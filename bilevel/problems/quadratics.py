"""Quadratics of a chosen spectrum: positive definite, ill-conditioned, indefinite, singular."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import BilevelTestProblem, ClosedFormProblem, generator_of, randn


class Quadratics(ClosedFormProblem):
    """T quadratics of condition numbers of your choice, coupled by one hyperparameter vector ``[n]``.

    inner: ``1/2 y^T A_t y - (c_t + x)^T y``; outer: ``sum_t ||y_t - target||^2 / 2``.

    Args:
        conditions: one condition number for each problem; the smallest eigenvalue is 1.
        size: n.
    """

    def __init__(
        self,
        conditions: tuple[float, ...] = (1.0, 10.0, 100.0, 1e3, 1e4),
        size: int = 20,
        *,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ):
        generator = generator_of(seed, dtype, size=size)
        if not conditions or not all(1 <= condition < math.inf for condition in conditions):
            raise ValueError(f"conditions is {conditions}: one finite number of at least 1 for each problem is needed.")
        num_tasks = len(conditions)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

        basis, _ = torch.linalg.qr(randn(num_tasks, size, size))
        spectrum = torch.stack(
            [torch.logspace(0, math.log10(c), size, dtype=torch.float64, device="cpu") for c in conditions]
        )
        self.matrix: Tensor = (basis @ torch.diag_embed(spectrum) @ basis.mT).to(dtype)
        self.c, self.target = randn(num_tasks, size).to(dtype), randn(size).to(dtype)
        self.init, self.hparams = torch.zeros(num_tasks, size, dtype=dtype, device="cpu"), randn(size).to(dtype)

    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        product = (self.matrix @ params.unsqueeze(-1)).squeeze(-1)
        return (params * product).sum(-1) / 2 - ((self.c + hparams) * params).sum(-1)

    def outer(self, params: Tensor, hparams: Tensor) -> Tensor:
        return (params - self.target).square().sum() / 2

    def system(self, hparams: Tensor) -> tuple[Tensor, Tensor]:
        return self.matrix, self.c + hparams


class Saddle(ClosedFormProblem):
    """The stationary point of an indefinite quadratic, ``A y = c + x``: for MINRES and the direct solvers.

    A root with a symmetric Jacobian whose eigenvalues lie in [-3, -1] and [1, 3].
    """

    kind = "root"
    symmetric = True
    matrix_kind = "symmetric"

    def __init__(self, size: int = 12, *, dtype: torch.dtype = torch.float64, seed: int = 0):
        generator = generator_of(seed, dtype, size=size)
        basis, _ = torch.linalg.qr(randn(size, size, generator=generator))
        spectrum = torch.linspace(1, 3, size, dtype=torch.float64, device="cpu") * (-1) ** torch.arange(
            size, device="cpu"
        )
        self.matrix: Tensor = (basis @ torch.diag(spectrum) @ basis.mT).to(dtype)
        self.c, self.target = (randn(size, generator=generator).to(dtype) for _ in range(2))
        self.init, self.hparams = (
            torch.zeros(size, dtype=dtype, device="cpu"),
            randn(size, generator=generator).to(dtype),
        )

    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        return self.matrix @ params - self.c - hparams

    def outer(self, params: Tensor, hparams: Tensor) -> Tensor:
        return (params - self.target).square().sum() / 2

    def system(self, hparams: Tensor) -> tuple[Tensor, Tensor]:
        return self.matrix, self.c + hparams


class Singular(BilevelTestProblem):
    """A singular, consistent quadratic: ``1/2 (y - x)^T A (y - x)`` with A of deficient rank.

    Its minima are ``x`` plus the null space; from ``init = 0`` descent finds the one of least norm. The outer loss,
    ``||A y - t||^2 / 2``, does not see the null space, so the hypergradient is defined.
    """

    matrix_kind = "singular"

    def __init__(self, size: int = 12, rank: int = 8, *, dtype: torch.dtype = torch.float64, seed: int = 0):
        generator = generator_of(seed, dtype, size=size, rank=rank)
        if rank > size:
            raise ValueError(f"rank is {rank}: it is at most the size, {size}.")
        basis, _ = torch.linalg.qr(randn(size, size, generator=generator))
        basis = basis[:, :rank]
        self.matrix: Tensor = (
            basis @ torch.diag(torch.linspace(1, 3, rank, dtype=torch.float64, device="cpu")) @ basis.mT
        ).to(dtype)
        self.projector: Tensor = (basis @ basis.mT).to(dtype)
        self.target, self.hparams = (randn(size, generator=generator).to(dtype) for _ in range(2))
        self.init = torch.zeros(size, dtype=dtype, device="cpu")

    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        return (params - hparams) @ self.matrix @ (params - hparams) / 2

    def outer(self, params: Tensor, hparams: Tensor) -> Tensor:
        return (self.matrix @ params - self.target).square().sum() / 2

    def solution(self, hparams: Tensor) -> Tensor:
        """The minimum of least norm."""
        return self.projector @ hparams
