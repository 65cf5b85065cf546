"""Bilevel problems whose solution and hypergradient are known in closed form: the truth that methods are held to.

Each has ``init``, ``hparams``, ``inner(params, hparams)``, ``outer(params, hparams)``, and the exact ``solution``
and ``hypergradient`` at given hyperparameters, by dense linear algebra in the problem's own dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class ClosedFormProblem(ABC):
    """A quadratic inner problem, ``1/2 y^T A(x) y - c(x)^T y``, under an outer loss; T of them or one."""

    init: Tensor
    hparams: Tensor

    @abstractmethod
    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        """Inner loss(es) of the batch shape."""

    @abstractmethod
    def outer(self, params: Tensor, hparams: Tensor) -> Tensor:
        """Outer loss, a scalar."""

    @abstractmethod
    def system(self, hparams: Tensor) -> tuple[Tensor, Tensor]:
        """``A`` of shape ``[*batch, n, n]`` and ``c`` of shape ``[*batch, n]``, differentiable in hparams."""

    def solution(self, hparams: Tensor) -> Tensor:
        """``A^{-1} c``, ``[*batch, n]``."""
        matrix, c = self.system(hparams)
        return torch.linalg.solve(matrix, c.unsqueeze(-1)).squeeze(-1)

    def hypergradient(self, hparams: Tensor) -> Tensor:
        """The exact gradient of the outer loss, through the dense solve."""
        x = hparams.detach().clone().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(self.outer(self.solution(x), x), x)
        return grad


class Ridge(ClosedFormProblem):
    """Ridge regression with one log-penalty (0-d), or one for each feature (``[d]``): Bengio 2000.

    inner: ``||A y - b||^2 / 2m + sum exp(x) y^2 / 2`` on training data; outer: squared error on validation data.

    Args:
        num_examples, num_features: size of the training set; the validation set has as many examples.
        per_feature: a penalty for each feature.
        dtype, seed: of the data.
    """

    def __init__(
        self,
        num_examples: int = 40,
        num_features: int = 10,
        *,
        per_feature: bool = False,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        truth = randn(num_features)
        self.a_train, self.a_val = randn(num_examples, num_features), randn(num_examples, num_features)
        self.b_train = self.a_train @ truth + randn(num_examples)
        self.b_val = self.a_val @ truth + randn(num_examples)
        self.init = torch.zeros(num_features, dtype=dtype)
        self.hparams = 0.3 * randn(num_features) if per_feature else torch.zeros((), dtype=dtype)

    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        fit = (self.a_train @ params - self.b_train).square().mean() / 2
        return fit + (hparams.exp() * params.square()).sum() / 2

    def outer(self, params: Tensor, hparams: Tensor) -> Tensor:
        return (self.a_val @ params - self.b_val).square().mean() / 2

    def system(self, hparams: Tensor) -> tuple[Tensor, Tensor]:
        m, d = self.a_train.shape
        penalty = torch.diag(hparams.exp().expand(d))
        return self.a_train.mT @ self.a_train / m + penalty, self.a_train.mT @ self.b_train / m


class WeightedRidge(Ridge):
    """Ridge regression with a learned weight (its log) for each training example: data cleaning in miniature."""

    def __init__(
        self, num_examples: int = 40, num_features: int = 10, *, dtype: torch.dtype = torch.float64, seed: int = 0
    ):
        super().__init__(num_examples, num_features, dtype=dtype, seed=seed)
        generator = torch.Generator().manual_seed(seed + 1)
        self.hparams = torch.randn(num_examples, generator=generator, dtype=torch.float64).to(dtype)

    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        fit = (hparams.exp() * (self.a_train @ params - self.b_train).square()).mean() / 2
        return fit + 0.1 * params.square().sum() / 2

    def system(self, hparams: Tensor) -> tuple[Tensor, Tensor]:
        m, d = self.a_train.shape
        weighted = hparams.exp().unsqueeze(-1) * self.a_train
        ridge = 0.1 * torch.eye(d, dtype=self.a_train.dtype)
        return self.a_train.mT @ weighted / m + ridge, weighted.mT @ self.b_train / m


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
        generator = torch.Generator().manual_seed(seed)
        num_tasks = len(conditions)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        basis, _ = torch.linalg.qr(randn(num_tasks, size, size))
        spectrum = torch.stack([torch.logspace(0, float(torch.tensor(c).log10()), size) for c in conditions]).double()
        self.matrix = (basis @ torch.diag_embed(spectrum) @ basis.mT).to(dtype)
        self.c, self.target = randn(num_tasks, size).to(dtype), randn(size).to(dtype)
        self.init, self.hparams = torch.zeros(num_tasks, size, dtype=dtype), randn(size).to(dtype)

    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        product = (self.matrix @ params.unsqueeze(-1)).squeeze(-1)
        return (params * product).sum(-1) / 2 - ((self.c + hparams) * params).sum(-1)

    def outer(self, params: Tensor, hparams: Tensor) -> Tensor:
        return (params - self.target).square().sum() / 2

    def system(self, hparams: Tensor) -> tuple[Tensor, Tensor]:
        return self.matrix, self.c + hparams
