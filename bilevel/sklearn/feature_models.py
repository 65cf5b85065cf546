"""scikit-learn's models with a hyperparameter for each feature: what no grid can tune.

Each is its scikit-learn model on features that are scaled first: a penalty ``p_j`` on ``w_j`` is the unit penalty on
features divided by ``sqrt(p_j)``, and a width of its own for each feature a common width on features times
``sqrt(gamma_j)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.utils.validation import check_is_fitted, validate_data


class FeatureRidge(RegressorMixin, BaseEstimator):
    """Ridge regression with a penalty for each feature (automatic relevance determination; MacKay 1992).

    ``min over w, b of sum_i (y_i - x_i w - b)^2 + sum_j alphas_j w_j^2``; `sklearn.linear_model.Ridge` where all
    are equal. A feature whose penalty grows without bound is left out.

    Args:
        alphas: a positive number, or one for each feature ``[d]``.
        fit_intercept: whether there is a b.
    """

    def __init__(self, alphas: float | np.ndarray = 1.0, fit_intercept: bool = True):
        self.alphas = alphas
        self.fit_intercept = fit_intercept

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> FeatureRidge:
        """Fit; sets ``coef_ [d]`` and ``intercept_``. ``sample_weight`` as in `Ridge`."""
        x, targets = validate_data(self, X, y, y_numeric=True, dtype=np.float64)
        scale = 1 / np.sqrt(for_each_feature("alphas", self.alphas, x.shape[1]))
        model = Ridge(alpha=1.0, fit_intercept=self.fit_intercept).fit(x * scale, targets, sample_weight)
        self.coef_, self.intercept_ = model.coef_ * scale, model.intercept_
        return self

    def predict(self, X: ArrayLike) -> np.ndarray:
        check_is_fitted(self)
        predicted: np.ndarray = validate_data(self, X, reset=False, dtype=np.float64) @ self.coef_ + self.intercept_
        return predicted


class FeatureLogistic(ClassifierMixin, BaseEstimator):
    """Logistic regression with a penalty for each feature, the same in all classes.

    ``min over w, b of sum_i log loss_i + sum_cj penalties_j w_cj^2 / 2``; scikit-learn's `LogisticRegression` with
    ``C = 1 / penalties`` where all are equal.

    Args:
        penalties: a positive number, or one for each feature ``[d]``.
        fit_intercept: whether there are b.
        max_iter, tol: of scikit-learn's solver.
        class_weight: as in `LogisticRegression`.
    """

    def __init__(
        self,
        penalties: float | np.ndarray = 1.0,
        fit_intercept: bool = True,
        max_iter: int = 1000,
        tol: float = 1e-4,
        class_weight: Mapping[Any, float] | str | None = None,
    ):
        self.penalties = penalties
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.class_weight = class_weight

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> FeatureLogistic:
        """Fit; sets ``classes_``, ``coef_`` and ``intercept_`` as scikit-learn does."""
        x, targets = validate_data(self, X, y, dtype=np.float64)
        scale = 1 / np.sqrt(for_each_feature("penalties", self.penalties, x.shape[1]))
        model = LogisticRegression(
            C=1.0,
            fit_intercept=self.fit_intercept,
            max_iter=self.max_iter,
            tol=self.tol,
            class_weight=self.class_weight,
        ).fit(x * scale, targets, sample_weight)
        self.classes_, self.n_iter_ = model.classes_, model.n_iter_
        self._model, self._scale = model, scale
        self.coef_, self.intercept_ = model.coef_ * scale, model.intercept_
        return self

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        scores: np.ndarray = self._fitted().decision_function(self._scaled(X))
        return scores

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        shares: np.ndarray = self._fitted().predict_proba(self._scaled(X))
        return shares

    def predict(self, X: ArrayLike) -> np.ndarray:
        predicted: np.ndarray = self._fitted().predict(self._scaled(X))
        return predicted

    def _fitted(self) -> LogisticRegression:
        check_is_fitted(self)
        return self._model

    def _scaled(self, X: ArrayLike) -> np.ndarray:
        scaled: np.ndarray = validate_data(self, X, reset=False, dtype=np.float64) * self._scale
        return scaled


class FeatureKernelRidge(RegressorMixin, BaseEstimator):
    """Kernel ridge regression with a Gaussian kernel of its own width for each feature.

    ``k(x, z) = exp(-sum_j gammas_j (x_j - z_j)^2)``; `sklearn.kernel_ridge.KernelRidge` where all are equal. A feature
    whose gamma goes to zero is left out.

    Args:
        alpha: the penalty.
        gammas: a positive number, or one for each feature ``[d]``; None: 1 / d.
    """

    def __init__(self, alpha: float = 1.0, gammas: float | np.ndarray | None = None):
        self.alpha = alpha
        self.gammas = gammas

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> FeatureKernelRidge:
        """Fit; sets ``dual_coef_ [n]``. ``sample_weight`` as in `KernelRidge`."""
        x, targets = validate_data(self, X, y, y_numeric=True, dtype=np.float64)
        gammas = 1 / x.shape[1] if self.gammas is None else self.gammas
        self._scale = np.sqrt(for_each_feature("gammas", gammas, x.shape[1]))
        self._model = KernelRidge(alpha=self.alpha, kernel="rbf", gamma=1.0).fit(
            x * self._scale, targets, sample_weight
        )
        self.dual_coef_ = self._model.dual_coef_
        return self

    def predict(self, X: ArrayLike) -> np.ndarray:
        check_is_fitted(self)
        predicted: np.ndarray = self._model.predict(validate_data(self, X, reset=False, dtype=np.float64) * self._scale)
        return predicted


def for_each_feature(name: str, value: ArrayLike, num_features: int) -> np.ndarray:
    """A number, or a vector of them, as a positive vector ``[d]``.

    Raises:
        ValueError: of another length, not positive, or not finite.
    """
    values = np.full(num_features, value, float) if isinstance(value, Real) else np.asarray(value, float)
    if values.shape != (num_features,) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(
            f"{name} must be a positive number, or one for each of the {num_features} features; it is {value!r}."
        )
    return values
