"""The folds of a cross-validation as one batch: features as each fold's own preprocessing gives them, and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.pipeline import Pipeline
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy


@dataclass(frozen=True)
class Folds:
    """K folds of the same n examples.

    Attributes:
        features: float64 ``[K, n, d]``, or ``[1, n, d]`` where all folds share them.
        targets: float64 ``[n]``, or int64 classes counted from 0.
        train, test: bool ``[K, n]``.
        num_classes: 0 for regression.
    """

    features: Tensor
    targets: Tensor
    train: Tensor
    test: Tensor
    num_classes: int

    @property
    def num_features(self) -> int:
        return self.features.shape[-1]

    def losses(self, predictions: Tensor, mask: Tensor) -> Tensor:
        """Mean loss of each fold ``[K]`` over the examples of a mask: squared error, or log loss.

        Args:
            predictions: ``[K, n]``, logits of the second of two classes ``[K, n, 1]``, or of all ``[K, n, C]``.
        """
        each = self.each_loss(predictions)
        return torch.where(mask, each, torch.zeros_like(each)).sum(-1) / mask.sum(-1)

    def each_loss(self, predictions: Tensor) -> Tensor:
        """``[K, n]``"""
        if not self.num_classes:
            return (predictions - self.targets).square()
        if predictions.shape[-1] == 1:
            logits = predictions.squeeze(-1)
            return binary_cross_entropy_with_logits(logits, self.targets.to(logits).expand_as(logits), reduction="none")
        return cross_entropy(predictions.movedim(-1, 1), self.targets.expand(predictions.shape[:2]), reduction="none")

    def scale(self) -> float:
        """The loss of the best constant: what losses are measured in."""
        if not self.num_classes:
            return float(self.targets.var(correction=0)) or 1.0
        shares = torch.bincount(self.targets, minlength=self.num_classes) / len(self.targets)
        return float(torch.special.entr(shares).sum())


def make_folds(
    preprocessing: BaseEstimator | None,
    X: np.ndarray,
    y: np.ndarray,
    splits: Sequence[tuple[np.ndarray, np.ndarray]],
    num_classes: int,
) -> Folds:
    """Fit the preprocessing on the training part of each fold, and transform all examples by it.

    Raises:
        ValueError: it gives another number of columns in another fold; or the splits are empty.
    """
    masks = np.zeros((2, len(splits), len(X)), bool)
    for k, parts in enumerate(splits):
        for mask, part in zip(masks, parts, strict=True):
            mask[k, part] = True
    if preprocessing is None:
        stacked = np.asarray(X, np.float64)[None]
    else:
        versions = [_dense(clone(preprocessing).fit(X[train], y[train]).transform(X)) for train, _ in splits]
        if len({version.shape[1] for version in versions}) > 1:
            widths = ", ".join(str(version.shape[1]) for version in versions)
            raise ValueError(
                f"The steps before the model give {widths} columns in the folds: the same number is needed."
            )
        stacked = np.stack(versions)
    targets = torch.tensor(y, dtype=torch.int64 if num_classes else torch.float64)
    train, test = torch.from_numpy(masks)
    return Folds(torch.tensor(stacked), targets, train, test, num_classes)


def _dense(features: object) -> np.ndarray:
    if hasattr(features, "toarray"):
        raise TypeError("The steps before the model give sparse features: dense ones are needed.")
    return np.asarray(features, np.float64)


def take_apart(estimator: BaseEstimator) -> tuple[Pipeline | None, BaseEstimator, str]:
    """The steps before the model, the model, and what its parameters' names begin with."""
    if not isinstance(estimator, Pipeline):
        return None, estimator, ""
    before = estimator[:-1] if len(estimator) > 1 else None
    name, model = estimator.steps[-1]
    return before, model, f"{name}__"
