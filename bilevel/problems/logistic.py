"""Logistic regression with a penalty for each feature."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .base import NewtonProblem, generator_of, randn


class Logistic(NewtonProblem):
    """``mean log(1 + exp(-b a^T y)) + sum exp(x) y^2 / 2`` on training data; outer: the first term on validation data.

    Args:
        num_examples, num_features: size of the training set; the validation set has as many examples.
    """

    def __init__(
        self, num_examples: int = 60, num_features: int = 8, *, dtype: torch.dtype = torch.float64, seed: int = 0
    ):
        generator = generator_of(seed, dtype, num_examples=num_examples, num_features=num_features)
        truth = randn(num_features, generator=generator)

        def data() -> tuple[Tensor, Tensor]:
            a = randn(num_examples, num_features, generator=generator)
            labels = torch.sign(a @ truth + randn(num_examples, generator=generator))
            return a.to(dtype), labels.to(dtype)

        (self.a_train, self.b_train), (self.a_val, self.b_val) = data(), data()
        self.init = torch.zeros(num_features, dtype=dtype, device="cpu")
        self.hparams = (0.5 * randn(num_features, generator=generator) - 2).to(dtype)

    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        fit = softplus(-self.b_train * (self.a_train @ params)).mean()
        return fit + (hparams.exp() * params.square()).sum() / 2

    def outer(self, params: Tensor, hparams: Tensor) -> Tensor:
        return softplus(-self.b_val * (self.a_val @ params)).mean()
