"""Problems with a kink or a constraint: the lasso path, and a quadratic program."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..argmin import argmin
from ..inner.minimize import InnerSolver
from ..inner.proximal import ProximalGradient
from ..prox import L1, Simplex
from ..qp import quadratic_program
from ..solution import Solution
from .base import BilevelTestProblem, Kind, generator_of, randn


class LassoPath(BilevelTestProblem):
    """``||A y - b||^2 / 2m + exp(x) ||y||_1``; outer: squared error on validation data; x is one log-strength.

    The exact solution is that on its support with its signs, found by coordinate descent, and differentiated there
    (Bertrand et al. 2020).
    """

    kind: ClassVar[Kind] = "composite"
    matrix_kind = "composite"

    def __init__(
        self, num_examples: int = 40, num_features: int = 12, *, dtype: torch.dtype = torch.float64, seed: int = 0
    ):
        generator = generator_of(seed, dtype, num_examples=num_examples, num_features=num_features)
        truth = randn(num_features, generator=generator) * (
            torch.arange(num_features, device="cpu") < num_features // 3
        )
        designs = [randn(num_examples, num_features, generator=generator) for _ in range(2)]
        self.a_train, self.a_val = (a.to(dtype) for a in designs)
        self.b_train, self.b_val = ((a @ truth + randn(num_examples, generator=generator)).to(dtype) for a in designs)
        self.init, self.hparams = (
            torch.zeros(num_features, dtype=dtype, device="cpu"),
            torch.tensor(-1.5, dtype=dtype, device="cpu"),
        )

    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        return (self.a_train @ params - self.b_train).square().mean() / 2

    def outer(self, params: Tensor, hparams: Tensor) -> Tensor:
        return (self.a_val @ params - self.b_val).square().mean() / 2

    def residual(self, params: Tensor, hparams: Tensor) -> Tensor:
        gradient = torch.func.grad(self.inner)(params, hparams)
        return params - L1(hparams.exp()).prox(params - gradient, 1.0)

    def solution(self, hparams: Tensor) -> Tensor:
        signs = self._descended(hparams.detach()).sign().to(self.init.dtype)
        support = signs != 0
        reduced = self.a_train[:, support]
        right = reduced.mT @ self.b_train / len(self.b_train) - hparams.exp() * signs[support]
        found = torch.linalg.solve(reduced.mT @ reduced / len(self.b_train), right)
        return torch.zeros_like(self.init).masked_scatter(support, found)

    def solve_inner(self, hparams: Tensor, *, solver: InnerSolver | None = None, **settings: Any) -> Solution:
        """By proximal gradient descent."""
        tol = 1e-13 if self.init.dtype == torch.float64 else 1e-6
        return argmin(self.inner, self.init, hparams, solver=ProximalGradient(L1(hparams.exp()), tol=tol), **settings)

    def _descended(self, hparams: Tensor) -> Tensor:
        """Coordinate descent to rounding."""
        gram = (self.a_train.mT @ self.a_train / len(self.b_train)).double()
        right = (self.a_train.mT @ self.b_train / len(self.b_train)).double()
        y, strength = torch.zeros_like(right), float(hparams.exp())
        for _ in range(1000):
            last = y.clone()
            for j in range(len(y)):
                free = right[j] - gram[j] @ y + gram[j, j] * y[j]
                y[j] = torch.sign(free) * max(abs(float(free)) - strength, 0.0) / gram[j, j]
            if (y - last).norm() <= 1e-15 * y.norm():
                break
        return y


class Portfolio(BilevelTestProblem):
    """``min y'Q y / 2 - (gain + x)'y`` with ``sum y = 1 + t, y >= l``: a quadratic program.

    ``hparams = (x, t, l)``, ``[2 n + 1]``: the linear cost and both right-hand sides. The exact solution is that of its
    KKT system on the active set, found by enumeration.
    """

    kind: ClassVar[Kind] = "qp"
    matrix_kind = "qp"

    def __init__(self, size: int = 6, *, dtype: torch.dtype = torch.float64, seed: int = 0):
        generator = generator_of(seed, dtype, size=size)
        root = randn(size, size, generator=generator)
        self.risk = (root @ root.mT / size + torch.eye(size, dtype=torch.float64, device="cpu")).to(dtype)
        self.gain, self.target = ((0.3 * randn(size, generator=generator)).to(dtype) for _ in range(2))
        self.init, self.hparams = (
            torch.zeros(size, dtype=dtype, device="cpu"),
            torch.zeros(2 * size + 1, dtype=dtype, device="cpu"),
        )

    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        return params @ self.risk @ params / 2 - self._data(hparams)[0] @ params

    def outer(self, params: Tensor, hparams: Tensor) -> Tensor:
        return (params - self.target).square().sum() / 2

    def residual(self, params: Tensor, hparams: Tensor) -> Tensor:
        """``y - P(y - grad g(y))`` with the projection P onto the constraints."""
        _, total, low = self._data(hparams)
        moved = params - torch.func.grad(self.inner)(params, hparams)
        return params - low - Simplex(total - low.sum()).prox(moved - low, 1.0)

    def solution(self, hparams: Tensor) -> Tensor:
        size, best = len(self.init), None
        for code in range(1, 2**size):
            active = torch.tensor([bool(code >> i & 1) for i in range(size)], device="cpu")
            y, multipliers = self._on(active, hparams.detach())
            if bool((y >= self._data(hparams)[2]).all()) and bool((multipliers >= 0).all()):
                best = active
        assert best is not None
        return self._on(best, hparams)[0]

    def solve_inner(self, hparams: Tensor, *, solver: InnerSolver | None = None, **settings: Any) -> Solution:
        """By interior point; the value is the primal solution."""
        cost, total, low = self._data(hparams)
        ones = torch.ones_like(self.init)
        found = quadratic_program(self.risk, -cost, ones[None], total[None], -torch.diag(ones), -low, **settings)
        return found.with_value(found.value.primal)

    def _data(self, hparams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gains, the total and the lower bounds."""
        size = len(self.init)
        return self.gain + hparams[:size], 1 + hparams[size], hparams[size + 1 :]

    def _on(self, free: Tensor, hparams: Tensor) -> tuple[Tensor, Tensor]:
        """The solution where all but these are at their bounds, and the multipliers of those."""
        (cost, total, low), count = self._data(hparams), int(free.sum())
        ones = torch.ones(count, 1, dtype=self.risk.dtype, device=self.risk.device)
        top = torch.cat([self.risk[free][:, free], ones], 1)
        matrix = torch.cat([top, torch.cat([ones.mT, torch.zeros(1, 1, dtype=ones.dtype, device=ones.device)], 1)])
        bound = torch.where(free, 0, low)
        right = torch.cat([(cost - self.risk @ bound)[free], (total - bound.sum())[None]])
        found = torch.linalg.solve(matrix, right)
        y = bound.masked_scatter(free, found[:count])
        return y, (self.risk @ y - cost + found[count])[~free]
