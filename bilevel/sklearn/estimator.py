"""`BilevelSearchCV`: hyperparameters by the hypergradient of the cross-validation loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.metrics import check_scoring
from sklearn.model_selection import GridSearchCV, check_cv
from sklearn.model_selection._search import BaseSearchCV
from sklearn.pipeline import Pipeline
from sklearn.utils import assert_all_finite, check_array, check_random_state, column_or_1d, indexable
from sklearn.utils.metadata_routing import get_routing_for_object
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_method_params

from .callbacks import one_task
from .cross_validation import CrossValidation, Evaluation
from .fit_params import checked, divide, score_weight_of, weigh_classes
from .folds import Split, features_of, make_folds, on_cpu, take_apart
from .models import hyperparameters, searchable
from .space import make_space


class BilevelSearchCV(BaseSearchCV):
    """Tune continuous hyperparameters by gradient descent on the cross-validation loss.

    Use it like `sklearn.model_selection.GridSearchCV` where a model has more than two or three continuous
    hyperparameters, up to thousands; with one, a grid does as well. Each evaluation fits all folds at once and costs
    little more than fitting them, whatever the number of hyperparameters::

        min over h   1/K sum_k loss(model_k(h), held-out part k),   model_k(h) = argmin of the training objective k

    The loss is the squared error for regressors and the log loss for classifiers. The derivative of ``model_k(h)`` is
    that of the implicit function theorem (Bengio 2000), the outer optimizer SciPy's L-BFGS-B within the bounds, on the
    logarithms of positive hyperparameters. scikit-learn's callbacks (``set_callbacks``) see a search as one task.

    Args:
        estimator: `Ridge`, `LogisticRegression`, `KernelRidge`, `SVR`, `ElasticNet`, `Lasso` of scikit-learn,
            `FeatureRidge`, `FeatureLogistic`, `FeatureKernelRidge` of this package, or a `Pipeline` that ends with one
            of them. The steps before are fitted on the training part of each fold; columns by name, strings and missing
            values are their business. Of sparse features, dense copies are made. The folds are fitted to their
            minimum, whatever the ``tol``, ``max_iter`` and ``solver`` of the estimator are; these are of the fit
            on all data at the end, which a loose ``tol`` lets stop short.
        param_space: bounds ``(low, high)`` by parameter name, such as ``{"ridge__alpha": (1e-4, 1e4)}``; a parameter
            with a value for each feature has the same bounds for all.
        scoring: as in `GridSearchCV`; it then chooses among the places that the search has seen, which costs one more
            cross-validation for each. None: the place of least loss.
        n_jobs, pre_dispatch: as in `GridSearchCV`, for the fits of the steps before the model, and for ``scoring``.
            All folds of the model itself are one batch.
        refit: as in `GridSearchCV`: whether the best estimator is fitted on all data at the end; or the name of one of
            several scores, or a function of ``cv_results_`` that returns the best index.
        cv: as in `GridSearchCV`.
        verbose: 1 tells what is searched, 2 each evaluation.
        error_score: as in `GridSearchCV`, for ``scoring``.
        return_train_score: whether ``cv_results_`` has them.
        max_iter: steps of L-BFGS-B at most, for each start.
        tol: stop where the largest entry of the projected hypergradient is below it, with the loss measured in that of
            the best constant prediction; or where a step lowers the loss by less than ``tol / 100``.
        n_starts: the first start is at the estimator's own values, moved into the bounds, or at the best of five
            places across them where the loss is flat there; others are random.
        random_state: of the random starts.

    Attributes:
        cv_results_: as that of `GridSearchCV`, as are ``best_params_``, ``best_score_``, ``best_index_``,
            ``best_estimator_``, ``refit_time_``, ``n_splits_``, ``scorer_``, ``multimetric_``, ``classes_``,
            ``n_features_in_`` and ``feature_names_in_``. It has one entry for each evaluation, in order, and
            ``mean_test_loss``; without ``scoring`` the scores are the losses with a minus, and `score` is the
            estimator's own.
        path_: search coordinates (logarithms) of each evaluation ``[evaluations, hyperparameters]``.
        hypergradient_norm_: norm of the projected hypergradient at the best place, in units of ``tol``.
        n_iter_: steps of L-BFGS-B in all starts.
        n_evaluations_: fits of all folds.

    Warns:
        ConvergenceWarning: ``max_iter`` was reached. bilevel.SolveWarning: an inner solve was inexact. UserWarning:
        bounds that look like a grid; scores that are not finite, which rank last.
    """

    def __init__(
        self,
        estimator: Any,
        param_space: Mapping[str, tuple[float, float]],
        *,
        scoring: Any = None,
        n_jobs: int | None = None,
        refit: bool | str | Callable[[dict[str, Any]], int] = True,
        cv: Any = None,
        verbose: int = 0,
        pre_dispatch: int | str = "2*n_jobs",
        error_score: Any = np.nan,
        return_train_score: bool = False,
        max_iter: int = 50,
        tol: float = 1e-6,
        n_starts: int = 1,
        random_state: Any = None,
    ):
        super().__init__(
            estimator=estimator,
            scoring=scoring,
            n_jobs=n_jobs,
            refit=refit,
            cv=cv,
            verbose=verbose,
            pre_dispatch=pre_dispatch,
            error_score=error_score,
            return_train_score=return_train_score,
        )
        self.param_space = param_space
        self.max_iter = max_iter
        self.tol = tol
        self.n_starts = n_starts
        self.random_state = random_state

    @one_task
    def fit(self, X: Any, y: Any = None, **params: Any) -> BilevelSearchCV:
        """Search, then fit the best estimator on all data.

        Args:
            X: examples ``[n, ...]`` as the estimator takes them, or the first step of a pipeline.
            y: targets or classes ``[n]``.
            params: ``groups`` for ``cv``; the others for the estimator's own `fit`, such as ``sample_weight``, which
                are split with the examples. As in `GridSearchCV`, weights count in the held-out loss too, unless they
                are those of one step of a pipeline.

        Raises:
            ValueError, TypeError: bad data or settings; the message names them.
        """
        self.check_settings()
        validate(self)
        self._check_estimator()
        self._get_scorers()  # what is wrong is told before anything is computed
        X, y = indexable(X, y)
        params = _check_method_params(X, params)
        with sklearn.config_context(array_api_dispatch=False):  # the search computes in NumPy and PyTorch
            targets, classes = self._targets(y)
        routed = self._get_routed_params_for_fit(params)
        splitter = check_cv(self.cv, y, classifier=classes is not None)
        splits = [(train, test) for train, test in splitter.split(X, y, **routed.splitter.split)]
        self.n_splits_ = len(splits)

        search, values = self._search_of(X, y, targets, classes, splits, routed)
        if self.verbose > 0:
            print(f"Searching {search.space.size} hyperparameters; each evaluation fits {self.n_splits_} folds")
        random = check_random_state(self.random_state)
        starts = (search.space.sample(random) if k else search.space.start(values) for k in range(self.n_starts))
        self.n_iter_ = sum(search.minimize(start, self.max_iter, self.tol) for start in starts)
        self.n_evaluations_ = len(search.history)
        self.path_ = np.stack([evaluation.x for evaluation in search.history])
        if self.scoring is None:
            self._choose(search, X, y, routed.estimator.fit)
        else:
            self._score(search, X, y, splits, params)
        return self

    def _search_of(
        self, X: Any, y: Any, targets: np.ndarray, classes: np.ndarray | None, splits: list[Split], routed: Any
    ) -> tuple[CrossValidation, dict[str, Any]]:
        """The cross-validation loss as a function of the hyperparameters, and where the estimator stands."""
        before, model, prefix = take_apart(self.estimator)
        entry = searchable(model)
        before_params, weight = divide(self.estimator, routed.estimator.fit)
        score_weight = score_weight_of(self.estimator if self.scoring is None else None, routed.scorer.score)
        features = features_of(before, model, X, y, splits, before_params, self.n_jobs, self.pre_dispatch)
        n = len(targets)
        with on_cpu():
            folds = make_folds(features, targets, classes, splits, checked(weight, n), checked(score_weight, n))
            if classes is not None:
                weigh_classes(folds, getattr(model, "class_weight", None), classes)
            space = make_space(self.param_space, entry.known(folds.num_features), prefix)
            values = hyperparameters(model, entry.kinds, folds)
            validate(clone(model).set_params(**space.params(space.start(values))))
            searched = {c.name for c in space.coordinates}
            constants = {
                name: torch.as_tensor(value, dtype=torch.float64)
                for name, value in values.items()
                if name not in searched
            }
            twin = entry.twin(folds, model.get_params(deep=False))
        return CrossValidation(folds, space, twin, constants, heard=self.evaluated), values

    def evaluated(self, evaluation: Evaluation) -> None:
        """After each evaluation; a subclass may follow the search, or end it by an exception."""
        if self.verbose > 1:
            loss, slope = evaluation.test_losses.mean(), np.abs(evaluation.gradient).max()
            print(f"[CV] loss={loss:.6g} largest slope={slope:.2g} time={evaluation.seconds:5.2f}s")

    def check_settings(self) -> None:
        """Check the settings of the search itself; `fit` does it too.

        Raises:
            ValueError: naming the setting.
        """
        if not isinstance(self.max_iter, int | np.integer) or self.max_iter < 1:
            raise ValueError(f"max_iter is {self.max_iter!r}: a whole number, at least 1, is needed.")
        if not isinstance(self.n_starts, int | np.integer) or self.n_starts < 1:
            raise ValueError(f"n_starts is {self.n_starts!r}: a whole number, at least 1, is needed.")
        if not isinstance(self.tol, Real) or not self.tol > 0:
            raise ValueError(f"tol is {self.tol!r}: a positive number is needed.")

    def _check_estimator(self) -> None:
        """
        Raises:
            ValueError, TypeError: it cannot be searched.
        """
        estimator = clone(self.estimator)  # a class is refused
        if isinstance(estimator, Pipeline):
            if not estimator.steps:
                raise ValueError("The pipeline is empty: its last step is to be the model.")
            estimator._validate_steps()
        searchable(take_apart(estimator)[1])

    def _targets(self, y: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Numbers and None; or classes counted from 0, and their labels."""
        if y is None:
            raise ValueError("BilevelSearchCV requires y to be passed, but the target y is None.")
        y = column_or_1d(y, warn=True)
        if not is_classifier(self.estimator):
            return check_array(y, ensure_2d=False, dtype=np.float64, input_name="y"), None
        assert_all_finite(y, input_name="y")
        try:
            classes, codes = np.unique(y, return_inverse=True)
        except TypeError as error:
            kinds = ", ".join(sorted({type(label).__name__ for label in y}))
            raise TypeError(f"y has labels of types without a common order ({kinds}): give them one type.") from error
        check_classification_targets(y)
        if len(classes) < 2:
            raise ValueError(f"The data has one class only, {classes.tolist()}: a classifier needs two or more.")
        return codes, classes

    def _choose(self, search: CrossValidation, X: Any, y: Any, fit_params: Mapping[str, Any]) -> None:
        """``cv_results_`` of the losses, the best of it, and its fit on all data."""
        out = [
            {"fit_time": e.seconds / self.n_splits_, "score_time": 0.0, "test_scores": -test, "train_scores": -train}
            for e in search.history
            for test, train in zip(e.test_losses, e.train_losses, strict=True)
        ]
        more = {"mean_test_loss": [e.test_losses.mean() for e in search.history]}
        self.cv_results_ = self._format_results(self._params(search), self.n_splits_, out, more)
        self.scorer_, self.multimetric_ = check_scoring(self.estimator), False
        self.best_index_ = int(self._select_best_index(self.refit, "score", self.cv_results_))
        self.best_params_ = self.cv_results_["params"][self.best_index_]
        self.hypergradient_norm_ = search.norm(search.history[self.best_index_])
        if not callable(self.refit):
            self.best_score_ = float(self.cv_results_["mean_test_score"][self.best_index_])
        if self.refit:
            begin = time.perf_counter()
            self.best_estimator_ = clone(self.estimator).set_params(**self.best_params_).fit(X, y, **fit_params)
            self.refit_time_ = time.perf_counter() - begin
            if hasattr(self.best_estimator_, "feature_names_in_"):
                self.feature_names_in_ = self.best_estimator_.feature_names_in_

    def _score(self, search: CrossValidation, X: Any, y: Any, splits: list[Split], params: Mapping[str, Any]) -> None:
        """The same of scikit-learn's own fits at the places of the path."""
        places = [{name: [value] for name, value in place.items()} for place in self._params(search)]
        shared = set(GridSearchCV(None, {}).get_params(deep=False)) - {"param_grid", "cv"}
        own = {name: getattr(self, name) for name in shared}
        grid = GridSearchCV(param_grid=places, cv=splits, **own)
        params = {name: value for name, value in params.items() if name != "groups"}
        if sklearn.get_config()["enable_metadata_routing"]:  # what was for the splitter alone, has been there
            params = {name: params[name] for name in get_routing_for_object(grid).consumes("fit", params)}
        grid.fit(X, y, **params)
        for name, value in vars(grid).items():
            if name.endswith("_"):
                setattr(self, name, value)
        self.cv_results_["mean_test_loss"] = np.array([e.test_losses.mean() for e in search.history])
        if hasattr(grid, "best_index_"):  # not of several scores without refit
            self.hypergradient_norm_ = search.norm(search.history[self.best_index_])

    def _params(self, search: CrossValidation) -> list[dict[str, Any]]:
        """Settings of each evaluation, by the names of the estimator's parameters."""
        prefix = take_apart(self.estimator)[2]
        return [
            {prefix + name: value for name, value in search.space.params(evaluation.x).items()}
            for evaluation in search.history
        ]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


def validate(estimator: BaseEstimator) -> None:
    """Check an estimator's settings as its own `fit` does.

    Raises:
        ValueError, TypeError: naming the setting.
    """
    if not sklearn.get_config()["skip_parameter_validation"]:
        estimator._validate_params()
