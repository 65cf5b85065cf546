"""Ridge regressions: the classic of hyperparameter optimization, with closed forms."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import ClosedFormProblem, generator_of, randn


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
        generator = generator_of(seed, dtype, num_examples=num_examples, num_features=num_features)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)

        truth = randn(num_features)
        self.a_train, self.a_val = randn(num_examples, num_features), randn(num_examples, num_features)
        self.b_train = self.a_train @ truth + randn(num_examples)
        self.b_val = self.a_val @ truth + randn(num_examples)
        self.init = torch.zeros(num_features, dtype=dtype, device="cpu")
        self.hparams = 0.3 * randn(num_features) if per_feature else torch.zeros((), dtype=dtype, device="cpu")

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
        generator = generator_of(seed + 1, dtype)
        self.hparams = torch.randn(num_examples, generator=generator, dtype=torch.float64, device="cpu").to(dtype)

    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        fit = (hparams.exp() * (self.a_train @ params - self.b_train).square()).mean() / 2
        return fit + 0.1 * params.square().sum() / 2

    def system(self, hparams: Tensor) -> tuple[Tensor, Tensor]:
        m, d = self.a_train.shape
        weighted = hparams.exp().unsqueeze(-1) * self.a_train
        ridge = 0.1 * torch.eye(d, dtype=self.a_train.dtype, device=self.a_train.device)
        return self.a_train.mT @ weighted / m + ridge, weighted.mT @ self.b_train / m


class KernelRidge(ClosedFormProblem):
    """Kernel ridge regression with a Gaussian kernel: ``hparams = (log width, log penalty)``.

    inner (in the dual): ``1/2 a^T (K + m exp(penalty) I) a - b^T a``; outer: squared error on validation data.
    """

    def __init__(self, num_examples: int = 20, *, dtype: torch.dtype = torch.float64, seed: int = 0):
        generator = generator_of(seed, dtype, num_examples=num_examples)
        points = [2 * randn(num_examples, 1, generator=generator) for _ in range(2)]
        self.x_train, self.x_val = (x.to(dtype) for x in points)
        self.b_train, self.b_val = (
            (torch.sin(2 * x) + 0.1 * randn(num_examples, 1, generator=generator)).squeeze(-1).to(dtype) for x in points
        )
        self.init = torch.zeros(num_examples, dtype=dtype, device="cpu")
        self.hparams = torch.tensor([-0.5, -3.0], dtype=dtype, device="cpu")

    def kernel(self, a: Tensor, b: Tensor, hparams: Tensor) -> Tensor:
        """``exp(-(a - b)^2 / 2 width^2)``"""
        return torch.exp(-(a - b.mT).square() / (2 * (2 * hparams[0]).exp()))

    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        matrix, b = self.system(hparams)
        return params @ matrix @ params / 2 - b @ params

    def outer(self, params: Tensor, hparams: Tensor) -> Tensor:
        return (self.kernel(self.x_val, self.x_train, hparams) @ params - self.b_val).square().mean() / 2

    def system(self, hparams: Tensor) -> tuple[Tensor, Tensor]:
        m = len(self.b_train)
        eye = torch.eye(m, dtype=self.b_train.dtype, device=self.b_train.device)
        return self.kernel(self.x_train, self.x_train, hparams) + m * hparams[1].exp() * eye, self.b_train
