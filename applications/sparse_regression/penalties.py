"""The penalties, as functions of their log-strengths, and their lasso by scikit-learn's coordinate descent."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ElasticNet
from torch import Tensor

import bilevel as bl


@dataclass(frozen=True)
class Penalty:
    """``sum_j l1_j |b_j| + l2 / 2 ||b||^2``, each strength the exponential of a hyperparameter.

    Attributes:
        blocks: the block of each feature, ``[d]`` int64; a block shares one l1. One block: the lasso; a block for each
            feature: the weighted lasso.
        ridge: whether there is an l2 too, the last hyperparameter: the elastic net.
    """

    blocks: Tensor
    ridge: bool = False

    @property
    def size(self) -> int:
        """How many hyperparameters there are."""
        return int(self.blocks.max()) + 1 + self.ridge

    def strengths(self, log_strengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """``[size]`` to the l1 of each feature ``[d]`` and the l2, if there is one."""
        strengths = log_strengths.exp()
        return strengths[self.blocks], strengths[-1] if self.ridge else None

    def prox(self, log_strengths: Tensor) -> bl.prox.L1 | bl.prox.ElasticNet:
        l1, l2 = self.strengths(log_strengths)
        return bl.prox.L1(l1) if l2 is None else bl.prox.ElasticNet(l1, l2)


def coordinate_descent(
    features: np.ndarray, targets: np.ndarray, l1: np.ndarray, l2: float, start: np.ndarray | None = None
) -> np.ndarray:
    """Minimise ``||y - X b||^2 / (2 n) + sum l1 |b| + l2 / 2 ||b||^2`` on centred data, coordinates in turn.

    Scikit-learn has one l1 for all features: those of the weighted lasso are lent to the columns, which is exact where
    l2 is 0. With an l2, all l1 are the same.
    """
    scale = l1 / l1.mean()
    total = l1.mean() + l2
    model = ElasticNet(
        alpha=total, l1_ratio=l1.mean() / total, fit_intercept=False, tol=1e-10, max_iter=20_000, warm_start=True
    )
    if start is not None:
        model.coef_ = start * scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # whoever differentiates it checks its residual
        return model.fit(np.asfortranarray(features / scale), targets).coef_ / scale
