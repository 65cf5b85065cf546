"""Systems whose Jacobian is not symmetric."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import BilevelTestProblem, NewtonProblem, generator_of, randn


class LinearFixedPoint(BilevelTestProblem):
    """``z = W z + U x + b`` with ``||W|| = rate < 1``, not symmetric: a linear equilibrium model."""

    kind = "fixed_point"

    def __init__(self, size: int = 12, rate: float = 0.6, *, dtype: torch.dtype = torch.float64, seed: int = 0):
        generator = generator_of(seed, dtype, size=size)
        if not 0 <= rate < 1:
            raise ValueError(f"rate is {rate}: from 0 to less than 1 the map contracts, and has one fixed point.")
        weight = randn(size, size, generator=generator)
        self.weight: Tensor = (rate * weight / torch.linalg.matrix_norm(weight, 2)).to(dtype)
        self.input = randn(size, 4, generator=generator).to(dtype)
        self.bias, self.target = (randn(size, generator=generator).to(dtype) for _ in range(2))
        self.init, self.hparams = torch.zeros(size, dtype=dtype, device="cpu"), randn(4, generator=generator).to(dtype)

    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        return self.weight @ params + self.input @ hparams + self.bias

    def outer(self, params: Tensor, hparams: Tensor) -> Tensor:
        return (params - self.target).square().sum() / 2 + hparams.square().sum() / 2

    def solution(self, hparams: Tensor) -> Tensor:
        eye = torch.eye(len(self.bias), dtype=self.bias.dtype, device=self.bias.device)
        z: Tensor = torch.linalg.solve(eye - self.weight, self.input @ hparams + self.bias)
        return z


class NonSymmetricRoot(NewtonProblem):
    """``y + tanh(W y) + y^3 / 10 = x`` with a random W: smooth, nonlinear, not symmetric."""

    kind = "root"

    def __init__(self, size: int = 10, *, dtype: torch.dtype = torch.float64, seed: int = 0):
        generator = generator_of(seed, dtype, size=size)
        weight = randn(size, size, generator=generator)
        self.weight: Tensor = (0.8 * weight / torch.linalg.matrix_norm(weight, 2)).to(dtype)
        self.target = randn(size, generator=generator).to(dtype)
        self.init, self.hparams = (
            torch.zeros(size, dtype=dtype, device="cpu"),
            2 * randn(size, generator=generator).to(dtype),
        )

    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        return params + torch.tanh(self.weight @ params) + params.pow(3) / 10 - hparams

    def outer(self, params: Tensor, hparams: Tensor) -> Tensor:
        return (params - self.target).square().sum() / 2
