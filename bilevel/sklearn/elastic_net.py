"""Elastic nets of all folds at once: scikit-learn solves, the library checks and differentiates on the active set."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ElasticNet
from torch import Tensor

from .. import prox
from ..argmin import argmin
from ..inner.proximal import ProximalGradient
from .folds import Folds
from .quadratic import RidgeTwin, times


class ElasticNetTwin:
    """``sum_i s_i (y_i - x_i w - b)^2 / 2m + alpha l1_ratio |w|_1 + alpha (1 - l1_ratio) |w|^2 / 2``.

    The weights s of the training examples have the sum m.

    Coordinate descent from the last solution, then proximal gradient steps until the fixed point is exact; its
    derivative is that on the active set (Bertrand et al. 2020).
    """

    def __init__(self, folds: Folds, fit_intercept: bool):
        centred = RidgeTwin(folds, fit_intercept)
        self.x, self.offset = centred.x, centred.offset
        count = folds.train.sum(-1)
        self.gram = centred.rows.mT @ centred.rows / count[:, None, None]
        self.moment = times(centred.rows.mT, centred.y) / count[:, None]
        self.parts = [
            part(rows[weights > 0], y[weights > 0], weights.sum())
            for rows, y, weights in zip(centred.rows.numpy(), centred.y.numpy(), folds.train.numpy(), strict=True)
        ]
        self.models = [ElasticNet(warm_start=True, fit_intercept=False, tol=1e-14, max_iter=10_000) for _ in self.parts]

    def predictions(self, alpha: Tensor, l1_ratio: Tensor) -> Tensor:
        """Predictions of each fold's model for all examples, ``[K, n]``; both 0-d."""

        def smooth(w: Tensor) -> Tensor:
            ridge = alpha * (1 - l1_ratio) * w.square()
            return (w * times(self.gram, w) / 2 - self.moment * w + ridge / 2).sum(-1)

        solver = ProximalGradient(prox.L1(alpha * l1_ratio))
        fit = argmin(smooth, self._solve(alpha.item(), l1_ratio.item()), solver=solver)
        return times(self.x, fit.value) + self.offset

    def _solve(self, alpha: float, l1_ratio: float) -> Tensor:
        with warnings.catch_warnings():  # what it leaves, the proximal gradient finishes
            warnings.simplefilter("ignore", ConvergenceWarning)
            for model, (rows, y, gram) in zip(self.models, self.parts, strict=True):
                model.set_params(alpha=alpha, l1_ratio=l1_ratio, precompute=gram).fit(rows, y, check_input=False)
        return torch.from_numpy(np.stack([model.coef_ for model in self.models]))


def part(rows: np.ndarray, y: np.ndarray, count: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, targets and Gram matrix of a fold, as scikit-learn takes them: it divides by the number of rows."""
    scale = np.sqrt(len(rows) / count)
    rows = np.asfortranarray(rows * scale)
    return rows, y * scale, np.ascontiguousarray(rows.T @ rows)
