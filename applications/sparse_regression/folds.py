"""The K training problems of a cross-validation as one batch, and its validation losses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import KFold, ShuffleSplit
from torch import Tensor


@dataclass(frozen=True)
class Folds:
    """K splits of the same examples, which need not be of one size: each has its weights on all of them.

    The losses are those of scikit-learn: ``||y - X b||^2 / (2 n)`` over the n training examples of a fold, each fold
    with its own intercept, which is the loss after centring by its training examples; the validation loss is the mean
    squared error.

    Attributes:
        features, targets: float64 ``[n, d]``, ``[n]``.
        training, validation: ``[K, n]``, the weight of an example, 1 over how many there are, or 0.
        centres, means: ``[K, d]``, ``[K]``, of the training examples; zero without an intercept.
    """

    features: Tensor
    targets: Tensor
    training: Tensor
    validation: Tensor
    centres: Tensor
    means: Tensor

    @classmethod
    def make(cls, features: np.ndarray, targets: np.ndarray, number: int, seed: int, intercept: bool = True) -> Folds:
        """K folds shuffled by the seed; ``number`` 1: a third of the examples is held out."""
        splitter = (
            ShuffleSplit(1, test_size=1 / 3, random_state=seed)
            if number == 1
            else KFold(number, shuffle=True, random_state=seed)
        )
        x, y = torch.from_numpy(features), torch.from_numpy(targets)
        training, validation = torch.zeros(2, number, len(y), dtype=torch.float64)
        for fold, (train, held_out) in enumerate(splitter.split(features)):
            training[fold, train], validation[fold, held_out] = 1 / len(train), 1 / len(held_out)
        return cls(x, y, training, validation, intercept * (training @ x), intercept * (training @ y))

    def __len__(self) -> int:
        return len(self.training)

    @property
    def pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Training and validation rows of each fold, as scikit-learn takes them."""
        rows = zip(self.training.numpy(), self.validation.numpy(), strict=True)
        return [(np.flatnonzero(train), np.flatnonzero(held_out)) for train, held_out in rows]

    def training_losses(self, coefficients: Tensor) -> Tensor:
        """``[K, d] -> [K]``, without the penalty."""
        return (self.training * self._residuals(coefficients).square()).sum(-1) / 2

    def validation_losses(self, coefficients: Tensor) -> Tensor:
        """``[K, d] -> [K]``; their mean is the criterion."""
        return (self.validation * self._residuals(coefficients).square()).sum(-1)

    def largest_penalty(self) -> float:
        """From it on, no lasso of any fold selects a feature."""
        slopes = (self.training * (self.targets - self.means.unsqueeze(-1))) @ self.features
        slopes = slopes - (self.training @ self.targets - self.means).unsqueeze(-1) * self.centres
        return slopes.abs().max().item()

    def _residuals(self, coefficients: Tensor) -> Tensor:
        constants = self.means - (self.centres * coefficients).sum(-1)
        return self.targets - coefficients @ self.features.mT - constants.unsqueeze(-1)
