"""`BilevelSearchCV`: hyperparameters by the hypergradient of the cross-validation loss."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import scipy.optimize
import torch
from scipy.stats import rankdata
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone, is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import check_scoring
from sklearn.model_selection import check_cv
from sklearn.utils import check_random_state, column_or_1d, get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from applications.search.folds import Folds, make_folds, take_apart
from applications.search.models import Predict, hyperparameters, searchable
from applications.search.space import Space, make_space


@dataclass(frozen=True)
class Evaluation:
    """The cross-validation loss at one place.

    Attributes:
        x: search coordinates.
        test_losses, train_losses: of each fold.
        gradient: of the mean test loss, by coordinate.
    """

    x: np.ndarray
    test_losses: np.ndarray
    train_losses: np.ndarray
    gradient: np.ndarray
    seconds: float


@dataclass
class CrossValidation:
    """x to the mean loss over the folds and its hypergradient; it remembers each evaluation.

    Attributes:
        heard: is called with each new evaluation.
    """

    folds: Folds
    space: Space
    predict: Predict
    constants: dict[str, torch.Tensor]
    history: list[Evaluation] = field(default_factory=list)
    heard: Callable[[Evaluation], None] = lambda evaluation: None

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        if self.history and np.array_equal(self.history[-1].x, x):
            return float(self.history[-1].test_losses.mean()), self.history[-1].gradient
        begin = time.perf_counter()
        point = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        predictions = self.predict({**self.constants, **self.space.tensors(point)})
        losses = self.folds.losses(predictions, self.folds.test)
        (gradient,) = torch.autograd.grad(losses.mean(), point)
        with torch.no_grad():
            train_losses = self.folds.losses(predictions, self.folds.train)
        seconds = time.perf_counter() - begin
        found = Evaluation(x.copy(), losses.detach().numpy(), train_losses.numpy(), gradient.numpy(), seconds)
        self.history.append(found)
        self.heard(found)
        return float(found.test_losses.mean()), found.gradient


def _has(name: str) -> Callable[[Any], bool]:
    """Whether the estimator inside has the method."""

    def check(self: Any) -> bool:
        getattr(self.best_estimator_ if hasattr(self, "best_estimator_") else self.estimator, name)
        return True

    return check


class BilevelSearchCV(MetaEstimatorMixin, BaseEstimator):
    """Tune continuous hyperparameters by gradient descent on the cross-validation loss.

    Use it like `sklearn.model_selection.GridSearchCV` where a model has more than two or three continuous
    hyperparameters, up to thousands; with one, a grid does as well. Each evaluation fits all folds at once and costs
    little more than fitting them, whatever the number of hyperparameters::

        min over h   1/K sum_k loss(model_k(h), held-out part k),   model_k(h) = argmin of the training objective k

    The loss is the squared error for regressors and the log loss for classifiers. The derivative of ``model_k(h)`` is
    that of the implicit function theorem (Bengio 2000), the outer optimizer SciPy's L-BFGS-B within the bounds, on the
    logarithms of positive hyperparameters.

    Args:
        estimator: `Ridge`, `LogisticRegression`, `KernelRidge`, `SVR`, `ElasticNet`, `Lasso` of scikit-learn,
            `FeatureRidge`, `FeatureLogistic`, `FeatureKernelRidge` of this package, or a `Pipeline` that ends with one
            of them. The steps before are fitted on the training part of each fold.
        param_space: bounds ``(low, high)`` by parameter name, such as ``{"ridge__alpha": (1e-4, 1e4)}``; a parameter
            with a value for each feature has the same bounds for all.
        scoring: as in `GridSearchCV`; it then chooses among the places that the search has seen, which costs one more
            cross-validation for each. None: the place of least loss.
        refit: whether the best estimator is fitted on all data at the end.
        cv: as in `GridSearchCV`.
        max_iter: steps of L-BFGS-B at most, for each start.
        tol: stop where the largest entry of the projected hypergradient is below it, with the loss measured in that of
            the best constant prediction; or where a step lowers the loss by less than ``tol / 100``.
        n_starts: the first start is at the estimator's own values, moved into the bounds; others are random.
        return_train_score: whether ``cv_results_`` has them.
        random_state: of the random starts.

    Attributes:
        best_params_, best_score_, best_index_, best_estimator_, refit_time_, cv_results_, n_splits_, scorer_: as those
            of `GridSearchCV`. ``cv_results_`` has one entry for each evaluation, in order, and ``mean_test_loss``;
            without ``scoring`` the scores are the losses with a minus, and `score` is the estimator's own.
        path_: search coordinates (logarithms) of each evaluation ``[evaluations, hyperparameters]``.
        hypergradient_norm_: norm of the projected hypergradient at the best place, in units of ``tol``.
        n_iter_: steps of L-BFGS-B in all starts. n_evaluations_: fits of all folds.
        classes_, n_features_in_, feature_names_in_: of the data.

    Warns:
        ConvergenceWarning: ``max_iter`` was reached. bilevel.SolveWarning: an inner solve was inexact.
    """

    def __init__(
        self,
        estimator: Any,
        param_space: Mapping[str, tuple[float, float]],
        *,
        scoring: Any = None,
        refit: bool = True,
        cv: Any = None,
        max_iter: int = 50,
        tol: float = 1e-4,
        n_starts: int = 1,
        return_train_score: bool = False,
        random_state: Any = None,
    ):
        self.estimator = estimator
        self.param_space = param_space
        self.scoring = scoring
        self.refit = refit
        self.cv = cv
        self.max_iter = max_iter
        self.tol = tol
        self.n_starts = n_starts
        self.return_train_score = return_train_score
        self.random_state = random_state

    def fit(self, X: Any, y: Any, groups: Any = None) -> BilevelSearchCV:
        """Search, then fit the best estimator on all data.

        Args:
            X: dense features ``[n, d]``. y: targets or classes ``[n]``. groups: for ``cv``.

        Raises:
            ValueError, TypeError: bad data or settings; the message names them.
        """
        self.check_settings()
        given, (X, y) = X, validate_data(self, X, y, ensure_min_samples=2)
        y, num_classes = self._targets(y)
        before, model, prefix = take_apart(self.estimator)
        entry = searchable(model)
        splitter = check_cv(self.cv, y, classifier=num_classes > 0)
        splits = list(splitter.split(X, y, groups))
        folds = make_folds(before, np.asarray(X, np.float64), y, splits, num_classes)
        space = make_space(self.param_space, entry.known(folds.num_features), prefix)

        values = hyperparameters(model, entry.kinds, folds)
        searched = {c.name for c in space.coordinates}
        constants = {
            name: torch.as_tensor(value, dtype=torch.float64) for name, value in values.items() if name not in searched
        }
        twin = entry.twin(folds, model.get_params(deep=False))
        search = CrossValidation(folds, space, twin, constants, heard=self._heard)
        self.n_iter_ = self._minimize(search, values)
        self.n_splits_, self.n_evaluations_ = len(splits), len(search.history)
        self.path_ = np.stack([evaluation.x for evaluation in search.history])
        labels = y if not num_classes else self.classes_[y]
        self._record(search, prefix, given, labels, splits)
        if self.refit:
            begin = time.perf_counter()
            self.best_estimator_ = clone(self.estimator).set_params(**self.best_params_).fit(given, labels)
            self.refit_time_ = time.perf_counter() - begin
        return self

    def _heard(self, evaluation: Evaluation) -> None:
        """After each evaluation; a subclass may follow the search, or end it by an exception."""

    def check_settings(self) -> None:
        """Of the search itself; `fit` does it too.

        Raises:
            ValueError: naming the setting.
        """
        if not isinstance(self.max_iter, int | np.integer) or self.max_iter < 1:
            raise ValueError(f"max_iter is {self.max_iter!r}: a whole number, at least 1, is needed.")
        if not isinstance(self.n_starts, int | np.integer) or self.n_starts < 1:
            raise ValueError(f"n_starts is {self.n_starts!r}: a whole number, at least 1, is needed.")
        if not isinstance(self.tol, Real) or not self.tol > 0:
            raise ValueError(f"tol is {self.tol!r}: a positive number is needed.")

    def _targets(self, y: Any) -> tuple[np.ndarray, int]:
        """Numbers, or classes counted from 0, and how many."""
        y = column_or_1d(y, warn=True)
        if not is_classifier(self.estimator):
            return np.asarray(y, np.float64), 0
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"The data has one class only, {self.classes_[0]!r}: a classifier needs two or more.")
        return codes, len(self.classes_)

    def _minimize(self, search: CrossValidation, values: Mapping[str, Any]) -> int:
        """L-BFGS-B from each start; the number of its steps."""
        random = check_random_state(self.random_state)
        low, high = search.space.bounds()
        steps = 0
        for start in range(self.n_starts):
            x = search.space.sample(random) if start else search.space.start(values)
            _, gradient = search(x)
            # Within bounds L-BFGS-B's first step is the gradient itself: scaled, it is about one in each coordinate.
            scale = np.sqrt(len(x)) / (float(np.linalg.norm(gradient)) or 1.0)

            def scaled(x: np.ndarray, scale: float = scale) -> tuple[float, np.ndarray]:
                loss, gradient = search(x)
                return scale * loss, scale * gradient

            found = scipy.optimize.minimize(
                scaled,
                x,
                jac=True,
                method="L-BFGS-B",
                bounds=np.stack([low, high], 1),
                options={
                    "maxiter": self.max_iter,
                    "ftol": self.tol / 100,
                    "gtol": self.tol * scale * search.folds.scale(),
                    "maxls": LINE_SEARCH,
                },
            )
            steps += found.nit
            if found.nit >= self.max_iter:
                warnings.warn(
                    f"The search made {found.nit} steps (max_iter) without converging. Raise max_iter or tol.",
                    ConvergenceWarning,
                    stacklevel=3,
                )
        return steps

    def _record(
        self, search: CrossValidation, prefix: str, X: Any, y: np.ndarray, splits: list[tuple[np.ndarray, np.ndarray]]
    ) -> None:
        """``cv_results_`` and the best of it."""
        history = search.history
        params = [
            {prefix + name: value for name, value in search.space.params(evaluation.x).items()}
            for evaluation in history
        ]
        losses = np.stack([evaluation.test_losses for evaluation in history])
        results: dict[str, Any] = {"params": params}
        for name in params[0]:
            column = np.ma.MaskedArray(np.empty(len(params), dtype=object), mask=False)
            for row, chosen in enumerate(params):
                column[row] = chosen[name]
            results[f"param_{name}"] = column
        seconds = np.array([evaluation.seconds for evaluation in history]) / self.n_splits_
        results |= {"mean_fit_time": seconds, "std_fit_time": np.zeros_like(seconds)}
        results["mean_test_loss"] = losses.mean(1)
        self.scorer_ = check_scoring(self.estimator, self.scoring)
        if self.scoring is None:
            scores, score_seconds = -losses, np.zeros_like(seconds)
        else:
            scores, score_seconds = self._scores(params, X, y, splits)
        results |= {"mean_score_time": score_seconds, "std_score_time": np.zeros_like(seconds)}
        results |= _columns("test", scores)
        results["rank_test_score"] = rankdata(-scores.mean(1), method="min").astype(np.int32)
        if self.return_train_score:
            results |= _columns("train", -np.stack([evaluation.train_losses for evaluation in history]))
        self.cv_results_ = results
        self.best_index_ = int(np.argmax(scores.mean(1)))
        self.best_params_, self.best_score_ = params[self.best_index_], float(scores.mean(1)[self.best_index_])
        best = history[self.best_index_]
        low, high = search.space.bounds()
        unit = search.folds.scale()
        step = np.clip(best.x - best.gradient / unit, low, high) - best.x
        self.hypergradient_norm_ = float(np.linalg.norm(step))

    def _scores(
        self, params: list[dict[str, Any]], X: Any, y: np.ndarray, splits: list[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores ``[evaluations, K]`` of scikit-learn's own fits, and their seconds a fold."""
        from sklearn.model_selection import cross_validate

        rows = [
            cross_validate(clone(self.estimator).set_params(**p), X, y, scoring=self.scoring, cv=splits) for p in params
        ]
        seconds = np.array([np.mean(row["fit_time"] + row["score_time"]) for row in rows])
        return np.stack([row["test_score"] for row in rows]), seconds

    @available_if(_has("predict"))
    def predict(self, X: Any) -> np.ndarray:
        """By the best estimator."""
        return self._best().predict(X)

    @available_if(_has("predict_proba"))
    def predict_proba(self, X: Any) -> np.ndarray:
        """By the best estimator."""
        return self._best().predict_proba(X)

    @available_if(_has("predict_log_proba"))
    def predict_log_proba(self, X: Any) -> np.ndarray:
        """By the best estimator."""
        return self._best().predict_log_proba(X)

    @available_if(_has("decision_function"))
    def decision_function(self, X: Any) -> np.ndarray:
        """By the best estimator."""
        return self._best().decision_function(X)

    @available_if(_has("score"))
    def score(self, X: Any, y: Any) -> float:
        """By ``scoring``, or the estimator's own score where that is None."""
        return self.scorer_(self._best(), X, y)

    def _best(self) -> Any:
        check_is_fitted(self)
        if not self.refit:
            raise AttributeError("refit=False: there is no best estimator. Fit one with best_params_.")
        return self.best_estimator_

    def __sklearn_tags__(self) -> Any:
        tags, inner = super().__sklearn_tags__(), get_tags(self.estimator)
        tags.estimator_type = inner.estimator_type
        tags.classifier_tags, tags.regressor_tags = inner.classifier_tags, inner.regressor_tags
        tags.target_tags.required = True
        return tags


LINE_SEARCH = 8
"""Evaluations along one direction at most: where the loss has kinks, more find nothing."""


def _columns(part: str, scores: np.ndarray) -> dict[str, np.ndarray]:
    """Scores ``[evaluations, K]`` under the names of scikit-learn."""
    columns = {f"split{k}_{part}_score": column for k, column in enumerate(scores.T)}
    return {**columns, f"mean_{part}_score": scores.mean(1), f"std_{part}_score": scores.std(1)}
