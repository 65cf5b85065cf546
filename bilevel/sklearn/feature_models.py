"""scikit-learn's models with a hyperparameter for each feature: what no grid can tune.

Each is its scikit-learn model on features that are scaled first: a penalty ``p_j`` on ``w_j`` is the unit penalty on
features divided by ``sqrt(p_j)``, and a width of its own for each feature a common width on features times
``sqrt(gamma_j)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, is_regressor
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.utils.validation import check_is_fitted, validate_data


def settings_of(model: type[BaseEstimator], *names: str) -> dict[str, Any]:
    """What scikit-learn's model takes for settings that are passed on to it."""
    return {name: model._parameter_constraints[name] for name in names}


class FeatureModel(BaseEstimator):
    """What the three have in common: scikit-learn's model, and the scale of each feature that it is given."""

    _model: Any
    _scale: np.ndarray

    def predict(self, X: ArrayLike) -> np.ndarray:
        predicted: np.ndarray = self._fitted().predict(self._scaled(X))
        return predicted

    def _learn(
        self, model: Any, scale: Callable[[int], np.ndarray], X: ArrayLike, y: ArrayLike, weight: ArrayLike | None
    ) -> Any:
        """Fit the model to scaled features; ``scale`` is given their number."""
        numeric = is_regressor(self)
        x, targets = validate_data(self, X, y, accept_sparse="csr", y_numeric=numeric, dtype=np.float64)
        self._scale = scale(x.shape[1])
        self._model = model.fit(times(x, self._scale), targets, weight)
        return self._model

    def _fitted(self) -> Any:
        check_is_fitted(self)
        return self._model

    def _scaled(self, X: ArrayLike) -> Any:
        return times(validate_data(self, X, reset=False, accept_sparse="csr", dtype=np.float64), self._scale)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


class FeatureRidge(RegressorMixin, FeatureModel):
    """Ridge regression with a penalty for each feature (automatic relevance determination; MacKay 1992).

    ``min over w, b of sum_i (y_i - x_i w - b)^2 + sum_j alphas_j w_j^2``; `sklearn.linear_model.Ridge` where all
    are equal. A feature whose penalty grows without bound is left out.

    Args:
        alphas: a positive number, or one for each feature ``[d]``.
        fit_intercept: whether there is a b.
    """

    _parameter_constraints = settings_of(Ridge, "fit_intercept")

    def __init__(self, alphas: float | np.ndarray = 1.0, fit_intercept: bool = True):
        self.alphas = alphas
        self.fit_intercept = fit_intercept

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> FeatureRidge:
        """Fit; sets ``coef_ [d]`` and ``intercept_``. ``sample_weight`` as in `Ridge`."""
        model = Ridge(alpha=1.0, fit_intercept=self.fit_intercept, tol=1e-10)  # it reads tol of sparse features only
        self._learn(model, lambda d: 1 / np.sqrt(for_each_feature("alphas", self.alphas, d)), X, y, sample_weight)
        self.coef_, self.intercept_ = model.coef_ * self._scale, model.intercept_
        return self


class FeatureLogistic(ClassifierMixin, FeatureModel):
    """Logistic regression with a penalty for each feature, the same in all classes.

    ``min over w, b of sum_i log loss_i + sum_cj penalties_j w_cj^2 / 2``; scikit-learn's `LogisticRegression` with
    ``C = 1 / penalties`` where all are equal.

    Args:
        penalties: a positive number, or one for each feature ``[d]``.
        fit_intercept: whether there are b.
        max_iter, tol: of scikit-learn's solver.
        class_weight: as in `LogisticRegression`.
    """

    _parameter_constraints = settings_of(LogisticRegression, "fit_intercept", "max_iter", "tol", "class_weight")

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
        model = LogisticRegression(
            C=1.0,
            fit_intercept=self.fit_intercept,
            max_iter=self.max_iter,
            tol=self.tol,
            class_weight=self.class_weight,
        )
        self._learn(model, lambda d: 1 / np.sqrt(for_each_feature("penalties", self.penalties, d)), X, y, sample_weight)
        self.classes_, self.n_iter_ = model.classes_, model.n_iter_
        self.coef_, self.intercept_ = model.coef_ * self._scale, model.intercept_
        return self

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        scores: np.ndarray = self._fitted().decision_function(self._scaled(X))
        return scores

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        shares: np.ndarray = self._fitted().predict_proba(self._scaled(X))
        return shares

    def predict_log_proba(self, X: ArrayLike) -> np.ndarray:
        shares: np.ndarray = self._fitted().predict_log_proba(self._scaled(X))
        return shares


class FeatureKernelRidge(RegressorMixin, FeatureModel):
    """Kernel ridge regression with a Gaussian kernel of its own width for each feature.

    ``k(x, z) = exp(-sum_j gammas_j (x_j - z_j)^2)``; `sklearn.kernel_ridge.KernelRidge` where all are equal. A feature
    whose gamma goes to zero is left out.

    Args:
        alpha: the penalty.
        gammas: a positive number, or one for each feature ``[d]``; None: 1 / d.
    """

    _parameter_constraints = settings_of(KernelRidge, "alpha")

    def __init__(self, alpha: float = 1.0, gammas: float | np.ndarray | None = None):
        self.alpha = alpha
        self.gammas = gammas

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> FeatureKernelRidge:
        """Fit; sets ``dual_coef_ [n]``. ``sample_weight`` as in `KernelRidge`."""
        model = KernelRidge(alpha=self.alpha, kernel="rbf", gamma=1.0)
        self._learn(model, self._widths, X, y, sample_weight)
        self.dual_coef_ = model.dual_coef_
        return self

    def _widths(self, num_features: int) -> np.ndarray:
        gammas = 1 / num_features if self.gammas is None else self.gammas
        widths: np.ndarray = np.sqrt(for_each_feature("gammas", gammas, num_features))
        return widths


def times(x: Any, scale: np.ndarray) -> Any:
    """Each column times its number: an array, or a sparse one in CSR format."""
    return x.multiply(scale).tocsr() if scipy.sparse.issparse(x) else x * scale


def for_each_feature(name: str, value: ArrayLike, num_features: int) -> np.ndarray:
    """A number, or a vector of them, as a positive vector ``[d]``.

    Raises:
        ValueError: of another length, not positive, or not finite.
    """
    try:
        values = np.full(num_features, value, float) if np.ndim(value) == 0 else np.asarray(value, float)
    except (TypeError, ValueError):
        values = np.full(num_features, np.nan)
    if values.shape != (num_features,) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(
            f"{name} must be a positive number, or one for each of the {num_features} features; it is {value!r}."
        )
    return values
